"""The hot side of recording: raw bytes and stamps into flat buffers, and on to the writer process.

Used by proxy and replay alike. No call raises, waits or parses: when the writer stalls, memory is
bounded, then event detail is dropped, then whole requests, and each drop is counted. The writer
(`writer_process.py`) is a separate niced process that outlives this one until all is sealed.
"""

import asyncio
import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from tokentape.traces import blocks, retry_after
from tokentape.traces import facts as tape_facts
from tokentape.traces.errors import TapeError
from tokentape.traces.lives import Past, Summary
from tokentape.traces.words import SESSION_HEADERS
from tokentape.traces.writer_life import WriterLife

FLUSH_EVERY_S = 0.1
# What may wait for a stalled writer: beyond it detail is dropped, beyond twice rows.
MEMORY_BYTES = 64 << 20
STREAM_BYTES = 8 << 20  # of one stream meanwhile: a flood must not cost the others their detail
FINISH_TIMEOUT_S = 120.0
MAX_DEATHS = 5  # of writers in a row that did nothing, before no more is recorded
MAX_VALUE_BYTES = 8192  # of a header or a path
READ_HEADERS = frozenset(
    {
        b"authorization",
        b"x-api-key",
        b"api-key",
        b"x-goog-api-key",
        b"traceparent",
        b"content-type",
        b"content-encoding",
        *retry_after.NAMES,
        *SESSION_HEADERS,
        b"x-queue-time",  # these two by `wire/tgi.py`
        b"x-inference-time",
    }
)
_LARGEST_PAYLOAD = blocks.SLOT_BYTES - blocks.RECORD.size
_encode = msgspec.msgpack.Encoder().encode
_pack_into = blocks.RECORD.pack_into
_RECORD_BYTES = blocks.RECORD.size


def say(line: str) -> None:
    """Trouble, told on stderr if anybody still reads it."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"tokentape: {line}\n")


class Recorder:
    """Records requests as streams of raw pieces; a stream number of 0 means not recorded."""

    def __init__(
        self,
        tape: Path,
        lock_fd: int,
        hello: dict[str, Any],
        on_trouble: Callable[[str], None] = say,
    ) -> None:
        """A recorder on a tape whose lock is held; it takes over `lock_fd`.

        `hello` is what the writer must know: worker, content, key, fsync; content_key where bodies
        are encrypted; what of a capture is kept (`keep.py`), session headers beside the known ones,
        and the clock's anchor where several processes share one. TapeError when it does not start.
        """
        self.tape = tape
        self._lock_fd = lock_fd
        self._hello = hello
        self._read_headers = READ_HEADERS.union(map(str.encode, hello.get("session_headers", ())))
        self._on_trouble = on_trouble
        self._waiting: deque[bytearray] = deque()
        self._waiting_bytes = 0
        self._streams = 0
        self._dropped: dict[int, int] = {}
        self._paused = self._shedding = self._given_up = False  # shedding: details are dropped
        self._careful = False  # something waits: each stream may have its share
        self._held: dict[int, int] = {}  # bytes of each stream since something waits
        self.losses: dict[str, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._past = Past()
        self._dead: WriterLife | None = None
        self._ancestors: dict[str, int] = {}  # see `inherit.py`
        self._deaths = 0  # of writers in a row that confirmed nothing
        self._life = WriterLife(tape, lock_fd, hello, on_trouble)
        self.incarnations = [self._life.incarnation]
        if not self._life.wait_ready():
            code = self._life.process.wait()
            raise TapeError(f"{tape}: the writer process did not start (exit {code})")
        self._counters = self._life.counters
        # Records are packed straight into a free slot; into a bytearray while there is none.
        self._block: Any = bytearray()
        self._begin = self._at = self._end = 0

    @classmethod
    def start(
        cls,
        tape: Path,
        *,
        content: str = "structure",
        key: bytes = b"",
        worker: str = "w0",
        fsync: bool = False,
        on_trouble: Callable[[str], None] = say,
        **about: Any,
    ) -> "Recorder":
        """A recorder on a new tape, or on an old one: the arguments of `make_ready` and these.

        TapeError when the tape cannot be written.
        """
        from tokentape.traces.prepare import make_ready

        lock_fd = make_ready(tape, content=content, **about)
        hello = {"worker": worker, "content": content, "key": key.hex(), "fsync": fsync}
        return cls(tape, lock_fd, hello, on_trouble)

    # -- the hot path ---------------------------------------------------------------------------
    # `lag_us` is how late this process read what the kernel had stamped with `t_ns`; NO_STAMP says
    # that the stamp is the process's own. Data may be any buffer; it is copied here.

    def open(
        self,
        t_ns: int,
        row: dict[str, Any],
        head: tuple[bytes, bytes, list[tuple[bytes, bytes]]] | None = None,
        lag_us: int = blocks.NO_STAMP,
    ) -> int:
        """Begin a request: ready columns, and the raw head (method, target, headers) to be read."""
        if self._paused or self._given_up or self._waiting_bytes > 2 * MEMORY_BYTES:
            self._lose(self._why_not())
            return 0
        self._streams += 1
        self._counters[blocks.OPENED] += 1
        if head is not None:
            method, target, headers = head
            head = (method[:32], target[:MAX_VALUE_BYTES], self._read_later(headers))
        self._put(blocks.OPEN, self._streams, t_ns, lag_us, _encode([row, head]))
        return self._streams

    def request_body(
        self, stream: int, t_ns: int, data: bytes, lag_us: int = blocks.NO_STAMP
    ) -> None:
        """A piece of the client's request body."""
        self._data(blocks.REQUEST_BODY, stream, t_ns, lag_us, data)

    def mark(self, stream: int, column: str, t_ns: int, lag_us: int = blocks.NO_STAMP) -> None:
        """Stamp an instant column of an open request."""
        if stream:
            self._put(blocks.MARK, stream, t_ns, lag_us, column.encode())

    def reply_head(
        self,
        stream: int,
        t_ns: int,
        status: int,
        headers: list[tuple[bytes, bytes]],
        lag_us: int = blocks.NO_STAMP,
    ) -> None:
        """The reply's status and headers."""
        if stream:
            payload = _encode([status, self._read_later(headers)])
            self._put(blocks.REPLY_HEAD, stream, t_ns, lag_us, payload)

    def reply_data(
        self, stream: int, t_ns: int, data: bytes, lag_us: int = blocks.NO_STAMP
    ) -> None:
        """A piece of the reply's body without transfer framing; parts of a read share a stamp."""
        self._data(blocks.REPLY_DATA, stream, t_ns, lag_us, data)

    def reply_chunked(
        self, stream: int, t_ns: int, data: bytes | memoryview, lag_us: int = blocks.NO_STAMP
    ) -> None:
        """A piece of the reply's body with its chunk framing."""
        size = len(data)
        at = self._at
        body = at + _RECORD_BYTES
        end = body + size
        if end > self._end or self._careful or not stream:
            self._data(blocks.REPLY_CHUNKED, stream, t_ns, lag_us, data)
            return
        _pack_into(self._block, at, blocks.REPLY_CHUNKED, stream, t_ns, lag_us, size)
        self._block[body:end] = data
        self._at = end
        counters = self._counters
        counters[blocks.READS] += 1
        counters[blocks.SLOT_FILL] = end - self._begin

    def unkept(self, stream: int, t_ns: int, size: int, *, reply: bool) -> None:
        """Body bytes that passed and are counted only."""
        if stream:
            kind = blocks.UNKEPT_REPLY if reply else blocks.UNKEPT_REQUEST
            self._put(kind, stream, t_ns, blocks.NO_STAMP, blocks.LENGTH.pack(size))

    def close(self, stream: int, t_ns: int, row: dict[str, Any]) -> None:
        """End a request: its outcome and last columns."""
        if not stream:
            return
        dropped = self._dropped.pop(stream, 0)
        if dropped:
            row = row | {"events_dropped": dropped}
        self._put(blocks.CLOSE, stream, t_ns, blocks.NO_STAMP, _encode(row))

    def telemetry(
        self, t_ns: int, end_ns: int, source: str, samples: list[tuple[str, str, float]]
    ) -> None:
        """Samples (name, labels as JSON, value) of one source, taken between the two instants."""
        self._put(blocks.TELEMETRY, 0, t_ns, blocks.NO_STAMP, _encode([end_ns, source, samples]))

    def _data(
        self, kind: int, stream: int, t_ns: int, lag_us: int, data: bytes | memoryview
    ) -> None:
        if not stream:
            return
        if self._shedding or (self._careful and self._over_share(stream, len(data))):
            if stream not in self._dropped:
                self._dropped[stream] = 0
                self._put(blocks.GAP, stream, t_ns, lag_us, b"")
            self._dropped[stream] += kind != blocks.REQUEST_BODY
            return
        self._counters[blocks.READS] += kind != blocks.REQUEST_BODY
        if len(data) <= blocks.MAX_PAYLOAD_BYTES:
            self._put(kind, stream, t_ns, lag_us, data)
        else:
            for at in range(0, len(data), blocks.MAX_PAYLOAD_BYTES):
                piece = data[at : at + blocks.MAX_PAYLOAD_BYTES]
                self._put(kind, stream, t_ns, lag_us, piece)

    def _read_later(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """The headers that the writer reads; a head may be of any size, what is kept may not."""
        read = self._read_headers
        return [(n, v) for n, v in headers if n.lower() in read and len(v) <= MAX_VALUE_BYTES]

    def _put(
        self, kind: int, stream: int, t_ns: int, lag_us: int, payload: bytes | memoryview
    ) -> None:
        size = len(payload)
        if size > _LARGEST_PAYLOAD:
            self._lose("records_too_large")
            return
        at = self._at
        body = at + _RECORD_BYTES
        if body + size > self._end:
            self._next_block()
            at = self._at
            body = at + _RECORD_BYTES
        _pack_into(self._block, at, kind, stream, t_ns, lag_us, size)
        self._at = body + size
        self._block[body : self._at] = payload
        self._counters[blocks.SLOT_FILL] = self._at - self._begin

    def _next_block(self) -> None:
        """Hand over the block in hand, go on in a free slot, or in memory when there is none."""
        self._hand_over()
        sender = self._life.sender
        slot = None if self._waiting else sender.claim()
        self._counters[blocks.SLOT_FILL] = 0
        if slot is None:
            self._block, self._begin = bytearray(blocks.SLOT_BYTES), 0
        else:
            self._block, self._begin = sender.memory, slot
            self._counters[blocks.SLOT_AT] = slot
        self._at, self._end = self._begin, self._begin + blocks.SLOT_BYTES

    def pause(self, *, paused: bool) -> None:
        """Stop recording, or go on with it: what passes meanwhile is counted, not kept."""
        self._paused = paused
        self._shed()

    @property
    def waiting_bytes(self) -> int:
        """What waits in memory for the writer process."""
        return self._waiting_bytes

    @property
    def served(self) -> dict[str, float]:
        """Counts of finished requests, as the writer told them last."""
        return self._past.served_with(self._life.served)

    @property
    def reads_dropped(self) -> int:
        """Pieces of replies that still run and were not kept."""
        return sum(self._dropped.values())

    def _why_not(self) -> str:
        if self._given_up:
            return "writer_died"
        return "rows_paused" if self._paused else "rows_dropped"

    def _shed(self) -> None:
        self._shedding = self._paused or self._waiting_bytes > MEMORY_BYTES
        self._careful = self._shedding or bool(self._waiting)
        if not self._waiting:
            self._held.clear()

    def _over_share(self, stream: int, size: int) -> bool:
        held = self._held[stream] = self._held.get(stream, 0) + size
        return held > STREAM_BYTES

    def _lose(self, reason: str, n: int = 1) -> None:
        self.losses[reason] = self.losses.get(reason, 0) + n

    # -- hand-over ------------------------------------------------------------------------------

    def flush(self) -> None:
        """Send what is buffered; what finds no free slot waits in bounded memory."""
        self._hand_over()
        self._life.poll()
        sender = self._life.sender
        while self._waiting and sender.send(self._waiting[0]):
            self._waiting_bytes -= len(self._waiting.popleft())
        if not sender.alive and self._life.summary is None:
            self._succeed()
        self._shed()

    def _hand_over(self) -> None:
        """Send the slot in hand, or let its bytearray wait; the next record begins a new block."""
        size = self._at - self._begin
        self._counters[blocks.SLOT_AT] = blocks.NO_SLOT  # first: better lost than taken twice
        if isinstance(self._block, bytearray):
            if size:
                del self._block[size:]
                self._waiting.append(self._block)
                self._waiting_bytes += size
                self._shed()
        elif not size:
            self._life.sender.unclaim(self._begin)
        else:
            self._life.sender.commit(self._begin, size)
        self._block = bytearray()
        self._begin = self._at = self._end = 0

    def _succeed(self) -> None:
        """The writer died: start the next one, which seals and counts what this one left."""
        if self._given_up:
            return
        dead = self._life
        if self._dead is not dead:
            self._dead = dead
            self._on_trouble("the writer process died: traffic goes on; a new one is started")
            dead.poll()  # what it could still say
            if dead.took_over:  # else the next one counts what it counted
                self._past.add(dead.ready)
            self._past.keep_served(dead.served)
            self._deaths = 0 if dead.sender.confirmed else self._deaths + 1
            self._take_back(dead)
            dead.bury()
        if self._deaths > MAX_DEATHS:
            self._given_up = True
            self._waiting.clear()  # counted as lost, by the page of counters
            self._waiting_bytes = 0
            self._on_trouble("the writer process died too often: no more is recorded")
            return
        with contextlib.suppress(OSError):  # no process to be had now: the next flush tries again
            self._life = WriterLife(
                self.tape, self._lock_fd, self._hello, self._on_trouble, self._ancestors, dead
            )
            self.incarnations.append(self._life.incarnation)

    def _take_back(self, dead: WriterLife) -> None:
        """What the dead writer did not confirm waits again, unless it may be what kills writers."""
        if dead.took_over:
            self._ancestors.clear()
        confirmed, unconfirmed = dead.sender.confirmed, dead.sender.unconfirmed()
        if self._deaths > 1 and dead.ready is not None:  # else it had read none
            confirmed += len(unconfirmed)
            unconfirmed = []
        self._ancestors[dead.incarnation] = confirmed
        self._waiting.extendleft(reversed(unconfirmed))
        self._waiting_bytes += sum(map(len, unconfirmed))

    def flush_every(self, loop: asyncio.AbstractEventLoop) -> None:
        """Flush from now on each FLUSH_EVERY_S on this loop, until `finish`."""
        self._timer = loop.call_later(FLUSH_EVERY_S, self.flush_every, loop)
        self.flush()

    def finish(self, facts: dict[str, Any] | None = None) -> Summary:
        """Hand everything over, wait until it is sealed, add `facts` to tape.json.

        Requests still open become `cut`. When writers have died too often, the last one's journal
        is sealed here, and what it had not journaled is counted as lost.
        """
        if self._timer is not None:
            self._timer.cancel()
        deadline = time.monotonic() + FINISH_TIMEOUT_S
        while True:
            self.flush()
            done = not self._waiting and self._life.ready is not None
            if done or not self._life.sender.alive or time.monotonic() > deadline:
                break
            time.sleep(0.005)
        life = self._life
        life.ask_to_finish(facts or {}, self.losses, deadline)
        try:
            if self._dead is not life:
                self._past.add(life.ready)
            if life.summary is not None:
                return self._past.summary(**life.summary)
            return self._salvage(facts or {})
        finally:
            os.close(self._lock_fd)

    def _salvage(self, facts: dict[str, Any]) -> Summary:
        """The last writer is dead: seal its journal, count the rest."""
        from tokentape.traces.journal import sealed_counts
        from tokentape.traces.recover import NOTHING, Recovered, recover_incarnation

        for name in dict.fromkeys([*self._ancestors, self._life.incarnation]):
            found = recover_incarnation(self.tape, name)
            if found == NOTHING:  # it left no journal: all is sealed
                rows, events = sealed_counts(self.tape, name)
                found = Recovered(0, 0, events, rows)
            self._past.add(asdict(found))
        with tape_facts.changing(self.tape) as tape:
            tape.update(facts)
            name = self._life.incarnation
            if self.losses and self.losses != tape["losses"].get(name):  # else it said so itself
                tape["losses"][name] = tape["losses"].get(name, {}) | self.losses
                seen = tape.setdefault("seen", {})
                seen[name] = seen.get(name, 0) + sum(self.losses.values())
        seen = sum(self.losses.values())
        return self._past.summary(seen, 0, 0, self.losses)
