"""What the importers share: a format, its batches, and the rows of a tape made out of them.

A format's reader turns a file into batches in the trace's own time; here they get their ids and the
tape's epoch. Nothing here may invent what a trace does not say: it stays NULL.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tokentape.traces.errors import TapeError
from tokentape.traces.schema import INSTANTS, REQUESTS

Ints = NDArray[np.int64]

# Why a row is not on the tape.
NO_VALUE = "no_value"  # it lacks a time or a token count: nothing could be replayed
DUPLICATE = "duplicate_id"  # a row with its id came before
MAX_TOKENS = 2**31 - 1
NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000


@dataclass(frozen=True)
class Parents:
    """The parents of a batch's rows, named by what makes their ids: time and row number.

    offsets: int64[n + 1] into time_ns and row, as in an Arrow list.
    """

    offsets: Ints
    time_ns: Ints
    row: Ints

    @classmethod
    def of(cls, parents: Sequence[Sequence[tuple[int, int]]]) -> "Parents":
        """From a list of (time_ns, row) for each row."""
        sizes = np.array([0, *map(len, parents)], dtype=np.int64)
        pairs = np.array([pair for some in parents for pair in some], dtype=np.int64)
        pairs = pairs.reshape(-1, 2)
        return cls(np.cumsum(sizes), pairs[:, 0], pairs[:, 1])


@dataclass(frozen=True)
class Batch:
    """Some rows of a trace file, in file order.

    time_ns: int64[n], arrivals in the trace's own time. row: int64[n], number in the file from 0.
    columns: what the trace says, by column of the tape; instants in the trace's own time.
    dropped and notes are counts.
    """

    time_ns: Ints
    row: Ints
    columns: dict[str, pa.Array]
    dropped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    parents: Parents | None = None


def no_companions(_: Path) -> Sequence[Path]:
    """The trace is one file, as most are."""
    return ()


@dataclass(frozen=True)
class Format:
    """A known trace format: who published it, under which licence, and how it is read.

    `wall_clock`: its times are dates. `one_file`: two files cannot share one tape, because their
    times and block ids start anew. `marks`: columns or keys that tell it from other formats.
    `facts` are true of every file of the format. `pattern` names its files in a folder, and
    `companions` what is read beside one of them. `seeded`: rows are drawn, so `read` takes a seed.
    """

    origin: str
    licence: str
    wall_clock: bool
    one_file: bool
    read: Callable[..., Iterator[Batch]]
    marks: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    pattern: str = "*"
    companions: Callable[[Path], Sequence[Path]] = no_companions
    seeded: bool = False


@dataclass
class Survey:
    """What the first pass over a file finds; a file that cannot be read whole fails here.

    `resolution_ns` is the smallest gap seen between two different arrivals: the trace's clock has
    no coarser step. `distinct` is None where arrivals are too disordered to be counted in passing.
    """

    path: Path
    sha256: str
    bytes: int
    companions: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    first_ns: int | None = None
    last_ns: int | None = None
    resolution_ns: int | None = None
    distinct: int | None = 0

    @property
    def read(self) -> int:
        """Rows in the file."""
        return self.rows + sum(self.dropped.values())

    def add(self, batch: Batch) -> None:
        """Takes a batch into account; batches come in file order."""
        add_counts(self.dropped, batch.dropped)
        add_counts(self.notes, batch.notes)
        self.rows += len(batch.time_ns)
        if not len(batch.time_ns):
            return
        times = np.unique(batch.time_ns)
        fresh = len(times)
        if self.last_ns is not None:
            if times[0] < self.last_ns:
                self.distinct = None
            fresh -= int(times[0] == self.last_ns)
            times = np.unique(np.append(times, self.last_ns))
        if self.distinct is not None:
            self.distinct += fresh
        gaps = np.diff(times)
        if len(gaps):
            smallest = int(gaps.min())
            self.resolution_ns = min(smallest, self.resolution_ns or smallest)  # a gap is never 0
        earliest = int(batch.time_ns.min())
        self.first_ns = earliest if self.first_ns is None else min(earliest, self.first_ns)
        self.last_ns = int(times[-1])

    def facts(self) -> dict[str, Any]:
        """What the tape keeps of the file."""
        return {
            "name": self.path.name,
            "sha256": self.sha256,
            "bytes": self.bytes,
            "read": self.read,
            "written": self.rows,
            "dropped": self.dropped,
            "distinct_arrivals": self.distinct,
            **({"companions": self.companions} if self.companions else {}),
            **self.notes,
        }


def survey(path: Path, known: Format, read: Callable[[Path], Iterator[Batch]]) -> Survey:
    """Reads a file once, keeping counts only."""
    if not path.is_file():
        raise TapeError(f"{path}: no such file")
    if not path.stat().st_size:
        raise TapeError(f"{path}: empty file; fetch it again")
    beside = {other.name: _sha256(other) for other in known.companions(path)}
    found = Survey(path, _sha256(path), path.stat().st_size, beside)
    for batch in read(path):
        found.add(batch)
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rows_table(batch: Batch, sha256: str, epoch_ns: int) -> pa.Table:
    """The batch as rows of a tape, in order of arrival and, within one instant, of the file.

    Where the trace does not say how a request ended, one with output tokens counts as `ok`; with
    none it stays NULL.
    """
    order = np.argsort(batch.time_ns, kind="stable")
    size = len(order)
    columns = dict(batch.columns)
    if batch.parents is not None:
        columns["parents"] = _parents(batch.parents, sha256)
    if (np.diff(order) != 1).any():
        columns = {name: values.take(pa.array(order)) for name, values in columns.items()}
    for name in INSTANTS & columns.keys():
        columns[name] = pc.subtract(columns[name], epoch_ns)
    arrival = pa.array(batch.time_ns[order] - epoch_ns)
    columns |= {
        "request_id": request_ids(batch.time_ns[order], batch.row[order], sha256),
        "scheduled_ns": arrival,
        "arrival_ns": arrival,
    }
    columns.setdefault("operation", pa.repeat(pa.scalar("text_completion"), size))
    for name in ("input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens"):
        if name in columns:
            columns[f"{name}_source"] = where_true(columns[name].is_valid(), "trace")
    if "outcome" not in columns:
        columns["outcome"] = where_true(pc.greater(columns["output_tokens"], 0), "ok")
    arrays = [
        columns[f.name].cast(f.type) if f.name in columns else pa.nulls(size, f.type)
        for f in REQUESTS
    ]
    return pa.Table.from_arrays(arrays, schema=REQUESTS)


def where_true(mask: pa.Array, value: str) -> pa.Array:
    """The value where the mask is true, elsewhere NULL."""
    return pc.if_else(pc.fill_null(mask, fill_value=False), value, pa.scalar(None, pa.string()))


def _parents(parents: Parents, sha256: str) -> pa.Array:
    """Lists of ids; a row that waits for none has NULL."""
    ids = request_ids(parents.time_ns, parents.row, sha256)
    none = pa.array(np.diff(parents.offsets) == 0)
    return pa.ListArray.from_arrays(pa.array(parents.offsets, pa.int32()), ids, mask=none)


def blocks(
    hashes: Sequence[Sequence[int] | None],
    input_tokens: Sequence[int | None],
    block_tokens: int | Sequence[int | None],
) -> dict[str, pa.Array]:
    """The prefix columns of rows whose hashes are known; ids are 64 bits wide, signed or not."""
    known = np.array([h is not None for h in hashes], dtype=bool)
    sizes = [block_tokens] * len(hashes) if isinstance(block_tokens, int) else list(block_tokens)
    partial = [
        None if h is None or n is None or not b else n % b
        for h, n, b in zip(hashes, input_tokens, sizes, strict=True)
    ]
    return {
        "block_hashes": pa.array(map(_signed, hashes), pa.list_(pa.int64())),
        "block_tokens": pa.array(
            [b if k else None for b, k in zip(sizes, known, strict=True)], pa.int32()
        ),
        "block_unit": where_true(pa.array(known), "token"),
        "block_scope": where_true(pa.array(known), "trace"),
        "prefix_partial": pa.array(partial, pa.int32()),
    }


def _signed(ids: Sequence[int] | None) -> Sequence[int] | None:
    if ids is None or not ids or max(ids) < 1 << 63:
        return ids
    return [i if i < 1 << 63 else i - (1 << 64) for i in ids]


def batch_of(
    rows: Sequence[dict[str, Any]],
    dropped: dict[str, int],
    notes: dict[str, int],
    parents: Parents | None = None,
    **more: pa.Array,
) -> Batch:
    """A batch of rows that are dictionaries: `time_ns`, `row`, and columns of the tape by name.

    `hashes` with `block_tokens` become the prefix columns. `more` are whole columns.
    """
    names = rows[0].keys() - {"time_ns", "row", "hashes", "block_tokens"} if rows else set()
    columns = {n: pa.array([row[n] for row in rows], REQUESTS.field(n).type) for n in names}
    columns.setdefault("output_tokens", pa.nulls(len(rows), pa.int64()))
    if rows and "hashes" in rows[0]:
        hashes, sizes = [r["hashes"] for r in rows], [r["block_tokens"] for r in rows]
        columns |= blocks(hashes, [row["input_tokens"] for row in rows], sizes)
    return Batch(
        np.array([row["time_ns"] for row in rows], dtype=np.int64),
        np.array([row["row"] for row in rows], dtype=np.int64),
        columns | more,
        dropped,
        notes,
        parents,
    )


def counted(**reasons: int) -> dict[str, int]:
    """The counts that are not 0."""
    return {name: n for name, n in reasons.items() if n}


def request_ids(time_ns: Ints, row: Ints, sha256: str) -> pa.Array:
    """The same ids for the same file on every host: layout of a UUID version 7.

    48 bits of ms since the trace's epoch and 12 of the fraction, then the row's number (32 bits)
    and the start of the file's digest (30 bits): ordered by time, then as the file has them.
    """
    ms, rest = np.divmod(time_ns, NS_PER_MS)
    high = ms.astype(np.uint64) << np.uint64(16) | np.uint64(0x7000)
    high |= (rest * 4096 // NS_PER_MS).astype(np.uint64)
    digest = np.uint64(int(sha256[:8], 16) >> 2)
    low = np.uint64(0b10 << 62) | row.astype(np.uint64) << np.uint64(30) | digest
    words = np.stack([high, low], axis=1).astype(">u8")
    storage = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), len(row), [None, pa.py_buffer(words.tobytes())]
    )
    return pa.ExtensionArray.from_storage(pa.uuid(), storage)


def add_counts(total: dict[str, int], more: dict[str, int]) -> None:
    """Adds counts by name."""
    for name, count in more.items():
        total[name] = total.get(name, 0) + count
