"""One request on the wire: its stamps, how it ended, and when its client gives up or leaves."""

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Protocol

from tokentape.traces.blocks import NO_STAMP
from tokentape.traces.wire import ReplyParser, reply_parser

ABORTED = "client_abort"
PLANNED = "planned_abort"  # error_type of a request that was left as its recorded client left


class Reply(Protocol):
    """Where a reply's head and body go; traces' Recorder is one."""

    def reply_head(
        self,
        stream: int,
        t_ns: int,
        status: int,
        headers: list[tuple[bytes, bytes]],
        lag_us: int = NO_STAMP,
    ) -> None:
        """Status and headers of the reply."""

    def reply_data(self, stream: int, t_ns: int, data: bytes, lag_us: int = NO_STAMP) -> None:
        """A piece of the body; pieces of one read share its stamp."""


class Exchange:
    """One request on the wire. The transport fills in the stamps (monotonic ns; 0 is never)."""

    __slots__ = (
        "acked_ns",
        "conn_id",
        "connect_ns",
        "deadline",
        "end_ns",
        "error_type",
        "first_ns",
        "head_ns",
        "kernel_send_ns",
        "late_first",
        "leave_events",
        "left",
        "outcome",
        "parser",
        "recorder",
        "release_ns",
        "reused",
        "send_end_ns",
        "send_ns",
        "status",
        "stream",
        "timers",
        "wire_format",
    )

    def __init__(self, recorder: Reply) -> None:
        self.recorder = recorder
        self.stream: int | None = None
        self.release_ns = 0  # when it was let go; its connection may be ready long before
        self.deadline: asyncio.Timeout | None = None
        self.connect_ns: int | None = None  # None: a connection was waiting
        self.timers: list[asyncio.TimerHandle] = []  # that may end it early
        self.late_first = False
        self.leave_events = 0  # after so many the client leaves; 0: it stays
        self.left = False
        self.wire_format = ""
        self.parser: ReplyParser | None = None  # counts the events, where they are to be counted
        self.send_ns = self.send_end_ns = self.head_ns = self.first_ns = self.end_ns = 0
        self.kernel_send_ns = self.acked_ns = 0
        self.status = 0
        self.conn_id: int | None = None
        self.reused = False
        self.outcome = "cut"
        self.error_type: str | None = None

    def give_up(self) -> None:
        """End it as a client does that waits no longer for the first byte of a body."""
        if self.deadline is None or self.first_ns or self.end_ns:
            return
        with contextlib.suppress(RuntimeError):  # it is ending already
            self.deadline.reschedule(0)
            self.late_first = True

    def count_from(self, status: int, headers: Mapping[str, str]) -> None:
        """The head of a reply is there whose events are counted as the tape counts them."""
        media = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        coding = headers.get("Content-Encoding", "")
        self.parser = reply_parser(self.wire_format, True, status, media, coding)

    def count(self, data: bytes, read_ns: int) -> None:
        """Leave where the last event that the client waited for is in these bytes.

        Reads what they say, some 10 us an event: for requests that are left early only.
        """
        if self.parser is not None:
            self.parser.feed(data, read_ns, read_ns)
            if len(self.parser.t_ns) >= self.leave_events:
                self.leave()

    def leave(self) -> None:
        """End it as its recorded client did, if it has not ended."""
        if self.deadline is None or self.end_ns or self.left:
            return
        with contextlib.suppress(RuntimeError):  # it is ending already
            self.deadline.reschedule(0)
            self.left = True

    def left_early(self) -> None:
        """Its end is that of a client that left, as planned."""
        self.outcome, self.error_type = ABORTED, PLANNED
