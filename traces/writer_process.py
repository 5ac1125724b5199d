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
from array import array
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokentape.traces import journal as journals
from tokentape.traces.assemble import Assembler
from tokentape.traces.blocks import NO_SLOT, BlockReceiver, Channel, open_channel
from tokentape.traces.clock import TapeClock, take_anchor
from tokentape.traces.facts import read_facts
from tokentape.traces.journal import Journal
from tokentape.traces.journal_files import counter_path, reserve_path
from tokentape.traces.privacy import Privacy
from tokentape.traces.recover import NOTHING, recover_incarnation
from tokentape.traces.served import Served
from tokentape.traces.writer import SEAL_BYTES, TapeWriter

NICENESS = 10
JOURNAL_EVERY_S = 0.5  # a kill -9 of this process loses at most this plus the block on its way
SEAL_EVERY_S = 60.0
RESERVE_BYTES = 32 << 10  # held back for tape.json when the disk is full
RETRY_EVERY_S = 5.0  # after a write failed
NEVER_OPENED = ("rows_dropped", "rows_paused", "writer_died")  # losses that the writer never saw
MEMORY_BYTES = 256 << 20  # rows that cannot be sealed


class TapeSink:
    """Takes what the assembler finds to the journal and to the segments; survives a full disk."""

    def __init__(self, writer: TapeWriter, channel: Channel, *, fsync: bool) -> None:
        self.writer = writer
        self._fsync = fsync
        self._counts = (0, 0)
        self._served = Served()
        self._told = True  # the hot process knows what was served
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
        reserve = reserve_path(self.writer.tape, self.writer.incarnation)
        self._guard(lambda: reserve.write_bytes(bytes(RESERVE_BYTES)))

    def opened(self, stream: int, row: dict[str, Any]) -> None:
        self._journal(journals.OPEN, stream, journals.pack_row(row))

    def learned(self, stream: int, columns: dict[str, Any]) -> None:
        self._journal(journals.COLUMNS, stream, journals.pack_row(columns))

    def finished(self, stream: int, row: dict[str, Any]) -> None:
        self._journal(journals.ROW, stream, journals.pack_row(row))
        self.writer.append(row)
        self._served.add(row)
        self._told = False

    def sampled(self, samples: list[tuple[int, int, str, str, str, float]]) -> None:
        self._journal(journals.TELEMETRY, 0, samples)
        for sample in samples:
            self.writer.append_telemetry(sample)

    def checkpoint(self) -> None:
        """Journal what is new, and seal when it is time."""
        assert self._assembler is not None
        for stream, raw in self._assembler.new_events():
            self._journal(journals.EVENTS, stream, raw)
        self._journal_counts()
        if not self._told:
            self._told = True
            tell(self._channel, served=self._served.samples())
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

    def _journal_counts(self) -> None:
        """How much of what the hot process counts is in the journal with this flush."""
        assert self._assembler is not None
        counts = (self._assembler.seen, self._assembler.reads)
        if counts != self._counts:
            self._counts = counts
            self._journal(journals.COUNTS, *counts)

    def finish(self, facts: dict[str, Any]) -> int:
        """Seal the rest for good; the rows that only the journal holds, where the disk is full."""
        self._add_anchor()
        if self._guard(self.writer.seal):
            self._free_reserve()
            self._guard(lambda: self.writer.update_facts(**facts))
            if self.journal is not None:
                self.journal.close()
            counter_path(self.writer.tape, self.writer.incarnation).unlink(missing_ok=True)
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
        reserve_path(self.writer.tape, self.writer.incarnation).unlink(missing_ok=True)

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
            self.journal.rotate(self._still_open())
            if self.writer.losses:
                self.writer.update_facts()

    def _still_open(self) -> Any:
        """What a new journal begins with."""
        assert self._assembler is not None
        yield journals.COUNTS, self._assembler.seen, self._assembler.reads
        for stream, row, events in self._assembler.snapshot():
            yield from _open_records(stream, row, events)

    def _open_journal(self) -> None:
        writer = self.writer
        self.journal = Journal(writer.tape, writer.incarnation, writer.clock, fsync=self._fsync)

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


def take_unsent(receiver: BlockReceiver, assembler: Assembler, counter: Path) -> None:
    """The hot process died: what it had begun to fill is still in the shared memory."""
    with contextlib.suppress(OSError, ValueError):
        at, size = array("Q", counter.read_bytes()[16:32])
        if size and at < NO_SLOT:
            assembler.take(receiver.slot(at, size))


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
    name = hello["incarnation"]
    recovered = recover_incarnation(tape, hello["heir_of"]) if hello["heir_of"] else NOTHING
    writer = TapeWriter(tape, lock_fd, clock.footer(), hello["worker"], name=name)
    sink = TapeSink(writer, channel, fsync=hello["fsync"])
    assembler = Assembler(clock, Privacy(hello["content"], bytes.fromhex(hello["key"])), sink)
    sink.attach(assembler)
    gc.collect()
    gc.freeze()
    tell(channel, ready=asdict(recovered))
    end = pump(receiver, assembler, sink)
    if not end:
        take_unsent(receiver, assembler, counter_path(tape, name))
    assembler.cut(time.monotonic_ns())
    hot_losses = end.get("losses", {})
    writer.losses |= hot_losses
    writer.seen = assembler.seen + sum(hot_losses.get(n, 0) for n in NEVER_OPENED)
    writer.lost_reads = assembler.lost_reads
    unsealed = sink.finish(end.get("finish", {}))
    summary = {
        "seen": writer.seen,
        "rows": writer.rows_written,
        "events": writer.events_written,
        "unsealed": unsealed,
        "losses": writer.losses,
        "lost_reads": writer.lost_reads,
    }
    tell(channel, summary=summary)


if __name__ == "__main__":
    main()
