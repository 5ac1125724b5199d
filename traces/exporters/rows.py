"""What the exporters share: the rows of a tape in order of arrival, and the ids of their blocks.

Ids that a public trace came with go out as they are; keyed hashes of a capture never do: they are
numbered in order of appearance, which keeps what they say and nothing else.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tokentape.traces.reader import Tape

Window = tuple[int | None, int | None]
Row = dict[str, Any]

NO_VALUE = "no_value"  # the tape does not know its input or output tokens
NO_GENERATION = "no_generation"  # an embedding, a ranking
BATCH_ROWS = 5_000
GENERATING = ("chat", "text_completion", None)
PREFIX = ("block_hashes", "block_tokens", "block_unit", "block_scope", "session_id")
BYTES_PER_TOKEN = 4.0  # where a tape with byte blocks knows no tokens at all


@dataclass
class Exported:
    """read = written + the sum of dropped, by reason; notes say what was lost or chosen."""

    read: int = 0
    written: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def drop(self, reason: str) -> None:
        """Counts a row that cannot go out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


class Requests:
    """The rows of a tape that a window holds, with the columns asked for, in order of arrival."""

    def __init__(self, tape: Tape, columns: Sequence[str], window: Window) -> None:
        names = list(dict.fromkeys(["arrival_ns", "operation", *columns]))
        table = tape.read(names)
        arrival = table["arrival_ns"]
        first = pc.min(arrival).as_py() or 0
        start, end = window
        if start is not None:
            table = table.filter(pc.greater_equal(table["arrival_ns"], first + start))
        if end is not None:
            table = table.filter(pc.less(table["arrival_ns"], first + end))
        self.tape = tape
        self.table = table
        self.first_ns = first

    @property
    def dated(self) -> bool:
        """False for the tape of a trace whose times count from its own zero."""
        return bool(self.tape.facts.get("source", {}).get("wall_epoch_known", True))

    @property
    def zero_ns(self) -> int:
        """Tape time of what the exported times count from: the trace's own zero, else the start."""
        return self.first_ns if self.dated else -int(self.tape.facts["wall_epoch_unix_ns"])

    def rows(self) -> Iterator[Row]:
        """Every row as a dictionary."""
        for batch in self.table.to_batches(BATCH_ROWS):
            yield from batch.to_pylist()

    def generations(self, done: Exported) -> Iterator[Row]:
        """The rows that ask for tokens and say how many; others are counted in `done`."""
        for row in self.rows():
            done.read += 1
            if row["operation"] not in GENERATING:
                done.drop(NO_GENERATION)
            elif row["input_tokens"] is None or row["output_tokens"] is None:
                done.drop(NO_VALUE)
            else:
                done.written += 1
                yield row


class Prefixes:
    """Block ids as other formats have them: whole numbers from 0, one for each block of a prompt.

    `block_tokens` is the size that most rows have, or 0 where none has any; rows of another size
    have no ids. A block of which the tape knows no hash (the part block at the end of a list that
    holds full blocks only) gets an id that no other block has.
    """

    def __init__(self, requests: Requests, *, keep: bool = True, first_id: int = 0) -> None:
        table = requests.table
        self.byte_blocks = bool(pc.any(pc.equal(table["block_unit"], "byte")).as_py())
        sizes = Counter(table["block_tokens"].drop_null().to_pylist())
        self._size = sizes.most_common(1)[0][0] if sizes else 0
        self.other_sizes = sum(sizes.values()) - sizes.get(self._size, 0)
        ratio = _bytes_per_token(table) if self.byte_blocks else 1.0
        self.block_tokens = max(1, round(self._size / ratio)) if self._size else 0
        self.as_they_are = keep and _public(requests)
        self._ids: dict[Any, int] = {}
        self._next = self._first = first_id
        if self.as_they_are and self._size:
            highest = pc.max(pc.list_flatten(table["block_hashes"])).as_py()
            self._next = max(first_id, (highest or 0) + 1)

    def afresh(self) -> "Prefixes":
        """The same for another file, whose numbers begin anew."""
        other = copy.copy(self)
        other._ids, other._next = {}, self._first  # noqa: SLF001 - its own kind
        return other

    def of(self, row: Row, *, part_block: bool) -> list[int] | None:
        """The ids of a row's blocks, with or without one for a last part block; None: unknown."""
        hashes = row["block_hashes"]
        if hashes is None or row["block_tokens"] != self._size or not self._size:
            return None
        tokens = row["input_tokens"]
        count = -(-tokens // self.block_tokens) if part_block else tokens // self.block_tokens
        scope = row["session_id"] if row["block_scope"] == "session" else None
        ids = [h if self.as_they_are else self._numbered((scope, h)) for h in hashes[:count]]
        while len(ids) < count:
            ids.append(self._next)
            self._next += 1
        return ids

    def _numbered(self, key: tuple[Any, int]) -> int:
        known = self._ids.get(key)
        if known is None:
            known = self._ids[key] = self._next
            self._next += 1
        return known

    def notes(self) -> list[str]:
        """What somebody has to know to use the ids."""
        said = []
        if self.block_tokens:
            said.append(f"one hash id for {self.block_tokens} tokens")
        if self.byte_blocks:
            said.append("blocks were bytes of text: their sizes in tokens are approximate")
        if self.other_sizes:
            said.append(f"{self.other_sizes} rows with blocks of another size go out without ids")
        return said


def _public(requests: Requests) -> bool:
    """True where the ids came with a public trace and can be told apart from keyed hashes."""
    if requests.tape.role != "import":
        return False
    lowest = pc.min(pc.list_flatten(requests.table["block_hashes"])).as_py()
    return lowest is None or lowest >= 0


def _bytes_per_token(table: pa.Table) -> float:
    """One ratio for the tape, so that equal blocks stay equally long."""
    known = pc.and_(pc.greater(table["input_tokens"], 0), pc.is_valid(table["block_hashes"]))
    rows = table.filter(pc.fill_null(known, fill_value=False))
    full = pc.sum(pc.multiply(pc.list_value_length(rows["block_hashes"]), rows["block_tokens"]))
    units = (full.as_py() or 0) + (pc.sum(rows["prefix_partial"]).as_py() or 0)
    tokens = pc.sum(rows["input_tokens"]).as_py() or 0
    return units / tokens if units and tokens else BYTES_PER_TOKEN


def open_out(path: Path) -> Any:
    """A text file with Unix line ends, buffered for many small writes."""
    return path.open("w", encoding="utf-8", newline="\n", buffering=1 << 20)
