"""Opens tapes for reading: facts, segments, counts. A reader never writes a tape.

It says how many rows are not sealed yet instead of sealing them. Damaged segments are named; with
`skip_damaged` the rest is read.
"""

import glob
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokentape.traces import journal
from tokentape.traces.columns import requests_table
from tokentape.traces.errors import TapeError
from tokentape.traces.facts import read_facts
from tokentape.traces.schema import REQUESTS

_PREFIX = b"tokentape."


@dataclass(frozen=True)
class Segment:
    """One sealed Parquet file and what its footer says."""

    path: Path
    rows: int
    events: int
    metadata: dict[str, str]

    @property
    def anchors(self) -> list[dict[str, int]]:
        """(wall, monotonic) pairs of the clock that stamped the rows; empty for an import."""
        return list(json.loads(self.metadata.get("anchors", "[]")))


@dataclass(frozen=True)
class Tape:
    """An opened tape: facts and footers; rows are read when asked for."""

    path: Path
    facts: dict[str, Any]
    segments: list[Segment]
    telemetry_files: list[Path]
    damaged: list[tuple[Path, str]]
    unsealed_rows: int
    open_rows: int

    @property
    def role(self) -> str:
        """capture, replay, simulation or import."""
        return str(self.facts["role"])

    @property
    def rows(self) -> int:
        """Sealed rows, by the footers."""
        return sum(s.rows for s in self.segments)

    @property
    def events(self) -> int:
        """Sealed events, by the footers."""
        return sum(s.events for s in self.segments)

    @property
    def losses(self) -> dict[str, int]:
        """What was seen and is not on the tape, by reason, over all incarnations."""
        total: dict[str, int] = {}
        for counts in self.facts.get("losses", {}).values():
            for reason, n in counts.items():
                total[reason] = total.get(reason, 0) + n
        return total

    @property
    def sampled_out(self) -> int:
        """Requests that were seen and got no row by intent (`capture --sample`)."""
        return sum(self.facts.get("sampled_out", {}).values())

    @property
    def deleted(self) -> int:
        """Rows that were on the tape and were deleted for age or size (`capture --retain`)."""
        return sum(self.facts.get("deleted", {}).values())

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """All sealed rows in order of arrival; columns that an old segment lacks are NULL."""
        names = columns or REQUESTS.names
        order_by = [n for n in ("arrival_ns",) if n not in names]
        wanted = pa.schema([REQUESTS.field(n) for n in [*names, *order_by]])
        parts = [_read_segment(s.path, wanted) for s in self.segments]
        if not parts:
            return requests_table([]).select(names)  # Arrow makes no empty lists of UUIDs itself
        table = pa.concat_tables(parts).combine_chunks()
        order = pc.sort_indices(table["arrival_ns"])
        return table.take(order).select(names)

    def parts(self, columns: list[str]) -> Iterator[pa.Table]:
        """The sealed rows, a segment at a time and in its order; at least one table, if empty."""
        if not self.segments:
            yield self.read(columns)
        wanted = pa.schema([REQUESTS.field(n) for n in columns])
        for segment in self.segments:
            yield _read_segment(segment.path, wanted)

    def sql(self, query: str) -> Any:
        """Run SQL over the standard views; a DuckDB relation. Needs the analysis room."""
        return _sql([self], query)

    def report(self) -> Any:
        """The report: its text by print(), its page with charts where a notebook shows it."""
        return _report([self])


class Tapes(list[Tape]):
    """Several tapes with the questions that one answers; iterate for the tapes themselves."""

    @property
    def rows(self) -> int:
        """Sealed rows of all."""
        return sum(t.rows for t in self)

    @property
    def events(self) -> int:
        """Sealed events of all."""
        return sum(t.events for t in self)

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """The rows of all, tape after tape."""
        return pa.concat_tables([t.read(columns) for t in self])

    def sql(self, query: str) -> Any:
        """As Tape.sql; the column `run` tells the tapes apart."""
        return _sql(list(self), query)

    def report(self) -> Any:
        """As Tape.report, the tapes side by side."""
        return _report(list(self))


def _sql(tapes: list[Tape], query: str) -> Any:
    session = importlib.import_module("tokentape.analysis.session")
    return session.connect(tapes).sql(query)


def _report(tapes: list[Tape]) -> Any:
    return importlib.import_module("tokentape.analysis.notebook").shown(tapes)


def open_any(path_or_glob: str | Path, *, skip_damaged: bool = False) -> Tape | Tapes:
    """A Tape for the path of one, Tapes for a pattern; TapeError when there is none."""
    if glob.has_magic(str(path_or_glob)) and not Path(path_or_glob).exists():
        return open_tapes(path_or_glob, skip_damaged=skip_damaged)
    return open_tape(path_or_glob, skip_damaged=skip_damaged)


def open_tape(path: str | Path, *, skip_damaged: bool = False) -> Tape:
    """Open one tape; TapeError names what is wrong, a damaged segment included."""
    tape = Path(path)
    facts = read_facts(tape)
    segments: list[Segment] = []
    damaged: list[tuple[Path, str]] = []
    for file in sorted((tape / "requests").glob("**/*.parquet")):
        try:
            segments.append(_footer(file))
        except FileNotFoundError:  # deleted for its age since it was listed
            continue
        except (pa.ArrowException, OSError, ValueError) as error:
            damaged.append((file, _first_line(error)))
    if damaged and not skip_damaged:
        file, why = damaged[0]
        raise TapeError(f"{file}: damaged segment ({why}); --skip-damaged reads the others")
    finished, unfinished = journal.count_unsealed(tape)
    return Tape(
        tape,
        facts,
        segments,
        sorted((tape / "telemetry").glob("*.parquet")),
        damaged,
        finished,
        unfinished,
    )


def open_tapes(pattern: str | Path, *, skip_damaged: bool = False) -> Tapes:
    """Open the tapes that a glob names, in order of their names; TapeError when there is none."""
    paths = sorted(glob.glob(str(pattern)))  # noqa: PTH207 - a pattern may begin anywhere
    if not paths:
        raise TapeError(f"{pattern}: matches no tape")
    return Tapes(open_tape(p, skip_damaged=skip_damaged) for p in paths)


def _footer(file: Path) -> Segment:
    parquet = pq.read_metadata(file)
    raw = parquet.metadata or {}
    metadata = {
        k.removeprefix(_PREFIX).decode(): v.decode()
        for k, v in raw.items()
        if k.startswith(_PREFIX)
    }
    if "rows" not in metadata or int(metadata["rows"]) != parquet.num_rows:
        raise ValueError(
            f"{parquet.num_rows} rows, its footer says {metadata.get('rows', 'nothing')}"
        )
    return Segment(file, parquet.num_rows, int(metadata.get("events", 0)), metadata)


def _read_segment(file: Path, wanted: pa.Schema) -> pa.Table:
    with pq.ParquetFile(file) as parquet:
        present = set(parquet.schema_arrow.names)
        table = parquet.read([n for n in wanted.names if n in present])
    columns = [
        table[f.name].cast(f.type) if f.name in present else pa.nulls(table.num_rows, f.type)
        for f in wanted
    ]
    return pa.Table.from_arrays(columns, schema=wanted)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__
