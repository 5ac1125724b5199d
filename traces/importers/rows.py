"""What the importers share: reading a trace file, and making rows of a tape out of its columns.

A format's reader turns a file into batches in the trace's own time; here they get their ids and the
tape's epoch. Nothing here may invent what a trace does not say: it stays NULL.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tokentape.traces.errors import TapeError
from tokentape.traces.schema import REQUESTS

Ints = NDArray[np.int64]

NO_VALUE = "no_value"  # a row that lacks a time or a token count: nothing could be replayed
MAX_TOKENS = 2**31 - 1
NS_PER_MS = 1_000_000


@dataclass(frozen=True)
class Batch:
    """Some rows of a trace file, in file order.

    time_ns: int64[n], in the trace's own time. row: int64[n], number in the file from 0.
    columns: what the trace says, by column of the tape. dropped and notes are counts.
    """

    time_ns: Ints
    row: Ints
    columns: dict[str, pa.Array]
    dropped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """A known trace format: who published it, under which licence, and how it is read.

    `wall_clock`: its times are dates. `one_file`: two files cannot share one tape, because their
    times and block ids start anew. `facts` are true of every file of the format.
    """

    origin: str
    licence: str
    wall_clock: bool
    one_file: bool
    read: Callable[[Path], Iterator[Batch]]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Survey:
    """What the first pass over a file finds; a file that cannot be read whole fails here.

    `resolution_ns` is the smallest gap seen between two different arrivals: the trace's clock has
    no coarser step. `distinct` is None where arrivals are too disordered to be counted in passing.
    """

    path: Path
    sha256: str
    bytes: int
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
            **self.notes,
        }


def survey(path: Path, read: Callable[[Path], Iterator[Batch]]) -> Survey:
    """Reads a file once, keeping counts only; TapeError when there is no row in it."""
    if not path.is_file():
        raise TapeError(f"{path}: no such file")
    if not path.stat().st_size:
        raise TapeError(f"{path}: empty file; fetch it again")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    found = Survey(path, digest, path.stat().st_size)
    for batch in read(path):
        found.add(batch)
    if not found.rows:
        raise TapeError(f"{path}: no request in it ({found.read} rows read)")
    return found


def rows_table(batch: Batch, sha256: str, epoch_ns: int) -> pa.Table:
    """The batch as rows of a tape, in order of arrival and, within one instant, of the file.

    A row with output tokens counts as `ok`; with none the trace does not say what happened: NULL.
    """
    order = np.argsort(batch.time_ns, kind="stable")
    size = len(order)
    arrival = pa.array(batch.time_ns[order] - epoch_ns)
    columns = {name: values.take(pa.array(order)) for name, values in batch.columns.items()}
    answered = np.asarray(columns["output_tokens"]) > 0
    same = {
        "operation": "text_completion",
        "input_tokens_source": "trace",
        "output_tokens_source": "trace",
    }
    columns |= {name: pa.repeat(pa.scalar(value), size) for name, value in same.items()}
    columns |= {
        "request_id": request_ids(batch.time_ns[order], batch.row[order], sha256),
        "scheduled_ns": arrival,
        "arrival_ns": arrival,
        "outcome": pa.array(np.full(size, "ok", dtype=object), pa.string(), mask=~answered),
    }
    arrays = [
        columns[f.name].cast(f.type) if f.name in columns else pa.nulls(size, f.type)
        for f in REQUESTS
    ]
    return pa.Table.from_arrays(arrays, schema=REQUESTS)


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


@contextmanager
def open_trace(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a trace file, unpacked where its name ends in .gz; TapeError when damaged."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as packed:
                yield cast("IO[bytes]", packed)
        else:
            with path.open("rb") as plain:
                yield plain
    except (OSError, EOFError, zlib.error) as error:
        raise TapeError(f"{path}: cannot be read ({error}); fetch it again") from error


def missing_columns(path: Path, wanted: tuple[str, ...], found: list[str]) -> None:
    """TapeError that names what a file lacks and what it has instead."""
    lacking = [name for name in wanted if name not in found]
    if lacking:
        names = ", ".join(json.dumps(name) for name in found) or "nothing"
        raise TapeError(f"{path}: no column {', '.join(lacking)}; found {names}")


def add_counts(total: dict[str, int], more: dict[str, int]) -> None:
    """Adds counts by name."""
    for name, count in more.items():
        total[name] = total.get(name, 0) + count
