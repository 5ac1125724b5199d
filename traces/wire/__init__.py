"""Wire formats, sans-io: bytes and times in, events and row columns out.

Start at `reply.py` (what reading a reply is), `objects.py` and `anthropic.py` (a dialect). A
further dialect is one file (a stream parser and a whole parser) and a request reader, entered in
`dialects.py`. Nothing here may raise on foreign bytes, open a file or a socket, look at a clock, or
let text through.
"""

from collections.abc import Mapping
from typing import Any

from tokentape.traces.wire.dialects import DIALECTS, UNKNOWN, route_of
from tokentape.traces.wire.encoding import CODINGS, Decoder, coding_of
from tokentape.traces.wire.reply import Reply, ReplyParser, UnreadParser
from tokentape.traces.wire.request import Prompt, RequestFacts

__all__ = [
    "Prompt",
    "Reply",
    "ReplyParser",
    "RequestFacts",
    "head_columns",
    "read_request",
    "reply_parser",
    "wire_format",
]


def wire_format(endpoint: str) -> str:
    """The dialect spoken at a request path: a key of `DIALECTS`, or `unknown`."""
    route = route_of(endpoint)
    return UNKNOWN if route is None else route.dialect


def read_request(endpoint: str, body: bytes | bytearray) -> RequestFacts:
    """Columns and prompt of a request; what cannot be read is left out. Never raises."""
    route = route_of(endpoint)
    if route is None:
        return RequestFacts({"wire_format": UNKNOWN})
    known = {"wire_format": route.dialect, "operation": route.operation} | route.told(endpoint)
    try:
        known["wire_format"] = spoken = route.spoken(body)
        if spoken == UNKNOWN:
            return RequestFacts({"wire_format": UNKNOWN})
        facts = DIALECTS[spoken].read_request(body)
    except Exception:  # noqa: BLE001 - any body may come; the request is recorded all the same
        return RequestFacts(known | {"parse_status": "error"})
    facts.columns = known | facts.columns  # a body may tell that the path misled
    return facts


def head_columns(wire_format: str, headers: Mapping[bytes, str]) -> dict[str, Any]:
    """Columns that a reply's head tells; headers are values by lower-case name."""
    dialect = DIALECTS.get(wire_format)
    if dialect is None or dialect.head_columns is None:
        return {}
    return dialect.head_columns(headers)


def reply_parser(
    wire_format: str, stream: bool, status: int, content_type: str, content_encoding: str
) -> ReplyParser:
    """A parser for one reply.

    Args: stream: the request asked for one; the reply's content type decides where it tells,
    since servers answer a streamed request with a whole error. status: HTTP status.
    """
    coding = coding_of(content_encoding)
    if coding and coding not in CODINGS:
        return UnreadParser(status, "encoded")
    parser = _parser(wire_format, stream, status, content_type)
    if coding:
        parser.decoder = Decoder(coding)
    return parser


def _parser(wire_format: str, stream: bool, status: int, content_type: str) -> ReplyParser:
    dialect = DIALECTS.get(wire_format)
    if dialect is None:
        return UnreadParser(status, "unknown_format")
    if dialect.stream is None:
        return dialect.whole(status)
    kind = content_type.partition(";")[0].strip().lower()
    framing = dialect.framings.get(kind)
    json = kind.endswith("json") and not kind.endswith("ndjson")
    if framing is not None and not (json and (not stream or status >= 400)):
        return dialect.stream(status, framing())
    if json or not stream or status >= 400:
        return dialect.whole(status)
    return dialect.stream(status, next(iter(dialect.framings.values()))())
