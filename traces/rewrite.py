"""Many segments to few sorted ones, a slice of time at a time.

Of all rows only their times stay in memory (8 bytes each); a slice is read from the row groups that
reach into it, sorted, and appended to its day's file. It knows nothing of tapes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tokentape.traces.errors import TapeError
from tokentape.traces.writer import ROW_GROUP_ROWS, segment_file

FILE_BYTES = 128 << 20  # a file that has grown beyond gets no further slice
SLICE_VALUES = 4_000_000  # of the lists of a slice, about: 64 MB, thrice while it is sorted
DAY_NS = 86_400_000_000_000

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """A file to read; what is added to its times."""

    path: Path
    shift_ns: int = 0


@dataclass
class Rewritten:
    """What was written; `duplicates` were there already."""

    files: int
    rows: int
    events: int
    duplicates: int

    def add(self, slice_: pa.Table, duplicates: int) -> None:
        """Count what was written of a slice, and what was not."""
        self.rows += slice_.num_rows
        self.events += _events(slice_)
        self.duplicates += duplicates

    def text(self) -> str:
        """One line for people."""
        twice = f"; {self.duplicates} were there twice" if self.duplicates else ""
        return f"{self.rows} rows, {self.events} events in {self.files} files{twice}"


@dataclass(frozen=True)
class _Group:
    part: Part
    number: int
    first_ns: int
    last_ns: int


class Rewriter:
    """Sorts files of one schema by one of its times.

    Args: instants: all columns that are times, shifted with their file. without_duplicates: what
    drops rows of a slice that say the same as earlier ones; equal rows have equal times.
    """

    def __init__(
        self,
        schema: pa.Schema,
        key: str,
        instants: frozenset[str],
        without_duplicates: Callable[[pa.Table], pa.Table],
    ) -> None:
        self._schema = schema
        self._key = key
        self._instants = instants
        self._without_duplicates = without_duplicates

    def write(
        self,
        parts: list[Part],
        epoch_unix_ns: int,
        path_of: Callable[[str, int], Path],
        footer: dict[str, Any],
    ) -> Rewritten:
        """Write everything; `path_of(day, number)` names the files. TapeError for unknown columns.

        The counts that readers expect are added to the footer.
        """
        groups, times_ns, values = self._survey(parts)
        if not len(times_ns):
            return Rewritten(0, 0, 0, 0)
        per_row = max(values // len(times_ns), 1)
        size = int(np.clip(SLICE_VALUES // per_row, 1, 5 * ROW_GROUP_ROWS))
        edges = _edges(times_ns, size, epoch_unix_ns)
        del times_ns
        done = Rewritten(0, 0, 0, 0)
        days = (edges[:-1] + epoch_unix_ns) // DAY_NS
        at = 0
        while at < len(days):
            day = datetime.fromtimestamp(int(days[at]) * DAY_NS / 1e9, tz=UTC)
            path = path_of(f"{day:%Y-%m-%d}", done.files)
            path.parent.mkdir(parents=True, exist_ok=True)
            rows, events, begun = done.rows, done.events, at
            with segment_file(path, self._schema, footer) as (writer, out):
                while at == begun or (
                    at < len(days) and days[at] == days[begun] and out.tell() < FILE_BYTES
                ):
                    found = self._slice(groups, int(edges[at]), int(edges[at + 1]))
                    kept = self._without_duplicates(found)
                    writer.write_table(kept.cast(writer.schema), ROW_GROUP_ROWS)
                    done.add(kept, found.num_rows - kept.num_rows)
                    at += 1
                counts = {"rows": done.rows - rows, "events": done.events - events}
                writer.add_key_value_metadata({f"tokentape.{k}": str(n) for k, n in counts.items()})
            done.files += 1
        return done

    def _survey(self, parts: list[Part]) -> tuple[list[_Group], Ints, int]:
        """(row groups, all times, values in all columns' lists)."""
        groups: list[_Group] = []
        times = [np.empty(0, dtype=np.int64)]
        values = 0
        for part in parts:
            with pq.ParquetFile(part.path) as file:
                unknown = set(file.schema_arrow.names) - set(self._schema.names)
                if unknown:
                    raise TapeError(f"{part.path}: has the unknown column {min(unknown)}")
                for number in range(file.num_row_groups):
                    key = file.read_row_group(number, columns=[self._key])[self._key]
                    found = self._times(key) + part.shift_ns
                    if len(found):
                        ends = (int(found.min()), int(found.max()))
                        groups.append(_Group(part, number, *ends))
                    times.append(found)
                    values += _values(file.metadata.row_group(number))
        return groups, np.concatenate(times), values

    def _times(self, key: pa.ChunkedArray) -> Ints:
        """NULL is the file's zero: a row without a time goes on the tape all the same."""
        return np.asarray(pc.fill_null(key, 0), dtype=np.int64)

    def _slice(self, groups: list[_Group], begin_ns: int, end_ns: int) -> pa.Table:
        """The rows of [begin, end), sorted; equal times in the order of the files."""
        tables = []
        for group in groups:
            if group.last_ns < begin_ns or group.first_ns >= end_ns:
                continue
            with pq.ParquetFile(group.part.path) as file:
                table = file.read_row_group(group.number)
            times_ns = self._times(table[self._key]) + group.part.shift_ns
            here = (times_ns >= begin_ns) & (times_ns < end_ns)
            tables.append(self._shifted(table.filter(pa.array(here)), group.part.shift_ns))
        table = pa.concat_tables(tables).combine_chunks()
        return table.take(pc.sort_indices(pc.fill_null(table[self._key], 0)))

    def _shifted(self, table: pa.Table, shift_ns: int) -> pa.Table:
        """With every column of the schema; times moved."""
        columns = []
        for field in self._schema:
            if field.name not in table.column_names:
                columns.append(pa.nulls(table.num_rows, field.type))
                continue
            column = table[field.name].cast(field.type)
            moved = shift_ns and field.name in self._instants
            columns.append(pc.add(column, shift_ns) if moved else column)
        return pa.Table.from_arrays(columns, schema=self._schema)


def _edges(times_ns: Ints, size: int, epoch_unix_ns: int) -> Ints:
    """Where slices of about `size` rows begin and end; days begin slices, too."""
    times_ns.sort()
    cuts = times_ns[::size]
    first, last = int(times_ns[0]), int(times_ns[-1])
    days = range((first + epoch_unix_ns) // DAY_NS + 1, (last + epoch_unix_ns) // DAY_NS + 1)
    midnights = np.array([day * DAY_NS - epoch_unix_ns for day in days], dtype=np.int64)
    with_days = np.concatenate([cuts, midnights])
    begins = np.unique(with_days)
    # A slice between two edges without a row would read nothing.
    at = np.searchsorted(times_ns, begins)
    filled = np.diff(np.append(at, len(times_ns))) > 0
    return np.append(begins[filled], last + 1)


def _values(group: Any) -> int:
    return int(max(group.column(n).num_values for n in range(group.num_columns)))


def _events(table: pa.Table) -> int:
    if "off_us" not in table.column_names:
        return 0
    return int(pc.sum(pc.list_value_length(table["off_us"])).as_py() or 0)


def without_same_ids(table: pa.Table) -> pa.Table:
    """The first row of each request id."""
    ids = table["request_id"].combine_chunks().storage
    if ids.null_count:
        raise TapeError("a row has no request_id: `tokentape check` says which")
    values = np.frombuffer(ids.buffers()[1], dtype="S16")[ids.offset : ids.offset + len(ids)]
    _, first = np.unique(values, return_index=True)
    return table if len(first) == len(table) else table.take(np.sort(first))


def without_same_samples(table: pa.Table) -> pa.Table:
    """Each telemetry sample once."""
    distinct = table.group_by(table.column_names, use_threads=False).aggregate([])
    return table if len(distinct) == len(table) else distinct
