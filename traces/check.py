"""Invariants of a tape, proved on every sealed row: what is broken, where first, and how often.

An `error` means that numbers from this tape would be wrong, a `warning` that something is missing
and counted. Reads some thousand rows at a time; only ids, arrivals and parents stay in memory.
The rules for one row are in check_rows.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tokentape.traces.check_rows import Rows, broken_rules
from tokentape.traces.reader import Segment, Tape
from tokentape.traces.schema import REQUESTS, allowed
from tokentape.traces.words import MODES

BATCH_ROWS = 10_000
_ID = np.dtype("V16")


@dataclass(frozen=True)
class Finding:
    """One broken or missing thing; `where` names the file, and the first row, from 0, by its id.

    `count` is the number of rows, or of what is missing.
    """

    severity: Literal["error", "warning"]
    where: str
    what: str
    count: int = 1


@dataclass
class _Seen:
    """What all rows together have to agree on: 24 bytes a row, and 40 for each parent."""

    ids: list[NDArray[Any]] = field(default_factory=list)
    arrivals: list[NDArray[np.int64]] = field(default_factory=list)
    parents: list[NDArray[Any]] = field(default_factory=list)
    children: list[NDArray[Any]] = field(default_factory=list)
    child_arrivals: list[NDArray[np.int64]] = field(default_factory=list)

    def add(self, rows: Rows) -> None:
        ids = rows.ids("request_id")
        arrivals, known = rows.ints("arrival_ns")
        self.ids.append(ids)
        self.arrivals.append(np.where(known, arrivals, 0))
        owner, parents = rows.id_lists("parents")
        self.parents.append(parents)
        self.children.append(ids[owner])
        self.child_arrivals.append(self.arrivals[-1][owner])


def check(tape: Tape) -> list[Finding]:
    """All findings of a tape, errors first; empty when there is nothing to say."""
    found: list[Finding] = [
        Finding("error", str(path), f"damaged segment: {why}") for path, why in tape.damaged
    ]
    seen = _Seen()
    for segment in tape.segments:
        try:
            found += _segment(segment, tape, seen)
        except (pa.ArrowException, OSError) as error:
            why = str(error).splitlines()[0][:160]
            found.append(Finding("error", str(segment.path), f"cannot be read: {why}"))
    found += _together(tape, seen)
    found += _missing(tape)
    return sorted(found, key=lambda f: f.severity)


def _segment(segment: Segment, tape: Tape, seen: _Seen) -> Iterator[Finding]:
    with pq.ParquetFile(segment.path, page_checksum_verification=True) as file:
        schema = file.schema_arrow
        yield from _columns(segment, tape, schema)
        same = [
            f.name
            for f in REQUESTS
            if f.name in schema.names and f.type == schema.field(f.name).type
        ]
        counts: dict[str, tuple[int, str]] = {}
        first_row = 0
        for batch in file.iter_batches(BATCH_ROWS, columns=same):
            rows = Rows(batch, first_row)
            for what, mask in broken_rules(rows):
                n, where = counts.get(what, (0, ""))
                where = where or f"{segment.path}, {rows.name(int(np.argmax(mask)))}"
                counts[what] = (n + int(np.count_nonzero(mask)), where)
            seen.add(rows)
            first_row += batch.num_rows
    yield from (Finding("error", where, what, n) for what, (n, where) in counts.items())


def _columns(segment: Segment, tape: Tape, schema: pa.Schema) -> Iterator[Finding]:
    """Types that are not the format's, and columns that the tape's privacy mode forbids."""
    for column in schema:
        if column.name in REQUESTS.names and column.type != REQUESTS.field(column.name).type:
            what = f"{column.name} is of type {column.type}"
            yield Finding("error", str(segment.path), what, segment.rows)
    mode = tape.facts.get("content", "structure")
    if mode not in MODES:
        yield Finding("error", str(tape.path), f"content is none of {', '.join(MODES)}")
        return
    forbidden = [n for n in schema.names if n in REQUESTS.names and n not in allowed(mode)]
    for name in forbidden:
        values = _values(segment.path, name)
        if values:
            what = f"{name} is written though content is {mode}"
            yield Finding("error", str(segment.path), what, values)


def _values(path: Path, name: str) -> int:
    with pq.ParquetFile(path) as file:
        column = file.read([name])[name]
    return int(len(column) - column.null_count)


def _together(tape: Tape, seen: _Seen) -> Iterator[Finding]:
    """Ids that are there twice, parents that are not there or come after their child."""
    if not seen.ids:
        return
    ids, arrivals = np.concatenate(seen.ids), np.concatenate(seen.arrivals)
    order = np.argsort(ids.view("S16"), kind="stable")
    ids, arrivals = ids[order], arrivals[order]
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        yield Finding("error", _by_id(tape, twice[0]), "request_id is not unique", len(twice))
    parents, children = np.concatenate(seen.parents), np.concatenate(seen.children)
    if not len(parents):
        return
    at = np.minimum(np.searchsorted(ids.view("S16"), parents.view("S16")), len(ids) - 1)
    here = ids[at] == parents
    if not here.all():
        lost = children[~here]
        what = "a parent is not on this tape"
        yield Finding("warning", _by_id(tape, lost[0]), what, len(lost))
    late = here & (arrivals[at] > np.concatenate(seen.child_arrivals))
    late |= parents == children
    if late.any():
        what = "a parent arrives after the request that waited for it"
        where = _by_id(tape, children[late][0])
        yield Finding("error", where, what, int(np.count_nonzero(late)))


def _by_id(tape: Tape, request_id: Any) -> str:
    """File and row of an id; one more pass, made only when there is something to name."""
    wanted = request_id.tobytes()
    for segment in tape.segments:
        with pq.ParquetFile(segment.path) as file:
            column = file.read(["request_id"])["request_id"].combine_chunks()
        at = pc.index(column.storage, pa.scalar(wanted, pa.binary(16))).as_py()
        if at >= 0:
            return f"{segment.path}, row {at} ({column[at].as_py()})"
    return str(tape.path)


def _missing(tape: Tape) -> Iterator[Finding]:
    """What was seen and is not here: counted losses, and rows that a journal still holds."""
    where = str(tape.path)
    for reason, n in tape.losses.items():
        yield Finding("warning", where, f"lost: {reason}", n)
    unsealed = tape.unsealed_rows + tape.open_rows
    if unsealed:
        what = "rows not sealed yet: still being written, or `tokentape recover` seals them"
        yield Finding("warning", where, what, unsealed)
    seen = sum(tape.facts.get("seen", {}).values())
    unexplained = seen - tape.rows - sum(tape.losses.values()) - tape.sampled_out - tape.deleted
    if tape.facts.get("seen") and unexplained > unsealed:
        what = "requests seen but neither written nor counted as lost or sampled out"
        yield Finding("error", where, what, unexplained)
    source = tape.facts.get("source", {})
    if tape.role == "import" and "read" in source:
        dropped = sum(source.get("dropped", {}).values())
        if source["read"] - dropped != tape.rows:
            what = "rows of the trace are neither written nor counted as dropped"
            count = abs(source["read"] - dropped - tape.rows)
            yield Finding("error", where, what, count)
