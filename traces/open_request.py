"""A request while it runs, in the writer process, and how the next writer process goes on with it.

The journal holds what a successor needs: the row so far, the events so far, and a `State`. All has
passed the privacy mode, so no text is in it: what a parser held of an unfinished message, and a
body that was not parsed yet, end with the process that held them. Both are counted.
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from tokentape.traces.chunked import ChunkDecoder
from tokentape.traces.content import Bodies
from tokentape.traces.schema import INSTANTS
from tokentape.traces.turns import Turn
from tokentape.traces.wire import ReplyParser, reply_parser
from tokentape.traces.wire.reply import Progress, StreamParser, UnreadParser

# Only these words of a server reach the journal; anything else is as good as none.
_MEDIA = ("text/event-stream", "application/json", "application/x-ndjson", "text/plain")
NO_FRAMING, LOST_PLACE = -2, -1  # in place of the bytes until the next size line


class State(msgspec.Struct, array_like=True, gc=False):
    """What is known of an open request beside its row and its events."""

    media: str | None  # type of the reply; None before its head
    reads_body: bool
    body_bytes: int
    reply_bytes: int
    lag_max_us: int
    stamps_missing: bool
    place: int  # see NO_FRAMING
    beyond: int
    missed: int
    parse_status: str | None
    progress: Progress | None  # of a reply that is read as a stream
    coding: str = ""  # of the request's body
    root: int | None = None  # see Turn


@dataclass
class Unfinished:
    """A request that was open when its writer died: its row in tape time, events as journaled."""

    row: dict[str, Any]
    events: list[Any] | None = None  # the arrays of journal.EVENT_LISTS
    state: State | None = None


class OpenRequest:
    """What is known of one request while it runs; times are monotonic ns until the row is made."""

    __slots__ = (
        "beyond",
        "bodies",
        "body",
        "body_bytes",
        "coding",
        "framing",
        "journaled",
        "lag_max_us",
        "last_ns",
        "media",
        "missed",
        "parser",
        "read",
        "reply_bytes",
        "row",
        "stamps_missing",
        "state",
        "turn",
    )

    def __init__(self, row: dict[str, Any]) -> None:
        self.row = row
        self.body: bytearray | None = bytearray()
        self.body_bytes = 0
        self.coding = ""  # content-encoding of the request's body
        self.media: str | None = None
        self.parser: ReplyParser | None = None
        self.read = 0
        self.last_ns = 0
        self.reply_bytes = 0
        self.framing: ChunkDecoder | None = None
        self.lag_max_us = -1  # of the reads that the kernel stamped
        self.stamps_missing = False  # a read of the reply has the process's own stamp
        self.journaled = (0, 0)
        self.state: State | None = None  # as journaled last
        self.beyond = 0  # pieces of the reply that came after MAX_EVENTS
        self.bodies: Bodies | None = None  # bodies, in the mode full
        self.turn: Turn | None = None  # of a request whose head was seen
        self.missed = 0  # messages that a dead writer held a part of

    def read_reply_as(self, content_type: str) -> None:
        """Choose the reply's parser, by its head and by what the request asked for."""
        row = self.row
        media = content_type.partition(";")[0].strip().lower()
        self.media = media if media in _MEDIA else "+json" if media.endswith("json") else ""
        self.parser = reply_parser(
            row.get("wire_format") or "unknown",
            bool(row.get("stream")),
            row.get("http_status") or 0,
            media,
            row.get("content_encoding") or "",
        )

    def changed_state(self) -> State | None:
        """The state, if it is not the one that was journaled last."""
        state = self.current_state()
        if state == self.state:
            return None
        self.state = state
        return state

    def current_state(self) -> State:
        """What a successor must know."""
        place: int | None = NO_FRAMING if self.framing is None else self.framing.place
        return State(
            self.media,
            self.body is not None,
            self.body_bytes,
            self.reply_bytes,
            self.lag_max_us,
            self.stamps_missing,
            LOST_PLACE if place is None else place,
            self.beyond,
            self.missed,
            self.row.get("parse_status"),
            self.parser.progress if isinstance(self.parser, StreamParser) else None,
            self.coding,
            self.turn.root if self.turn is not None else None,
        )

    @classmethod
    def resume(cls, left: Unfinished, offset_ns: int) -> "OpenRequest":
        """Go on with a request that another process had, whose clock added `offset_ns`."""
        row = dict(left.row)
        for name in INSTANTS:
            if row.get(name) is not None:
                row[name] -= offset_ns
        request = cls(row)
        state = left.state
        request.turn = _turn_of(row, state)
        if state is None:  # nothing came after its first record
            return request
        request.body_bytes, request.reply_bytes = state.body_bytes, state.reply_bytes
        request.lag_max_us, request.stamps_missing = state.lag_max_us, state.stamps_missing
        request.beyond, request.missed = state.beyond, state.missed
        request.coding = state.coding
        if state.parse_status is not None:
            request.row["parse_status"] = state.parse_status
        if not state.reads_body or state.body_bytes:
            request.body = None
            if state.reads_body:  # half of it came, and is gone
                request.row["parse_status"] = "partial"
        if state.place != NO_FRAMING:
            request.framing = ChunkDecoder.resume(None if state.place < 0 else state.place)
        if state.media is not None:
            request._resume_reply(state, left.events, offset_ns)
        return request

    def _resume_reply(self, state: State, events: list[Any] | None, offset_ns: int) -> None:
        self.read_reply_as(state.media or "")
        row, parser = self.row, self.parser
        if isinstance(parser, StreamParser) and state.progress is not None:
            arrays = list(events or [[]] * 6)
            for at in (0, 4):  # times, and those of messages that are no events
                arrays[at] = [t_ns - offset_ns for t_ns in arrays[at]]
            parser.resume(state.progress, arrays, self.reply_bytes)
            parser.facts.model, parser.facts.response_id = row.get("model"), row.get("response_id")
            self.read, self.last_ns = parser.events.read, max([0, *arrays[0], *arrays[4]])
            lost = bool(state.progress.place) or state.place == LOST_PLACE
            if parser.decoder is not None and self.reply_bytes:  # its window held text
                parser.decoder.lose_place()
                lost = lost or not state.progress.end_mark
            self.missed += lost
        elif self.reply_bytes and not isinstance(parser, UnreadParser):
            self.parser = UnreadParser(row.get("http_status") or 0, "partial")
        if isinstance(self.parser, UnreadParser):
            self.parser.body_bytes = self.reply_bytes
        if self.parser is not None:
            self.journaled = (len(self.parser.t_ns), len(self.parser.aux_t_ns))


def _turn_of(row: dict[str, Any], state: State | None) -> Turn | None:
    """What is left of a request's place in its session; a replay's rows know their own."""
    if "source_request_id" in row:
        return None
    if row.get("session_source"):
        return Turn(row["session_id"], row["session_source"])
    return Turn(root=state.root) if state is not None and state.root is not None else None
