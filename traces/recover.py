"""Seals what a dead process left in a tape's journal. The only reader that writes, under the lock.

Finished rows become rows; requests that were open become rows with outcome `cut`, with every event
that reached the journal. A torn tail of a journal is dropped: it is at most the last half second.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokentape.traces import facts as tape_facts
from tokentape.traces import journal
from tokentape.traces.assemble import stream_columns
from tokentape.traces.writer import TRACE_CLOCK, TapeWriter


@dataclass(frozen=True)
class Recovered:
    """What was sealed; `rows_on_tape` counts all rows of the incarnations that it touched."""

    rows: int
    cut: int
    events: int
    rows_on_tape: int


def recover(tape: Path) -> Recovered:
    """Seal the journals of a tape that nobody writes; TapeError when somebody does."""
    tape_facts.read_facts(tape)
    lock_fd = tape_facts.lock(tape)
    try:
        return recover_locked(tape)
    finally:
        os.close(lock_fd)


def recover_locked(tape: Path) -> Recovered:
    """As recover, for a caller that holds the lock."""
    rows = cut = events = on_tape = 0
    for incarnation, file in list(journal.leftovers(tape)):
        sealed = journal.sealed_ids(tape, incarnation)
        left = replay_journal(file)
        fresh = [r for r in left.finished if r["request_id"] not in sealed] + left.cut
        worker = incarnation.partition("-")[0]
        writer = TapeWriter(tape, -1, left.clock, worker, heir_of=incarnation)
        for row in fresh:
            writer.append(row)
        for sample in left.telemetry:
            writer.append_telemetry(tuple(sample))
        writer.seal()
        file.unlink()
        rows, cut, events = rows + len(fresh), cut + len(left.cut), events + writer.events_written
        on_tape += len(sealed) + len(fresh)
        writer.update_facts(
            seen=writer.facts.get("seen", {}) | {incarnation: len(sealed) + len(fresh)}
        )
    for file in (tape / "journal").iterdir():  # superseded files, half-written ones, the reserve
        if file.name != "lock":
            file.unlink()
    return Recovered(rows, cut, events, on_tape)


@dataclass
class Leftover:
    """What a journal file holds; requests that were open are `cut` rows."""

    clock: dict[str, Any]
    finished: list[dict[str, Any]]
    cut: list[dict[str, Any]]
    telemetry: list[Any]


def replay_journal(file: Path) -> Leftover:
    """Fold a journal's records, up to a torn one, into rows."""
    opened: dict[int, dict[str, Any]] = {}
    events: dict[int, list[Any]] = {}
    left = Leftover(dict(TRACE_CLOCK), [], [], [])
    for kind, stream, fields in journal.read_records(file):
        if kind == journal.CLOCK:
            left.clock = fields
        elif kind == journal.OPEN:
            opened[stream] = journal.unpack_row(fields)
            events.pop(stream, None)
        elif kind == journal.COLUMNS and stream in opened:
            opened[stream].update(journal.unpack_row(fields))
        elif kind == journal.EVENTS and stream in opened:
            arrays = journal.unpack_events(fields)
            for kept, new in zip(events.setdefault(stream, _no_events()), arrays, strict=True):
                kept.extend(new)
        elif kind == journal.ROW:
            opened.pop(stream, None)
            left.finished.append(journal.unpack_row(fields))
        elif kind == journal.TELEMETRY:
            left.telemetry += fields
    left.cut = [_cut_row(row, events.get(stream)) for stream, row in opened.items()]
    return left


def _no_events() -> list[Any]:
    return journal.unpack_events([b""] * len(journal.EVENT_LISTS))


def _cut_row(row: dict[str, Any], arrays: list[Any] | None) -> dict[str, Any]:
    """A request that was open when its process died: everything that is known of it."""
    row["outcome"] = "cut"
    if arrays is None:
        row.setdefault("end_ns", row["arrival_ns"])
        return row
    t_ns, ntok, cls, choice, aux_t_ns, aux_cls = arrays
    stream_columns(row, t_ns, ntok, cls, choice if any(choice) else None, aux_t_ns, aux_cls)
    if t_ns:
        row["first_content_ns"], row["last_content_ns"] = t_ns[0], t_ns[-1]
    row["end_ns"] = max([row["arrival_ns"], *t_ns[-1:], *aux_t_ns[-1:]])
    row["ntok_source"] = "cut"
    return row
