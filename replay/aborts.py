"""Where clients left before a reply had ended, so that a replay leaves there, too.

A client that left a stream is known by the events that it had; one that left before the first, or
that had not asked for a stream, by the time that it had waited. Reads a tape; sends nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tokentape.replay.exchange import ABORTED
from tokentape.replay.rows import Group

Ints = NDArray[np.int64]
UNKNOWN_NS = -1
MORE_TOKENS = 256  # asked for beyond what the client had, where its own limit is not known


@dataclass(frozen=True)
class Leaving:
    """How one request is left: after so many events, or where that is 0 after so long.

    asked_tokens: what the reply would have had at most; 0: not known.
    """

    events: int
    after_ns: int
    asked_tokens: int

    def asked(self, got_tokens: int, input_tokens: int, most: int | None) -> int:
        """Output tokens to ask for, so that there is a reply to leave; `most` in one request."""
        least = got_tokens + 1
        wanted = self.asked_tokens if self.asked_tokens > got_tokens else got_tokens + MORE_TOKENS
        return wanted if most is None else max(least, min(wanted, most - input_tokens))


@dataclass(frozen=True)
class Aborts:
    """The requests of a tape whose clients left: by row, how each did."""

    by_row: dict[int, Leaving] = field(default_factory=dict)

    def of(self, rows: NDArray[np.int32]) -> "Aborts":
        """Those of some rows."""
        return Aborts({row: self.by_row[row] for row in self._among(rows)})

    def count(self, rows: NDArray[np.int32]) -> int:
        """How many requests of a plan that sends these rows are left early."""
        return len(self._among(rows))

    def _among(self, rows: NDArray[np.int32]) -> list[int]:
        here = np.isin(rows, np.fromiter(self.by_row, np.int32, len(self.by_row)))
        return [int(row) for row in rows[here]] if self.by_row else []

    def lines(self, rows: NDArray[np.int32]) -> list[str]:
        """What is said of them in a plan that sends these rows."""
        sent = self._among(rows)
        if not sent:
            return []
        counted = sum(self.by_row[row].events > 0 for row in sent)
        how = f"{counted:,} after as many events, {len(sent) - counted:,} after as long"
        return [f"  aborts: {len(sent):,} replies are left as their clients left them: {how}"]


@dataclass
class AbortScan:
    """Gathers them, batch after batch."""

    _found: list[tuple[Ints, Ints, Ints]] = field(default_factory=list)

    def take(self, table: pa.Table, at: int) -> None:
        """Add a batch whose first row has the position `at`."""
        left = pc.fill_null(pc.equal(table["outcome"], ABORTED), fill_value=False)
        rows = np.flatnonzero(np.asarray(left))
        if len(rows):
            some = table.take(pa.array(rows))
            began = pc.coalesce(some["send_ns"], some["arrival_ns"])
            lasted = pc.fill_null(pc.subtract(some["end_ns"], began), UNKNOWN_NS)
            asked = pc.fill_null(some["max_tokens"].cast(pa.int64()), 0)
            self._found.append((rows + at, lasted.to_numpy(), asked.to_numpy()))

    def aborts(self, groups: Sequence[Group]) -> Aborts:
        """What was found; of the streams, the events are counted in their row groups."""
        if not self._found:
            return Aborts()
        rows, lasted, asked = (np.concatenate(parts) for parts in zip(*self._found, strict=True))
        events = np.zeros(len(rows), dtype=np.int64)
        for group in groups:
            here = np.flatnonzero((rows >= group.first) & (rows < group.first + group.rows))
            if len(here):
                events[here] = _event_counts(group)[rows[here] - group.first]
        known = (events > 0) | (lasted >= 0)
        found = zip(*(a[known].tolist() for a in (rows, events, lasted, asked)), strict=True)
        return Aborts({row: Leaving(*how) for row, *how in found})


def _event_counts(group: Group) -> Ints:
    """Events of each row of a row group; 0 where there are none, or no list."""
    with pq.ParquetFile(group.file) as file:
        if "off_us" not in file.schema_arrow.names:
            return np.zeros(group.rows, dtype=np.int64)
        lists = file.read_row_group(group.number, ["off_us"])["off_us"]
    return np.asarray(pc.fill_null(pc.list_value_length(lists), 0).to_numpy(), dtype=np.int64)
