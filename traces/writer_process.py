"""The writer process: blocks in, journal and segments out. Niced, in a session of its own.

It ends when the hot process says so or is gone (end of file on the socket), whatever killed it, and
seals everything first. A full disk never stops it reading: rows wait in bounded memory, are tried
again, and are counted as lost when the bound is reached or the end comes.
"""

import contextlib
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tokentape.traces import journal as journals
from tokentape.traces.assemble import Assembler
from tokentape.traces.blocks import BlockReceiver, Channel, open_channel
from tokentape.traces.clock import TapeClock, take_anchor
from tokentape.traces.facts import read_facts
from tokentape.traces.journal import Journal
from tokentape.traces.privacy import Privacy
from tokentape.traces.writer import SEAL_BYTES, TapeWriter

NICENESS = 10
JOURNAL_EVERY_S = 0.5  # a kill -9 of this process loses at most this plus the block on its way
SEAL_EVERY_S = 60.0
RESERVE_NAME = "journal/reserve"
RESERVE_BYTES = 32 << 10  # held back for tape.json when the disk is full
RETRY_EVERY_S = 5.0  # after a write failed
MEMORY_BYTES = 256 << 20  # rows that cannot be sealed


class TapeSink:
    """Takes what the assembler finds to the journal and to the segments; survives a full disk."""

    def __init__(self, writer: TapeWriter, channel: Channel) -> None:
        self.writer = writer
        self.journal: Journal | None = None
        self._channel = channel
        self._assembler: Assembler | None = None
        self._sealed_at = time.monotonic()
        self._try_again_at = 0.0
        self._complained = False

    def attach(self, assembler: Assembler) -> None:
        """The assembler whose open requests a new journal repeats."""
        self._assembler = assembler
        self._guard(self._open_journal)
        reserve = self.writer.tape / RESERVE_NAME
        self._guard(lambda: reserve.write_bytes(bytes(RESERVE_BYTES)))

    def opened(self, stream: int, row: dict[str, Any]) -> None:
        self._journal(journals.OPEN, stream, journals.pack_row(row))

    def learned(self, stream: int, columns: dict[str, Any]) -> None:
        self._journal(journals.COLUMNS, stream, journals.pack_row(columns))

    def finished(self, stream: int, row: dict[str, Any]) -> None:
        self._journal(journals.ROW, stream, journals.pack_row(row))
        self.writer.append(row)

    def sampled(self, samples: list[tuple[int, int, str, str, str, float]]) -> None:
        self._journal(journals.TELEMETRY, 0, samples)
        for sample in samples:
            self.writer.append_telemetry(sample)

    def checkpoint(self) -> None:
        """Journal what is new, and seal when it is time."""
        assert self._assembler is not None
        for stream, raw in self._assembler.new_events():
            self._journal(journals.EVENTS, stream, raw)
        now = time.monotonic()
        if now < self._try_again_at:
            return
        if self.journal is None:
            self._guard(self._open_journal)
        else:
            self._guard(self.journal.flush)
        due = now - self._sealed_at > SEAL_EVERY_S or self.writer.pending_bytes > SEAL_BYTES
        if due and self._guard(self._seal):
            self._sealed_at = now
        if self.writer.pending_bytes > MEMORY_BYTES:
            self.writer.drop_pending("disk_full")

    def finish(self, facts: dict[str, Any]) -> int:
        """Seal the rest for good; the rows that only the journal holds, where the disk is full."""
        self._add_anchor()
        if self._guard(self.writer.seal):
            self._free_reserve()
            self._guard(lambda: self.writer.update_facts(**facts))
            if self.journal is not None:
                self.journal.close()
            return 0
        unsealed = self._keep_journal()
        lost = self.writer.seen - self.writer.rows_written - unsealed
        self.writer.losses["disk_full"] = lost - self.writer.losses.get("rows_dropped", 0)
        self._free_reserve()
        self._guard(lambda: self.writer.update_facts(**facts))
        return unsealed

    def _keep_journal(self) -> int:
        """Finished rows in the journal, which stays where it is for `recover`."""
        if self.journal is None:
            return 0
        self._guard(self.journal.flush)
        self.journal.leave()
        return self.journal.finished_rows()

    def _free_reserve(self) -> None:
        """Room for tape.json, so that losses can be written on a full disk."""
        (self.writer.tape / RESERVE_NAME).unlink(missing_ok=True)

    def _add_anchor(self) -> None:
        """The anchor in force and the latest one: enough to see and to undo a drift."""
        self.writer.clock["anchors"][1:] = [take_anchor().as_dict()]

    def _journal(self, kind: int, stream: int, fields: Any) -> None:
        if self.journal is not None and self.journal.buffered_bytes < SEAL_BYTES:
            self.journal.add(kind, stream, fields)

    def _seal(self) -> None:
        assert self._assembler is not None
        self._add_anchor()
        if self.writer.seal() and self.journal is not None:
            self.journal.rotate(
                record
                for stream, row, events in self._assembler.snapshot()
                for record in _open_records(stream, row, events)
            )
            if self.writer.losses:
                self.writer.update_facts()

    def _open_journal(self) -> None:
        self.journal = Journal(self.writer.tape, self.writer.incarnation, self.writer.clock)

    def _guard(self, action: Any) -> bool:
        """Run a disk action; False when the disk refused, said once until it works again."""
        try:
            action()
        except OSError as error:
            self._try_again_at = time.monotonic() + RETRY_EVERY_S
            if not self._complained:
                self._complained = True
                tell(
                    self._channel, trouble=f"{self.writer.tape}: {_reason(error)}; traffic goes on"
                )
            return False
        self._complained = False
        return True


def _reason(error: OSError) -> str:
    """The system's word for it; pyarrow puts a sentence of its own in strerror."""
    return os.strerror(error.errno) if error.errno else str(error)


def _open_records(stream: int, row: dict[str, Any], events: list[bytes] | None) -> Any:
    yield journals.OPEN, stream, journals.pack_row(row)
    if events is not None:
        yield journals.EVENTS, stream, events


def tell(channel: Channel, **message: Any) -> None:
    """Send a note to the hot process, if it still lives."""
    with contextlib.suppress(OSError):
        channel.note(json.dumps(message).encode())


def pump(receiver: BlockReceiver, assembler: Assembler, sink: TapeSink) -> dict[str, Any]:
    """Read until the hot process says finish (its note) or is gone (empty)."""
    due = time.monotonic() + JOURNAL_EVERY_S
    while True:
        try:
            block, note = receiver.receive(due - time.monotonic())
        except EOFError:
            return {}
        if block is not None:
            assembler.take(block)
            block.release()
            receiver.release()
        elif note is not None:
            return dict(json.loads(note))
        if time.monotonic() >= due:
            sink.checkpoint()
            due = time.monotonic() + JOURNAL_EVERY_S


def main() -> None:
    """Serve one tape: descriptors of socket, memory and lock in argv, the rest in a note."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(NICENESS)
    socket_fd, memory_fd, lock_fd = (int(a) for a in sys.argv[1:4])
    channel = open_channel(socket_fd, memory_fd)
    receiver = BlockReceiver(channel)
    hello = json.loads(receiver.receive(30.0)[1] or b"{}")
    tape = Path(hello["tape"])
    clock = TapeClock.start(read_facts(tape)["wall_epoch_unix_ns"], hello["worker"])
    writer = TapeWriter(tape, lock_fd, clock.footer(), hello["worker"])
    sink = TapeSink(writer, channel)
    assembler = Assembler(clock, Privacy(hello["content"], bytes.fromhex(hello["key"])), sink)
    sink.attach(assembler)
    gc.collect()
    gc.freeze()
    tell(channel, ready=writer.incarnation)
    end = pump(receiver, assembler, sink)
    assembler.cut(time.monotonic_ns())
    hot_losses = end.get("losses", {})
    writer.losses |= hot_losses
    writer.seen = assembler.seen + hot_losses.get("rows_dropped", 0)
    unsealed = sink.finish(end.get("finish", {}))
    summary = {
        "seen": writer.seen,
        "rows": writer.rows_written,
        "events": writer.events_written,
        "unsealed": unsealed,
        "losses": writer.losses,
    }
    tell(channel, summary=summary)


if __name__ == "__main__":
    main()
