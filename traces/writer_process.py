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
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokentape.traces import journal as journals
from tokentape.traces import machine
from tokentape.traces.assemble import Assembler
from tokentape.traces.blocks import NO_SLOT, BlockReceiver, Channel, open_channel
from tokentape.traces.clock import Anchor, TapeClock, take_anchor
from tokentape.traces.crash import hide_values
from tokentape.traces.facts import read_facts
from tokentape.traces.inherit import Inheritance, inherit
from tokentape.traces.journal import Journal
from tokentape.traces.journal_files import counter_path, reserve_path
from tokentape.traces.keep import Keep
from tokentape.traces.privacy import Privacy
from tokentape.traces.recover import NOTHING, cut_row
from tokentape.traces.served import Served
from tokentape.traces.writer import SEAL_BYTES, TapeWriter

NICENESS = 10
JOURNAL_EVERY_S = 0.5  # a kill -9 of all processes loses at most this plus the block on its way
HELD_BLOCKS = 8  # or so many: the slots of blocks are free only when the journal has them
SEAL_EVERY_S = 60.0
RESERVE_BYTES = 32 << 10  # held back for tape.json when the disk is full
RETRY_EVERY_S = 5.0  # after a write failed
NEVER_OPENED = ("rows_dropped", "rows_paused", "writer_died")  # losses that the writer never saw
MEMORY_BYTES = 256 << 20  # rows that cannot be sealed


class TapeSink:
    """Takes what the assembler finds to the journal and to the segments; survives a full disk."""

    def __init__(
        self, writer: TapeWriter, channel: Channel, *, fsync: bool, estate: Inheritance | None
    ) -> None:
        self.writer = writer
        self._fsync = fsync
        self._estate = estate  # until our journal has it all
        self._blocks = estate.skip if estate else 0
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

    def left_out(self, stream: int, row: dict[str, Any]) -> None:
        self._journal(journals.LEFT_OUT, stream, None)
        self._served.add(row, kept=False)
        self._told = False

    def bodies(self, row: dict[str, Any]) -> None:
        self.writer.append_content(row)  # never to the journal: that would be a second copy

    def sampled(self, samples: list[tuple[int, int, str, str, str, float]]) -> None:
        begin, end = samples[0][:2] if samples else (0, 0)
        cores = [(begin, end, machine.SOURCE, *one) for one in machine.cpu_seconds() if samples]
        samples = [*samples, *cores]
        self._journal(journals.TELEMETRY, 0, samples)
        for sample in samples:
            self.writer.append_telemetry(sample)

    def checkpoint(self, blocks: int) -> None:
        """Journal what is new, and seal when it is time. `blocks` were received so far."""
        assert self._assembler is not None
        for stream, raw, state in self._assembler.news():
            if raw is not None:
                self._journal(journals.EVENTS, stream, raw)
            self._journal(journals.STATE, stream, state)
        if blocks > self._blocks:
            self._blocks = blocks
            self._journal(*self._counts())
        if not self._told:
            self._told = True
            tell(self._channel, served=self._served.samples())
        now = time.monotonic()
        if now < self._try_again_at:
            return
        if self.journal is None:
            self._guard(self._open_journal)
        elif self._guard(self.journal.flush) and self._estate is not None:
            self._guard(self._settle)
        due = now - self._sealed_at > SEAL_EVERY_S or self.writer.pending_bytes > SEAL_BYTES
        if due and self._guard(self._seal):
            self._sealed_at = now
        if self.writer.pending_bytes > MEMORY_BYTES:
            self.writer.drop_pending("disk_full")

    def _counts(self) -> tuple[int, int, list[Any]]:
        """The record that says how far everything before it goes."""
        assert self._assembler is not None
        counts = [
            self._assembler.seen,
            self._assembler.reads,
            self._blocks,
            self.writer.incarnation,
            self._assembler.sampled_out,
        ]
        return journals.COUNTS, 0, counts

    def finish(self, facts: dict[str, Any]) -> int:
        """Seal the rest for good; the rows that only the journal holds, where the disk is full."""
        self._add_anchor()
        self._journal(*self._counts())
        if self.journal is not None:  # else what was open in it could be taken for cut after a kill
            self._guard(self.journal.flush)
        if self._guard(self.writer.seal):
            self._free_reserve()
            self._guard(lambda: self.writer.update_facts(**facts))
            if self._estate is not None:
                self._guard(self._settle)
            if self.journal is not None:
                self.journal.close()
            counter_path(self.writer.tape, self.writer.incarnation).unlink(missing_ok=True)
            return 0
        unsealed = self._keep_journal()
        lost = self.writer.seen - self.writer.rows_written - unsealed - self.writer.sampled_out
        self.writer.losses["disk_full"] = lost - self.writer.losses.get("rows_dropped", 0)
        self._free_reserve()
        # `recover` puts on their books what the dead have left.
        theirs = unsealed if self._estate is not None else 0
        their_out = self._estate.left.sampled_out if self._estate is not None else 0
        self.writer.seen -= theirs + their_out
        self.writer.sampled_out -= their_out
        if self._guard(lambda: self.writer.update_facts(**facts)) and self._estate is not None:
            for name in self._estate.names:  # what was lost is said, and not to be counted again
                counter_path(self.writer.tape, name).unlink(missing_ok=True)
        self.writer.seen += theirs + their_out
        self.writer.sampled_out += their_out
        return unsealed

    def _keep_journal(self) -> int:
        """Finished rows in the journal, which stays where it is for `recover`."""
        if self.journal is None:
            return len(self._estate.finished) + len(self._estate.left.open) if self._estate else 0
        self._guard(self.journal.flush)
        self.journal.leave()
        return self.journal.finished_rows()

    def _free_reserve(self) -> None:
        """Room for tape.json, so that losses can be written on a full disk."""
        for name in [self.writer.incarnation, *(self._estate.names if self._estate else ())]:
            reserve_path(self.writer.tape, name).unlink(missing_ok=True)

    def _add_anchor(self) -> None:
        """The anchor in force and the latest one: enough to see and to undo a drift."""
        self.writer.clock["anchors"][1:] = [take_anchor().as_dict()]

    def _journal(self, kind: int, stream: int, fields: Any) -> None:
        if self.journal is not None and self.journal.buffered_bytes < SEAL_BYTES:
            self.journal.add(kind, stream, fields)

    def _seal(self) -> None:
        assert self._assembler is not None
        self._add_anchor()
        wrote = self.writer.seal()
        if self.journal is not None:  # also when no row was kept: events of those left out go
            self.journal.rotate(self._unsealed())
        if wrote and self.writer.losses:
            self.writer.update_facts()

    def _unsealed(self) -> Iterator[tuple[int, int, Any]]:
        """What a new journal begins with: all that no segment has."""
        assert self._assembler is not None
        rows, telemetry = self.writer.pending
        for row in rows:
            yield journals.ROW, 0, journals.pack_row(row)
        if telemetry:
            yield journals.TELEMETRY, 0, telemetry
        for stream, row, events, state in self._assembler.snapshot():
            yield journals.OPEN, stream, journals.pack_row(row)
            if events is not None:
                yield journals.EVENTS, stream, events
            yield journals.STATE, stream, state
        yield self._counts()

    def _open_journal(self) -> None:
        writer, estate = self.writer, self._estate
        self.journal = Journal(
            writer.tape,
            writer.incarnation,
            writer.clock,
            fsync=self._fsync,
            snapshot=self._unsealed(),
            replacing=estate.file if estate else None,
        )
        if estate is not None:
            self._settle()

    def _settle(self) -> None:
        """All that the dead writer left is in our journal, or sealed."""
        assert self._estate is not None
        self._estate.settle()
        self._estate = None
        tell(self._channel, took_over=True)

    @property
    def may_confirm(self) -> bool:
        """Not while a dead writer's journal is all that a further successor would find."""
        return self._estate is None

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


def tell(channel: Channel, **message: Any) -> None:
    """Send a note to the hot process, if it still lives."""
    with contextlib.suppress(OSError):
        channel.note(json.dumps(message).encode())


def pump(
    receiver: BlockReceiver, assembler: Assembler, sink: TapeSink, skip: int
) -> dict[str, Any]:
    """Read until the hot process says finish (its note) or is gone (empty).

    The first `skip` blocks are known already.
    """
    due = time.monotonic() + JOURNAL_EVERY_S
    while True:
        try:
            block, note = receiver.receive(due - time.monotonic())
        except EOFError:
            return {}
        if block is not None:
            if receiver.received > skip:
                assembler.take(block)
            block.release()
        elif note is not None:
            return dict(json.loads(note))
        if time.monotonic() >= due or receiver.held >= HELD_BLOCKS:
            sink.checkpoint(receiver.received)
            if sink.may_confirm:
                receiver.confirm()
            due = time.monotonic() + JOURNAL_EVERY_S


def take_unsent(receiver: BlockReceiver, assembler: Assembler, counter: Path) -> None:
    """The hot process died: what it had begun to fill is still in the shared memory."""
    with contextlib.suppress(OSError, ValueError):
        at, size = array("Q", counter.read_bytes()[16:32])
        if size and at < NO_SLOT:
            assembler.take(receiver.slot(at, size))


def take_over(estate: Inheritance, writer: TapeWriter, assembler: Assembler) -> int:
    """Go on with what a dead writer had; how many of the requests it has seen are not ours."""
    left = estate.left
    for row in estate.finished:
        writer.append(row)
    for sample in left.telemetry:
        writer.append_telemetry(tuple(sample))
    for stream, request in left.open.items():
        try:
            assembler.adopt(stream, request, gap=estate.gap)
        except Exception:  # noqa: BLE001 - one odd request must not end every successor
            writer.append(cut_row(request))
    assembler.seen, assembler.reads = left.seen, left.reads
    assembler.sampled_out = left.sampled_out
    return left.seen - len(estate.finished) - len(left.open) - left.sampled_out


def count_gap(writer: TapeWriter, assembler: Assembler, counter: Path) -> None:
    """What dead writers had taken and could not journal is in no row, and lost."""
    with contextlib.suppress(OSError, ValueError):
        opened, reads = array("Q", counter.read_bytes()[:16])
        lost = max(opened - assembler.seen, 0)
        if lost:
            writer.losses["killed"] = writer.losses.get("killed", 0) + lost
            writer.seen += lost
        writer.lost_reads += max(reads - assembler.reads, 0)


def main() -> None:
    """Serve one tape: descriptors of socket, memory and lock in argv, the rest in a note."""
    hide_values()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(NICENESS)
    socket_fd, memory_fd, lock_fd = (int(a) for a in sys.argv[1:4])
    channel = open_channel(socket_fd, memory_fd)
    receiver = BlockReceiver(channel)
    hello = json.loads(receiver.receive(30.0)[1] or b"{}")
    tape = Path(hello["tape"])
    estate = inherit(tape, hello["ancestors"])
    epoch_unix_ns = read_facts(tape)["wall_epoch_unix_ns"]
    anchor = Anchor(**hello["anchor"]) if "anchor" in hello else None  # one for several workers
    clock = estate.clock if estate else TapeClock.start(epoch_unix_ns, hello["worker"], anchor)
    name = hello["incarnation"]
    content_key = bytes.fromhex(hello.get("content_key", ""))
    writer = TapeWriter(
        tape, lock_fd, clock.footer(), hello["worker"], name=name, content_key=content_key
    )
    sink = TapeSink(writer, channel, fsync=hello["fsync"], estate=estate)
    assembler = Assembler(
        clock,
        Privacy(hello["content"], bytes.fromhex(hello["key"])),
        sink,
        Keep(**hello["keep"]) if hello.get("keep") else None,
        [name.encode() for name in hello.get("session_headers", ())],
    )
    before = take_over(estate, writer, assembler) if estate else 0
    sink.attach(assembler)
    gc.collect()
    gc.freeze()
    tell(
        channel,
        ready=asdict(estate.recovered if estate else NOTHING),
        took_over=sink.may_confirm,
    )
    end = pump(receiver, assembler, sink, estate.skip if estate else 0)
    if not end:
        take_unsent(receiver, assembler, counter_path(tape, name))
    assembler.cut(time.monotonic_ns())
    hot_losses = end.get("losses", {})
    writer.losses |= hot_losses
    writer.seen = assembler.seen - before + sum(hot_losses.get(n, 0) for n in NEVER_OPENED)
    writer.lost_reads = assembler.lost_reads
    writer.sampled_out = assembler.sampled_out
    if hello["ancestors"]:
        count_gap(writer, assembler, counter_path(tape, name))
    unsealed = sink.finish(end.get("finish", {}))
    summary = {
        "seen": writer.seen,
        "rows": writer.rows_written,
        "events": writer.events_written,
        "unsealed": unsealed,
        "losses": writer.losses,
        "lost_reads": writer.lost_reads,
        "sampled_out": writer.sampled_out,
    }
    tell(channel, summary=summary)


if __name__ == "__main__":
    main()
