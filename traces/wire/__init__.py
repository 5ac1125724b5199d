"""Wire formats, sans-io: bytes and times in, events and row columns out.

Start at `reply.py` (what reading a reply is) and `openai.py` (a dialect). A further dialect is one
file: a request reader, a stream parser and a whole parser, entered in `_DIALECTS` below. Nothing
here may raise on foreign bytes, open a file or a socket, look at a clock, or let text through.
"""

from collections.abc import Callable
from typing import NamedTuple

from tokentape.traces.wire import openai, openai_request
from tokentape.traces.wire.reply import Reply, ReplyParser, StreamParser, UnreadParser, WholeParser
from tokentape.traces.wire.request import Prompt, RequestFacts

__all__ = [
    "Prompt",
    "Reply",
    "ReplyParser",
    "RequestFacts",
    "read_request",
    "reply_parser",
    "wire_format",
]

UNKNOWN = "unknown"


class _Dialect(NamedTuple):
    path_end: str
    operation: str
    read_request: Callable[[bytes | bytearray], RequestFacts]
    stream: Callable[[int], StreamParser]
    whole: Callable[[int], WholeParser]


# The first whose path_end fits is taken.
_DIALECTS = {
    "openai.chat": _Dialect(
        "/chat/completions", "chat", openai_request.read_chat, openai.Stream, openai.Whole
    ),
    "openai.completions": _Dialect(
        "/completions",
        "text_completion",
        openai_request.read_completions,
        openai.Stream,
        openai.Whole,
    ),
}


def wire_format(endpoint: str) -> str:
    """The dialect spoken at a request path: a key of `_DIALECTS`, or `unknown`."""
    path = endpoint.partition("?")[0].rstrip("/")
    return next((name for name, d in _DIALECTS.items() if path.endswith(d.path_end)), UNKNOWN)


def read_request(endpoint: str, body: bytes | bytearray) -> RequestFacts:
    """Columns and prompt of a request; what cannot be read is left out. Never raises."""
    name = wire_format(endpoint)
    if name == UNKNOWN:
        return RequestFacts({"wire_format": name})
    known = {"wire_format": name, "operation": _DIALECTS[name].operation}
    try:
        facts = _DIALECTS[name].read_request(body)
    except Exception:  # noqa: BLE001 - any body may come; the request is recorded all the same
        return RequestFacts(known | {"parse_status": "error"})
    facts.columns |= known
    return facts


def reply_parser(
    wire_format: str, stream: bool, status: int, content_type: str, content_encoding: str
) -> ReplyParser:
    """A parser for one reply.

    Args: stream: the request asked for one; the reply's content type decides where it tells,
    since servers answer a streamed request with a whole error. status: HTTP status.
    """
    if content_encoding.strip().lower() not in ("", "identity"):
        return UnreadParser(status, "encoded")
    dialect = _DIALECTS.get(wire_format)
    if dialect is None:
        return UnreadParser(status, "unknown_format")
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "text/event-stream":
        return dialect.stream(status)
    if kind.endswith("json") or not stream or status >= 400:
        return dialect.whole(status)
    return dialect.stream(status)
