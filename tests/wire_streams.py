"""One stream of every dialect, as its server sends it, for the tests that hold for all of them."""

import contextlib
import json
import struct
import threading
import zlib
from base64 import b64encode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, NamedTuple

import pyarrow as pa

from tokentape.traces import schema, wire
from tokentape.traces.wire.reply import Reply

SSE, JSON, NDJSON = "text/event-stream", "application/json", "application/x-ndjson"
EVENT_STREAM = "application/vnd.amazon.eventstream"


class Sample(NamedTuple):
    """`parts` are the messages of a complete stream; `events` are the classes of its events."""

    wire_format: str
    parts: list[bytes]
    events: list[int]
    kind: str = SSE


def sse(value: Any, event: str = "") -> bytes:
    data = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return (f"event: {event}\n" if event else "").encode() + f"data: {data}\n\n".encode()


def typed(*values: dict[str, Any]) -> list[bytes]:
    """Messages that are named by their `type`."""
    return [sse(value, value["type"]) for value in values]


def read(
    wire_format: str,
    parts: list[bytes],
    *,
    complete: bool = True,
    status: int = 200,
    kind: str = SSE,
    encoding: str = "",
    stream: bool = True,
    same_read: bool = False,
) -> Reply:
    """Part i comes with read i at the time 1000 + i, and the last one before 9000."""
    parser = wire.reply_parser(wire_format, stream, status, kind, encoding)
    for i, part in enumerate(parts):
        parser.feed(part, 1000 if same_read else 1000 + i, 0 if same_read else i)
    reply = parser.finish(9000, complete)
    fits_the_schema(reply)
    return reply


def fits_the_schema(reply: Reply) -> None:
    for name, value in reply.columns.items():
        assert value is not None, name
        pa.array([value], schema.BY_NAME[name].type)
    for name, values in {"ntok": reply.ntok, "cls": reply.cls, "choice": reply.choice}.items():
        pa.array([None if values is None else list(values)], schema.BY_NAME[name].type)
    assert len(reply.t_ns) == len(reply.ntok) == len(reply.cls)
    assert reply.choice is None or len(reply.choice) == len(reply.cls)
    assert len(reply.aux_t_ns) == len(reply.aux_cls)
    if reply.columns.get("ntok_source") in ("token_ids", "usage_cumulative", "usage_spread"):
        assert sum(reply.ntok) == reply.columns["output_tokens"]


def untimed(reply: Reply) -> dict[str, Any]:
    """All that does not depend on time."""
    return {
        "columns": reply.columns,
        "events": (list(reply.ntok), bytes(reply.cls), reply.choice and bytes(reply.choice)),
        "aux": bytes(reply.aux_cls),
        "end": (reply.stream_error, reply.done),
    }


@contextlib.contextmanager
def served(content: bytes, kind: str = SSE) -> Iterator[str]:
    """The URL of a loopback server that answers whatever is posted with `content`."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            self.send_response(200)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def _openai(delta: dict[str, Any], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return sse({"id": "c-1", "model": "m", "choices": [choice]})


OPENAI = Sample(
    "openai.chat",
    [
        _openai({"role": "assistant", "content": ""}),
        _openai({"reasoning_content": "hm"}),
        _openai({"content": " 你好😀"}),
        _openai({"content": " c"}, "length"),
        sse({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 5}}),
        sse("[DONE]"),
    ],
    [schema.REASONING, schema.TEXT, schema.TEXT],
)


def _block(index: int, **block: Any) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def _delta(index: int, **delta: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": delta}


ANTHROPIC = Sample(
    "anthropic",
    typed(
        {
            "type": "message_start",
            "message": {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "model": "claude-x",
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": {
                    "input_tokens": 10,
                    "cache_read_input_tokens": 100,
                    "cache_creation_input_tokens": 20,
                    "output_tokens": 1,
                },
            },
        },
        _block(0, type="thinking", thinking="", signature=""),
        _delta(0, type="thinking_delta", thinking="let me see"),
        _delta(0, type="signature_delta", signature="EqoBCkgIARAB"),
        {"type": "content_block_stop", "index": 0},
        {"type": "ping"},
        _block(1, type="text", text=""),
        _delta(1, type="text_delta", text="Grüße 😀"),
        _delta(1, type="text_delta", text=" and more"),
        {"type": "content_block_stop", "index": 1},
        _block(2, type="tool_use", id="toolu_1", name="get_weather", input={}),
        _delta(2, type="input_json_delta", partial_json=""),
        _delta(2, type="input_json_delta", partial_json='{"city": "Zürich"}'),
        {"type": "content_block_stop", "index": 2},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "tool_use", "stop_sequence": None},
            "usage": {"output_tokens": 30, "output_tokens_details": {"thinking_tokens": 12}},
        },
        {"type": "message_stop"},
    ),
    [schema.REASONING, schema.TEXT, schema.TEXT, schema.TOOL, schema.TOOL],
)

RESPONSE: dict[str, Any] = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1.0,
    "model": "gpt-x",
    "status": "in_progress",
    "error": None,
    "incomplete_details": None,
    "output": [],
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "usage": None,
}
RESPONSE_USAGE = {
    "input_tokens": 50,
    "input_tokens_details": {"cached_tokens": 32, "cache_write_tokens": 0},
    "output_tokens": 12,
    "output_tokens_details": {"reasoning_tokens": 4},
    "total_tokens": 62,
}


def numbered(*values: dict[str, Any]) -> list[bytes]:
    return typed(*({**value, "sequence_number": n} for n, value in enumerate(values)))


def _item(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": f"response.{kind}", "item_id": "i", "output_index": 0, **more}


_TEXT = {"content_index": 0, "logprobs": []}
_MESSAGE = {
    "id": "i",
    "type": "message",
    "role": "assistant",
    "status": "in_progress",
    "content": [],
}
_CALL = {"id": "f", "type": "function_call", "call_id": "c", "name": "get", "arguments": ""}
RESPONSES = Sample(
    "openai.responses",
    numbered(
        {"type": "response.created", "response": RESPONSE},
        {"type": "response.in_progress", "response": RESPONSE},
        _item("reasoning_text.delta", delta="let me see", content_index=0),
        _item("output_item.added", item=_MESSAGE),
        _item("output_text.delta", delta="Grüße 😀", **_TEXT),
        _item("output_text.delta", delta=" more", **_TEXT),
        _item("output_text.done", text="Grüße 😀 more", **_TEXT),
        _item("output_item.added", item=_CALL),
        _item("function_call_arguments.delta", delta='{"city": "Zürich"}'),
        {
            "type": "response.completed",
            "response": {**RESPONSE, "status": "completed", "usage": RESPONSE_USAGE},
        },
    ),
    [schema.REASONING, schema.TEXT, schema.TEXT, schema.TOOL, schema.TOOL],
)


def sglang(text: str, count: int, finish: Any = None, **more: Any) -> bytes:
    meta = {
        "id": "s-1",
        "finish_reason": finish,
        "prompt_tokens": 9,
        "completion_tokens": count,
        "cached_tokens": 4,
        "queue_time": 0.25,
    }
    return sse({"text": text, "output_ids": [1], "meta_info": meta, **more})


SGLANG = Sample(
    "sglang",
    [
        sglang("Grüße 😀", 2),
        sglang("Grüße 😀 a", 3),
        sglang("Grüße 😀 a", 4),  # a token that leaves no text
        sglang("Grüße 😀 a bc", 7),
        sglang("Grüße 😀 a bc", 7, {"type": "length", "length": 7}),
        sse("[DONE]"),
    ],
    [schema.TEXT, schema.TEXT, schema.EMPTY, schema.TEXT],
)


def gemini(parts: list[dict[str, Any]], usage: dict[str, int], finish: str = "") -> dict[str, Any]:
    """A message of streamGenerateContent."""
    candidate: dict[str, Any] = {"content": {"parts": parts, "role": "model"}, "index": 0}
    if finish:
        candidate["finishReason"] = finish
    return {
        "candidates": [candidate],
        "usageMetadata": {"promptTokenCount": 40, **usage},
        "modelVersion": "gemini-x",
        "responseId": "r-1",
    }


GEMINI_MESSAGES = [
    gemini([{"text": "let me see", "thought": True}], {"thoughtsTokenCount": 6}),
    gemini([{"text": "Grüße 😀"}], {"thoughtsTokenCount": 6, "candidatesTokenCount": 3}),
    gemini([{"text": ' a "quoted\\" {b'}], {"thoughtsTokenCount": 6, "candidatesTokenCount": 9}),
    gemini(
        [{"functionCall": {"name": "get", "args": {"city": "Zürich"}}, "thoughtSignature": "RXFv"}],
        {
            "thoughtsTokenCount": 6,
            "candidatesTokenCount": 15,
            "cachedContentTokenCount": 32,
            "totalTokenCount": 61,
        },
        "STOP",
    ),
]
_GEMINI_EVENTS = [schema.REASONING, schema.TEXT, schema.TEXT, schema.TOOL]
GEMINI = Sample("gemini", [sse(message) for message in GEMINI_MESSAGES], _GEMINI_EVENTS)


def array_of(messages: list[Any]) -> list[bytes]:
    """One growing JSON array, as Google's servers indent it."""
    texts = [json.dumps(m, indent=2, ensure_ascii=False).encode() for m in messages]
    return [(b"[" if n == 0 else b",\r\n") + text for n, text in enumerate(texts)] + [b"]\n"]


GEMINI_ARRAY = Sample("gemini", array_of(GEMINI_MESSAGES), _GEMINI_EVENTS, JSON)


def line(**value: Any) -> bytes:
    """A line of Ollama."""
    told = {"model": "gemma", "created_at": "2026-10-26T17:15:24.097767Z", "done": False, **value}
    return json.dumps(told, ensure_ascii=False).encode() + b"\n"


OLLAMA_END: dict[str, Any] = {
    "done": True,
    "done_reason": "stop",
    "total_duration": 9_000_000_000,
    "load_duration": 2_000_000_000,
    "prompt_eval_count": 26,
    "prompt_eval_cached_count": 16,
    "prompt_eval_duration": 130_079_000,
    "eval_count": 7,
    "eval_duration": 1_504_000_000,
}
_CALL_OF = {"function": {"name": "get", "arguments": {"city": "Zürich"}}}
OLLAMA_CHAT = Sample(
    "ollama.chat",
    [
        line(message={"role": "assistant", "content": "", "thinking": "let me see"}),
        line(message={"role": "assistant", "content": "Grüße 😀"}),
        line(message={"role": "assistant", "content": " more"}),
        line(message={"role": "assistant", "content": "", "tool_calls": [_CALL_OF]}),
        line(message={"role": "assistant", "content": ""}, **OLLAMA_END),
    ],
    [schema.REASONING, schema.TEXT, schema.TEXT, schema.TOOL, schema.EMPTY],
    NDJSON,
)
OLLAMA_GENERATE = Sample(
    "ollama.generate",
    [
        line(response="", thinking="let me see"),
        line(response="Grüße 😀"),
        line(response=" more"),
        line(response="", context=[1, 2, 3], **OLLAMA_END),
    ],
    [schema.REASONING, schema.TEXT, schema.TEXT, schema.EMPTY],  # the end stands for a token
    NDJSON,
)


def tgi(text: str, number: int = 5, *, special: bool = False, details: Any = None) -> bytes:
    """A message of text-generation-inference."""
    token = {"id": number, "text": text, "logprob": -0.5, "special": special}
    whole = "Grüße 😀 more" if details else None
    return sse({"index": 1, "token": token, "generated_text": whole, "details": details})


TGI_DETAILS = {"finish_reason": "eos_token", "generated_tokens": 4, "seed": 7, "input_length": 31}
TGI = Sample(
    "tgi",
    [
        tgi("Grüße"),
        tgi(" 😀"),
        tgi(" more"),
        tgi("</s>", 2, special=True, details=TGI_DETAILS),
    ],
    [schema.TEXT, schema.TEXT, schema.TEXT, schema.EMPTY],
)


def llama_cpp(content: str, predicted: int, **more: Any) -> bytes:
    """A message of llama.cpp's own completion."""
    told = {"tokens_predicted": predicted, "tokens_evaluated": 20, **more}
    return sse({"index": 0, "content": content, "tokens": [], "stop": False, "id_slot": 0, **told})


LLAMA_CPP_END: dict[str, Any] = {
    "stop": True,
    "model": "llama",
    "generation_settings": {"n_predict": 6, "temperature": 0.8},
    "prompt": "let me see",
    "stop_type": "limit",
    "tokens_cached": 25,
    "timings": {
        "cache_n": 16,
        "prompt_n": 4,
        "prompt_ms": 12.5,
        "predicted_n": 6,
        "predicted_ms": 90.25,
    },
}
LLAMA_CPP = Sample(
    "llama.cpp",
    [
        sse({"index": 0, "content": "", "prompt_progress": {"total": 20, "processed": 8}}),
        llama_cpp("Grüße", 1),
        llama_cpp(" 😀", 3),
        llama_cpp("", 4),  # a token that leaves no text
        llama_cpp(" more", 6),
        llama_cpp("", 6, **LLAMA_CPP_END),
    ],
    [schema.TEXT, schema.TEXT, schema.EMPTY, schema.TEXT],
)


def triton(text: Any, **more: Any) -> bytes:
    """A message of Triton's generate extension."""
    return sse({"model_name": "ensemble", "model_version": "1", "text_output": text, **more})


TRITON = Sample(
    "triton",
    [
        triton("Grüße", num_output_tokens=2, num_input_tokens=9, finish_reason=None),
        triton(" 😀", num_output_tokens=1, num_input_tokens=9, finish_reason=None),
        triton("", num_output_tokens=1, num_input_tokens=9, finish_reason=None),
        triton(" more", num_output_tokens=3, num_input_tokens=9, finish_reason="length"),
    ],
    [schema.TEXT, schema.TEXT, schema.EMPTY, schema.TEXT],
)


def framed(payload: dict[str, Any] | bytes, /, **headers: str) -> bytes:
    """A message of Amazon's event stream; `event_type` stands for the header `:event-type`."""
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    named = b"".join(
        struct.pack(">B", len(key) + 1)
        + b":"
        + key.replace("_", "-").encode()
        + struct.pack(">BH", 7, len(value))
        + value.encode()
        for key, value in headers.items()
    )
    head = struct.pack(">II", 16 + len(named) + len(data), len(named))
    frame = head + struct.pack(">I", zlib.crc32(head)) + named + data
    return frame + struct.pack(">I", zlib.crc32(frame))


def converse(kind: str, **payload: Any) -> bytes:
    """An event of ConverseStream."""
    more = {"content_type": "application/json", "message_type": "event"}
    return framed(payload | {"p": "abcd"}, event_type=kind, **more)


_LET_ME_SEE = {"reasoningContent": {"text": "let me see"}}
_USE = {"toolUse": {"toolUseId": "t", "name": "get_weather"}}
CONVERSE = Sample(
    "bedrock.converse",
    [
        converse("messageStart", role="assistant"),
        converse("contentBlockDelta", contentBlockIndex=0, delta=_LET_ME_SEE),
        converse("contentBlockStop", contentBlockIndex=0),
        converse("contentBlockDelta", contentBlockIndex=1, delta={"text": "Grüße 😀"}),
        converse("contentBlockDelta", contentBlockIndex=1, delta={"text": " more"}),
        converse("contentBlockStart", contentBlockIndex=2, start=_USE),
        converse("contentBlockDelta", contentBlockIndex=2, delta={"toolUse": {"input": "{}"}}),
        converse("messageStop", stopReason="tool_use"),
        converse(
            "metadata",
            usage={
                "inputTokens": 10,
                "cacheReadInputTokens": 100,
                "cacheWriteInputTokens": 20,
                "outputTokens": 30,
                "totalTokens": 160,
            },
            metrics={"latencyMs": 812},
        ),
    ],
    [schema.REASONING, schema.TEXT, schema.TEXT, schema.TOOL, schema.TOOL],
    EVENT_STREAM,
)


def invoked(said: dict[str, Any]) -> bytes:
    """A chunk of InvokeModelWithResponseStream."""
    more = {"content_type": "application/json", "message_type": "event"}
    text = b64encode(json.dumps(said).encode()).decode()
    return framed({"bytes": text, "p": "abcd"}, event_type="chunk", **more)


INVOCATION = {
    "inputTokenCount": 10,
    "outputTokenCount": 30,
    "invocationLatency": 812,
    "firstByteLatency": 93,
}
_ANTHROPIC_SAID = [json.loads(part.split(b"data: ", 1)[1]) for part in ANTHROPIC.parts]
INVOKE = Sample(
    "bedrock.invoke",
    [
        *(invoked(said) for said in _ANTHROPIC_SAID[:-1]),
        invoked(_ANTHROPIC_SAID[-1] | {"amazon-bedrock-invocationMetrics": INVOCATION}),
    ],
    ANTHROPIC.events,
    EVENT_STREAM,
)
INVOKE_LLAMA = Sample(
    "bedrock.invoke",
    [
        invoked({"generation": "Gr", "prompt_token_count": 9, "generation_token_count": 2}),
        invoked({"generation": "üße 😀", "generation_token_count": 5}),
        invoked({"generation": "", "generation_token_count": 6, "stop_reason": None}),
        invoked(
            {
                "generation": "",
                "generation_token_count": 6,
                "stop_reason": "stop",
                "amazon-bedrock-invocationMetrics": INVOCATION,
            }
        ),
    ],
    [schema.TEXT, schema.TEXT, schema.EMPTY],
    EVENT_STREAM,
)

SAMPLES = {
    "openai": OPENAI,
    "responses": RESPONSES,
    "anthropic": ANTHROPIC,
    "sglang": SGLANG,
    "gemini": GEMINI,
    "gemini array": GEMINI_ARRAY,
    "ollama chat": OLLAMA_CHAT,
    "ollama generate": OLLAMA_GENERATE,
    "tgi": TGI,
    "llama.cpp": LLAMA_CPP,
    "triton": TRITON,
    "bedrock converse": CONVERSE,
    "bedrock invoke": INVOKE,
    "bedrock invoke llama": INVOKE_LLAMA,
}
