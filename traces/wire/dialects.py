"""Which dialect is spoken where, and what reads it: the only list of wire formats."""

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from tokentape.traces.wire import (
    anthropic,
    anthropic_request,
    bedrock,
    bedrock_request,
    embeddings,
    gemini,
    gemini_request,
    llama_cpp,
    ollama,
    ollama_request,
    openai,
    openai_request,
    responses,
    responses_request,
    sglang,
    tgi,
    triton,
)
from tokentape.traces.wire.aws_frames import FrameReader
from tokentape.traces.wire.json_array import JsonArrayReader
from tokentape.traces.wire.lines import LineReader
from tokentape.traces.wire.reply import Framing, StreamParser, WholeParser
from tokentape.traces.wire.request import RequestFacts
from tokentape.traces.wire.request_body import Body
from tokentape.traces.wire.sse import SseReader

UNKNOWN: Final = "unknown"
_SSE: Final[Mapping[str, Callable[[], Framing]]] = {"text/event-stream": SseReader}
_FRAMES: Final[Mapping[str, Callable[[], Framing]]] = {
    "application/vnd.amazon.eventstream": FrameReader
}
_NDJSON: Final[Mapping[str, Callable[[], Framing]]] = {"application/x-ndjson": LineReader}


class Dialect(NamedTuple):
    """What reads a wire format. `framings`: by content type of a stream, the usual one first."""

    read_request: Callable[[bytes | bytearray], RequestFacts]
    stream: Callable[[int, Framing], StreamParser] | None  # None: never streamed
    whole: Callable[[int], WholeParser]
    framings: Mapping[str, Callable[[], Framing]] = _SSE
    head_columns: Callable[[Mapping[bytes, str]], dict[str, Any]] | None = None


class Route(NamedTuple):
    """A path that tells the dialect, but for bodies that have all keys of another one's."""

    path_end: str
    dialect: str
    operation: str
    told_by_path: Callable[[str], dict[str, Any]] | None = None
    others: tuple[tuple[frozenset[str], str], ...] = ()

    def spoken(self, body: bytes | bytearray) -> str:
        """The dialect of a request. Raises: anything, where it must be looked at and cannot."""
        if self.others:
            keys = Body(body).raw.keys()
            return next((name for needed, name in self.others if needed <= keys), self.dialect)
        return self.dialect

    def told(self, endpoint: str) -> dict[str, Any]:
        """Columns that the path tells, whatever the body says."""
        return self.told_by_path(endpoint) if self.told_by_path else {}


DIALECTS: Final = {
    "openai.chat": Dialect(openai_request.read_chat, openai.Stream, openai.Whole),
    "openai.completions": Dialect(openai_request.read_completions, openai.Stream, openai.Whole),
    "openai.responses": Dialect(
        responses_request.read_responses, responses.Stream, responses.Whole
    ),
    "openai.embeddings": Dialect(embeddings.read_embeddings, None, embeddings.Whole),
    "rerank": Dialect(embeddings.read_rerank, None, embeddings.Whole),
    "sglang": Dialect(sglang.read_generate, sglang.Stream, sglang.Whole),
    "tgi": Dialect(tgi.read_generate, tgi.Stream, tgi.Whole, head_columns=tgi.head_columns),
    "triton": Dialect(triton.read_generate, triton.Stream, triton.Whole),
    "llama.cpp": Dialect(llama_cpp.read_completion, llama_cpp.Stream, llama_cpp.Whole),
    "bedrock.converse": Dialect(
        bedrock_request.read_converse, bedrock.ConverseStream, bedrock.ConverseWhole, _FRAMES
    ),
    "bedrock.invoke": Dialect(
        bedrock_request.read_invoke, bedrock.InvokeStream, bedrock.InvokeWhole, _FRAMES
    ),
    "anthropic": Dialect(anthropic_request.read_messages, anthropic.Stream, anthropic.Whole),
    "gemini": Dialect(
        gemini_request.read_generate_content,
        gemini.Stream,
        gemini.Whole,
        {**_SSE, "application/json": JsonArrayReader},
    ),
    "ollama.chat": Dialect(ollama_request.read_chat, ollama.Stream, ollama.Whole, _NDJSON),
    "ollama.generate": Dialect(ollama_request.read_generate, ollama.Stream, ollama.Whole, _NDJSON),
}
_GENERATE: Final = ((frozenset(("inputs",)), "tgi"), (frozenset(("text_input",)), "triton"))
# The first whose end fits is taken.
_ROUTES: Final = (
    Route("/chat/completions", "openai.chat", "chat"),
    Route(
        "/completions",
        "openai.completions",
        "text_completion",
        others=((frozenset(("prompt", "n_predict")), "llama.cpp"),),
    ),
    Route("/completion", "llama.cpp", "text_completion"),
    Route("/responses", "openai.responses", "chat"),
    Route("/embeddings", "openai.embeddings", "embeddings"),
    Route("/rerank", "rerank", "rerank"),
    Route("/api/chat", "ollama.chat", "chat"),
    Route("/api/generate", "ollama.generate", "text_completion"),
    Route(":generateContent", "gemini", "chat", gemini_request.told_by_path),
    Route(":streamGenerateContent", "gemini", "chat", gemini_request.told_by_path),
    Route("/generate", "sglang", "text_completion", triton.told_by_path, _GENERATE),
    Route("/generate_stream", "tgi", "text_completion", triton.told_by_path, _GENERATE[1:]),
    Route("/v1/messages", "anthropic", "chat"),
    Route("/converse", "bedrock.converse", "chat", bedrock_request.told_by_path),
    Route("/converse-stream", "bedrock.converse", "chat", bedrock_request.told_by_path),
    Route("/invoke", "bedrock.invoke", "chat", bedrock_request.told_by_path),
    Route("/invoke-with-response-stream", "bedrock.invoke", "chat", bedrock_request.told_by_path),
    # Hugging Face's client posts to where a model is served.
    Route("/", UNKNOWN, "text_completion", others=((frozenset(("inputs", "stream")), "tgi"),)),
)


def route_of(endpoint: str) -> Route | None:
    """The route of a request path, which may have a query."""
    path = endpoint.partition("?")[0].rstrip("/") or "/"
    return next((route for route in _ROUTES if path.endswith(route.path_end)), None)
