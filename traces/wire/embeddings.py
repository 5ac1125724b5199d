"""Embeddings and rerank: requests, and replies that are one body without any output tokens.

Speaks OpenAI's form, and rerank as Cohere, Jina and vLLM have it. Vectors and scores are skipped
over, never decoded. Source of the counts: vLLM, `entrypoints/pooling/scoring/protocol.py` (prompt
and total); cohere-python, `types/api_meta.py` (tokens; its `billed_units` are what is billed, not
what was processed). For Jina's total alone no primary source was found.
"""

from typing import Any, Final

import msgspec

from tokentape.traces.wire import untrusted
from tokentape.traces.wire.objects import name_reply, take_usage
from tokentape.traces.wire.reply import WholeParser
from tokentape.traces.wire.request import Prompt, RequestFacts
from tokentape.traces.wire.request_body import Body, Reading, columns_of, extra_json, known, utf8

_VALUES: Final = {"model_requested": ("model", untrusted.label)}
_EMBEDDINGS: Final = Reading(
    _VALUES,
    told=frozenset(("input",)),
    scalars=frozenset(("dimensions", "truncate_prompt_tokens")),
    words={"encoding_format": ("float", "base64")},
)
_RERANK: Final = Reading(
    _VALUES, scalars=frozenset(("top_n", "return_documents", "max_tokens_per_doc"))
)


def read_embeddings(data: bytes | bytearray) -> RequestFacts:
    """Facts of a request. Raises: anything, where the body is no JSON object."""
    body = Body(data)
    asked = body.get("input")
    tokens = isinstance(asked, list) and bool(asked) and all(type(i) is int for i in asked)
    several = isinstance(asked, list) and not tokens and len(asked) > 1
    columns = columns_of(body, _EMBEDDINGS)
    extra = {"prompt_count": len(asked)} if several else {}
    columns["extra"] = extra_json(body, _EMBEDDINGS, extra)
    if isinstance(asked, list) and len(asked) == 1 and not tokens:
        asked = asked[0]
    if isinstance(asked, str):
        return RequestFacts(known(columns), Prompt(text=b"".join(utf8(asked))))
    return RequestFacts(known(columns), Prompt(tokens=asked) if tokens else None)


def read_rerank(data: bytes | bytearray) -> RequestFacts:
    """Facts of a request. Raises: anything, where the body is no JSON object."""
    body = Body(data)
    documents = body.get("documents")
    columns = columns_of(body, _RERANK)
    extra = {"prompt_count": len(documents)} if isinstance(documents, list) else {}
    columns["extra"] = extra_json(body, _RERANK, extra)
    return RequestFacts(known(columns))


class _Reply(msgspec.Struct, gc=False):
    """The keys that are read; each may hold anything."""

    id: Any = None
    model: Any = None
    usage: Any = None
    meta: Any = None  # Cohere's place for counts
    error: Any = None
    object: Any = None
    type: Any = None
    code: Any = None
    data: msgspec.Raw = msgspec.Raw()
    results: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(_Reply).decode


class Whole(WholeParser):
    """The reply, or an error body."""

    def _body(self, data: bytes) -> bool:
        reply, facts = _decode(data), self.facts
        if reply.error or reply.object == "error":
            told = reply.error or {"type": reply.type, "code": reply.code}
            facts.error, facts.error_type = True, untrusted.error_type(told)
            return True
        name_reply(facts, reply.model, reply.id)
        usage = reply.usage if isinstance(reply.usage, dict) else reply.meta
        take_usage(facts, usage, _counts(usage))
        return bool(reply.data or reply.results) or self._http_status >= 400


def _counts(usage: Any) -> dict[str, int]:
    """The prompt's tokens; Jina tells the total only, which is the same here."""
    for place in (("prompt_tokens",), ("total_tokens",), ("tokens", "input_tokens")):
        if found := untrusted.counts(usage, {"input_tokens": place}):
            return found
    return {}
