"""The hot side of recording: raw bytes and stamps into flat buffers, and on to the writer process.

Used by proxy and replay alike. No call raises, waits or parses: when the writer stalls, memory is
bounded, then event detail is dropped, then whole requests, and each drop is counted. The writer
(`writer_process.py`) is a separate niced process that outlives this one until all is sealed.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tokentape.traces import blocks
from tokentape.traces import facts as tape_facts
from tokentape.traces.errors import TapeError
from tokentape.traces.recover import recover_locked

FLUSH_EVERY_S = 0.1
MEMORY_BYTES = (
    64 << 20
)  # waiting for a stalled writer: beyond it detail is dropped, beyond twice rows
FINISH_TIMEOUT_S = 120.0
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


def _read_later(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers that the writer reads; a head may be of any size, what is kept of it may not."""
    return [(n, v) for n, v in headers if n.lower() in READ_HEADERS and len(v) <= MAX_VALUE_BYTES]


@dataclass(frozen=True)
class Summary:
    """What became of everything seen: seen = rows + unsealed + the losses of whole rows.

    `unsealed` rows are safe in the journal, but a full disk kept them from their segment.
    """

    seen: int
    rows: int
    events: int
    losses: dict[str, int] = field(default_factory=dict)
    unsealed: int = 0


class Recorder:
    """Records requests as streams of raw pieces; a stream number of 0 means not recorded."""

    def __init__(
        self,
        tape: Path,
        lock_fd: int,
        hello: dict[str, Any],
        on_trouble: Callable[[str], None],
    ) -> None:
        self.tape = tape
        self._lock_fd = lock_fd
        self._on_trouble = on_trouble
        self._waiting: deque[bytearray] = deque()
        self._waiting_bytes = 0
        self._streams = 0
        self._dropped: dict[int, int] = {}
        self._paused = self._shedding = False  # shedding: details of requests are dropped
        self.losses: dict[str, int] = {}
        self._summary: dict[str, Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._told_dead = False
        self._channel, writer_socket, memory_fd = blocks.channel_pair()
        command = [sys.executable, "-m", "tokentape.traces.writer_process"]
        command += [str(writer_socket.fileno()), str(memory_fd), str(lock_fd)]
        self._process = subprocess.Popen(
            command,
            pass_fds=(writer_socket.fileno(), memory_fd, lock_fd),
            start_new_session=True,  # Ctrl-C is for the hot process; the writer ends after it
            stdin=subprocess.DEVNULL,
        )
        writer_socket.close()
        os.close(memory_fd)
        self._channel.note(json.dumps({"tape": str(tape), **hello}).encode())
        self._wait_ready()
        self._sender = blocks.BlockSender(self._channel)
        # Records are packed straight into a free slot; into a bytearray while there is none.
        self._block: Any = bytearray()
        self._begin = self._at = self._end = 0

    @classmethod
    def start(
        cls,
        tape: Path,
        *,
        role: str,
        command: list[str],
        options: dict[str, Any],
        facts: dict[str, Any],
        content: str = "structure",
        key: bytes = b"",
        force: bool = False,
        append: bool = False,
        worker: str = "w0",
        on_trouble: Callable[[str], None] = say,
    ) -> "Recorder":
        """A recorder on a new tape, or on an old one of the same role when `append` is set.

        Appending first seals what an earlier life left in the journal. TapeError when the tape
        cannot be written.
        """
        if append and (tape / tape_facts.FACTS_NAME).is_file() and not force:
            old = tape_facts.read_facts(tape)
            if old["role"] != role or old.get("content") != content:
                raise TapeError(
                    f"{tape}: is a {old['role']} with content {old.get('content')}; "
                    "choose another --tape"
                )
            if old.get("key_id") != facts.get("key_id"):
                raise TapeError(
                    f"{tape}: was written under another key, so its prefixes would not match; "
                    "give the same --key-file, or choose another --tape"
                )
            if old.get("candidate", {}).get("url") != facts.get("candidate", {}).get("url"):
                raise TapeError(
                    f"{tape}: was captured from {old.get('candidate', {}).get('url')}; "
                    "choose another --tape for another upstream"
                )
            lock_fd = tape_facts.lock(tape)
            recover_locked(tape)
        else:
            first = tape_facts.new_facts(
                role,
                command=command,
                options=options,
                facts={"content": content, **facts},
                wall_epoch_unix_ns=None,
            )
            tape_facts.create_tape(tape, first, force=force)
            lock_fd = tape_facts.lock(tape)
        hello = {"worker": worker, "content": content, "key": key.hex()}
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
        if self._paused or self._waiting_bytes > 2 * MEMORY_BYTES:
            self._lose("rows_paused" if self._paused else "rows_dropped")
            return 0
        self._streams += 1
        if head is not None:
            method, target, headers = head
            head = (method[:32], target[:MAX_VALUE_BYTES], _read_later(headers))
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
            payload = _encode([status, _read_later(headers)])
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
        if end > self._end or self._shedding or not stream:
            self._data(blocks.REPLY_CHUNKED, stream, t_ns, lag_us, data)
            return
        _pack_into(self._block, at, blocks.REPLY_CHUNKED, stream, t_ns, lag_us, size)
        self._block[body:end] = data
        self._at = end

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
        if self._shedding:
            if stream not in self._dropped:
                self._dropped[stream] = 0
                self._put(blocks.GAP, stream, t_ns, lag_us, b"")
            self._dropped[stream] += kind != blocks.REQUEST_BODY
        elif len(data) <= blocks.MAX_PAYLOAD_BYTES:
            self._put(kind, stream, t_ns, lag_us, data)
        else:
            for at in range(0, len(data), blocks.MAX_PAYLOAD_BYTES):
                piece = data[at : at + blocks.MAX_PAYLOAD_BYTES]
                self._put(kind, stream, t_ns, lag_us, piece)

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

    def _next_block(self) -> None:
        """Hand over the block in hand, go on in a free slot, or in memory when there is none."""
        self._hand_over()
        slot = None if self._waiting else self._sender.claim()
        if slot is None:
            self._block, self._begin = bytearray(blocks.SLOT_BYTES), 0
        else:
            self._block, self._begin = self._sender.memory, slot
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
    def reads_dropped(self) -> int:
        """Pieces of replies that still run and were not kept."""
        return sum(self._dropped.values())

    def _shed(self) -> None:
        self._shedding = self._paused or self._waiting_bytes > MEMORY_BYTES

    def _lose(self, reason: str, n: int = 1) -> None:
        self.losses[reason] = self.losses.get(reason, 0) + n

    # -- hand-over ------------------------------------------------------------------------------

    def flush(self) -> None:
        """Send what is buffered; what finds no free slot waits in bounded memory."""
        self._hand_over()
        for note in self._sender.poll():
            self._heed(json.loads(note))
        while self._waiting and self._sender.send(self._waiting[0]):
            self._waiting_bytes -= len(self._waiting.popleft())
        self._shed()
        if not self._sender.alive:
            self._waiting.clear()
            self._waiting_bytes = 0
            if self._summary is None and not self._told_dead:
                self._told_dead = True
                self._on_trouble("the writer process died: traffic goes on, no more is recorded")

    def _hand_over(self) -> None:
        """Send the slot in hand, or let its bytearray wait; the next record begins a new block."""
        size = self._at - self._begin
        if isinstance(self._block, bytearray):
            if size:
                del self._block[size:]
                self._waiting.append(self._block)
                self._waiting_bytes += size
                self._shed()
        elif not size:
            self._sender.unclaim(self._begin)
        else:
            self._sender.commit(self._begin, size)
        self._block = bytearray()
        self._begin = self._at = self._end = 0

    def flush_every(self, loop: asyncio.AbstractEventLoop) -> None:
        """Flush from now on each FLUSH_EVERY_S on this loop, until `finish`."""
        self._timer = loop.call_later(FLUSH_EVERY_S, self.flush_every, loop)
        self.flush()

    def _heed(self, note: dict[str, Any]) -> None:
        if "trouble" in note:
            self._on_trouble(note["trouble"])
        if "summary" in note:
            self._summary = note["summary"]

    def finish(self, facts: dict[str, Any] | None = None) -> Summary:
        """Hand everything over, wait until it is sealed, add `facts` to tape.json.

        Requests still open become `cut`. When the writer died, its journal is sealed here and what
        it had not journaled is counted as lost.
        """
        if self._timer is not None:
            self._timer.cancel()
        deadline = time.monotonic() + FINISH_TIMEOUT_S
        while True:
            self.flush()
            if not self._waiting or not self._sender.alive or time.monotonic() > deadline:
                break
            time.sleep(0.005)
        self._ask_to_finish(facts or {}, deadline)
        self._channel.close()
        try:
            return Summary(**self._summary) if self._summary else self._salvage(facts or {})
        finally:
            os.close(self._lock_fd)

    def _ask_to_finish(self, facts: dict[str, Any], deadline: float) -> None:
        if self._sender.alive:
            self._channel.sock.setblocking(True)
            self._channel.note(json.dumps({"finish": facts, "losses": self.losses}).encode())
            self._channel.sock.setblocking(False)
        while self._summary is None and self._sender.alive and time.monotonic() < deadline:
            for note in self._sender.poll():
                self._heed(json.loads(note))
            time.sleep(0.005)
        if self._summary is None:
            self._process.kill()
        self._process.wait()

    def _salvage(self, facts: dict[str, Any]) -> Summary:
        """The writer is dead: seal its journal, count the rest."""
        recovered = recover_locked(self.tape)
        lost = max(self._streams - recovered.rows_on_tape, 0)
        if lost:
            self._lose("writer_died", lost)
        seen = self._streams + self.losses.get("rows_dropped", 0)
        tape = tape_facts.read_facts(self.tape) | facts
        tape["losses"] = tape["losses"] | {self._incarnation: self.losses}
        tape["seen"] = tape.get("seen", {}) | {self._incarnation: seen}
        tape_facts.replace_facts(self.tape, tape)
        return Summary(seen, seen - sum(self.losses.values()), recovered.events, self.losses)

    def _wait_ready(self) -> None:
        self._channel.sock.settimeout(30)
        try:
            ready = self._channel.sock.recv(1 << 16)
        except OSError:
            ready = b""
        if ready:
            self._incarnation = json.loads(ready[1:])["ready"]
        else:
            code = self._process.wait()
            raise TapeError(f"{self.tape}: the writer process did not start (exit {code})")
