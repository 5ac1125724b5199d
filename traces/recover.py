"""Seals what a dead process left in a tape's journal. The only reader that writes, under the lock.

Finished rows become rows; requests that were open become rows with outcome `cut`, with every event
that reached the journal. A torn tail of a journal is dropped: it is at most the last half second,
and what it held is counted, by the page in which the hot process counts what it saw.
"""

import os
import time
from array import array
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tokentape.traces import facts as tape_facts
from tokentape.traces import journal
from tokentape.traces.event_lists import stream_columns
from tokentape.traces.identity import whose
from tokentape.traces.journal_files import counter_path
from tokentape.traces.open_request import State, Unfinished
from tokentape.traces.schema import INSTANTS
from tokentape.traces.writer import TRACE_CLOCK, TapeWriter


@dataclass(frozen=True)
class Recovered:
    """What was sealed, and what was seen and never reached the journal.

    `rows_on_tape` counts all rows of the incarnations that were touched.
    """

    rows: int
    cut: int
    events: int
    rows_on_tape: int
    lost_requests: int = 0
    lost_reads: int = 0
    sampled_out: int = 0

    def __add__(self, other: "Recovered") -> "Recovered":
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Recovered(*(a + b for a, b in pairs))


NOTHING = Recovered(0, 0, 0, 0)
POLL_S = 0.02


def recover(tape: Path) -> Recovered:
    """Seal the journals of a tape that nobody writes; TapeError when somebody does."""
    tape_facts.read_facts(tape)
    lock_fd = tape_facts.lock(tape)
    try:
        return recover_locked(tape)
    finally:
        os.close(lock_fd)


def recover_locked(tape: Path) -> Recovered:
    """As recover, for a caller that holds the lock and knows that no writer lives."""
    done = NOTHING
    for incarnation, file in list(journal.leftovers(tape)):
        done += _recover_file(tape, incarnation, file)
    _count_forgotten(tape)
    for file in (tape / "journal").iterdir():  # superseded files, half-written ones, reserves
        if file.name != Path(tape_facts.LOCK_NAME).name:
            file.unlink()
    return done


def recover_incarnation(tape: Path, incarnation: str) -> Recovered:
    """Seal what one dead incarnation left, while others may live."""
    done = NOTHING
    for name, file in list(journal.leftovers(tape)):
        if name == incarnation:
            done += _recover_file(tape, incarnation, file)
    for file in (tape / "journal").glob(f"{incarnation}[.-]*"):
        file.unlink(missing_ok=True)
    return done


def seal_dead(tape: Path, timeout_s: float) -> None:
    """Wait until no journal is left: those of living writers, by themselves; of dead ones, by us.

    For whoever holds the lock, when no hot process lives any more.
    """
    deadline = time.monotonic() + timeout_s
    while (left := list(journal.leftovers(tape))) and time.monotonic() < deadline:
        for incarnation, file in left:
            if not journal.is_alive(file) and file.exists():
                recover_incarnation(tape, incarnation)
        time.sleep(POLL_S)


def _recover_file(tape: Path, incarnation: str, file: Path) -> Recovered:
    sealed_rows, _ = journal.sealed_counts(tape, incarnation)
    left = replay_journal(file)
    cut = [cut_row(request) for request in left.open.values()]
    fresh = journal.without_sealed(tape, incarnation, [*left.finished, *cut])
    cut = [row for row in cut if any(row is kept for kept in fresh)]
    worker = incarnation.partition("-")[0]
    writer = TapeWriter(tape, -1, left.clock, worker, heir_of=incarnation)
    for row in fresh:
        writer.append(row)
    for sample in journal.samples_without_sealed(tape, incarnation, left.telemetry):
        writer.append_telemetry(tuple(sample))
    writer.seal()
    opened, reads = _counted(tape, incarnation)
    on_tape = sealed_rows + len(fresh)
    lost = max(opened - left.seen, 0)
    lost_reads = max(reads - left.reads, 0)
    with tape_facts.changing(tape) as facts:
        if incarnation in facts.get("seen", {}):  # its writer could still say what it lost
            lost = lost_reads = 0
            _take_back(facts, incarnation, on_tape)
        else:
            count_killed(facts, incarnation, on_tape, lost, lost_reads, left.sampled_out)
        sampled_out = facts.get("sampled_out", {}).get(incarnation, 0)
    file.unlink()
    counter_path(tape, incarnation).unlink(missing_ok=True)
    events = writer.events_written
    return Recovered(len(fresh), len(cut), events, on_tape, lost, lost_reads, sampled_out)


def _count_forgotten(tape: Path) -> None:
    """Writers that sealed, and that nobody lived to account for."""
    files = (tape / "requests").glob("**/*.parquet")
    names = {whose(file.stem.rpartition("-")[0]) for file in files}
    facts = tape_facts.read_facts(tape)
    if facts["role"] not in ("capture", "replay") or names <= set(facts.get("seen", {})):
        return
    with tape_facts.changing(tape) as facts:
        for name in names - set(facts.get("seen", {})):
            count_killed(facts, name, journal.sealed_counts(tape, name)[0], 0, 0)


def count_killed(
    facts: dict[str, Any],
    incarnation: str,
    on_tape: int,
    lost: int,
    lost_reads: int,
    sampled_out: int = 0,
) -> None:
    """Say of an incarnation that was killed what it had seen, and what of it is nowhere."""
    losses = dict(facts["losses"].get(incarnation, {}))  # what it had given up and said
    if lost:
        losses["killed"] = losses.get("killed", 0) + lost
    if losses:
        facts["losses"][incarnation] = losses
    deleted = facts.get("deleted", {}).get(incarnation, 0)
    seen = on_tape + deleted + sum(losses.values()) + sampled_out
    facts["seen"] = facts.get("seen", {}) | {incarnation: seen}
    if sampled_out:
        facts["sampled_out"] = facts.get("sampled_out", {}) | {incarnation: sampled_out}
    if lost_reads:
        facts["lost_reads"] = facts.get("lost_reads", {}) | {incarnation: lost_reads}


def _take_back(facts: dict[str, Any], incarnation: str, on_tape: int) -> None:
    """Rows that were given up, and of which the journal held something after all, are not lost."""
    losses = facts["losses"].get(incarnation, {})
    sampled_out = facts.get("sampled_out", {}).get(incarnation, 0)
    gone = sampled_out + facts.get("deleted", {}).get(incarnation, 0)
    found = on_tape + sum(losses.values()) + gone - facts["seen"][incarnation]
    for reason in [r for r in losses if r == "disk_full"]:
        losses[reason] -= min(max(found, 0), losses[reason])
        if not losses[reason]:
            del losses[reason]


def _counted(tape: Path, incarnation: str) -> tuple[int, int]:
    """(requests opened, pieces of replies) as the hot process counted them; 0 when it did not."""
    try:
        page = array("Q", counter_path(tape, incarnation).read_bytes()[:16])
    except (OSError, ValueError):
        return 0, 0
    return (page[0], page[1]) if len(page) == 2 else (0, 0)


@dataclass
class Leftover:
    """What a journal file holds."""

    clock: dict[str, Any]
    finished: list[dict[str, Any]] = field(default_factory=list)
    open: dict[int, Unfinished] = field(default_factory=dict)  # by stream
    telemetry: list[Any] = field(default_factory=list)
    # How far it got, over all writers of one hot process: requests, pieces of replies.
    seen: int = 0
    reads: int = 0
    sampled_out: int = 0
    blocks: int = 0  # of those that the hot process sent to the writer named `counted_by`
    counted_by: str = ""

    def end(self, stream: int, packed: dict[str, Any] | None) -> None:
        """Take a request's row, or None where it gets none by intent."""
        self.open.pop(stream, None)
        if packed is None:
            self.sampled_out += 1
        else:
            self.finished.append(journal.unpack_row(packed))

    def counted(
        self, seen: int, reads: int, blocks: int, counted_by: str, sampled_out: int = 0
    ) -> None:
        """Take a COUNTS record; an old journal's has no `sampled_out`."""
        self.seen, self.reads, self.blocks = seen, reads, blocks
        self.counted_by, self.sampled_out = counted_by, sampled_out


def replay_journal(file: Path, *, whole_blocks: bool = False) -> Leftover:
    """Fold a journal's records, up to a torn one.

    `whole_blocks`: up to the last COUNTS, for a successor to whom the later blocks come again.
    """
    records = list(journal.read_records(file))
    if whole_blocks:
        while records and records[-1][0] not in (journal.COUNTS, journal.CLOCK):
            records.pop()
    left = Leftover(dict(TRACE_CLOCK))
    for kind, stream, fields in records:
        if kind == journal.CLOCK:
            left.clock = fields
        elif kind == journal.OPEN:
            left.open[stream] = Unfinished(journal.unpack_row(fields))
        elif kind in (journal.ROW, journal.LEFT_OUT):
            left.end(stream, fields)
        elif kind == journal.TELEMETRY:
            left.telemetry += fields
        elif kind == journal.COUNTS:
            left.counted(*fields)
        elif (request := left.open.get(stream)) is not None:
            _learn(request, kind, fields)
    return left


def _learn(request: Unfinished, kind: int, fields: Any) -> None:
    if kind == journal.COLUMNS:
        request.row.update(journal.unpack_row(fields))
    elif kind == journal.STATE:
        request.state = msgspec.convert(fields, State)
    elif kind == journal.EVENTS:
        arrays = journal.unpack_events(fields)
        if request.events is None:
            request.events = arrays
            return
        for kept, new in zip(request.events, arrays, strict=True):
            kept.extend(new)


def cut_row(request: Unfinished) -> dict[str, Any]:
    """The row of a request that was open when its process died: everything that is known of it."""
    row, state = request.row, request.state
    row["outcome"] = "cut"
    if state is not None and row.get("http_status") is not None:
        row["response_bytes"] = state.reply_bytes
    known = [row[n] for n in INSTANTS if row.get(n) is not None]
    if request.events is None:
        row["end_ns"] = max(known)
        return row
    t_ns, ntok, cls, choice, aux_t_ns, aux_cls = request.events
    stream_columns(row, t_ns, ntok, cls, choice if any(choice) else None, aux_t_ns, aux_cls)
    if t_ns:
        row["first_content_ns"], row["last_content_ns"] = t_ns[0], t_ns[-1]
    row["end_ns"] = max([*known, *t_ns[-1:], *aux_t_ns[-1:]])
    row["ntok_source"] = "cut"
    return row
