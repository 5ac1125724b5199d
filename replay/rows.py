"""Rows of a tape that are read when they are sent: ids, sessions, prefix blocks.

A plan keeps a few numbers per request; all else stays in the segments, and a row group is read when
the first of its rows comes up and dropped after the last. So a tape of any length needs the memory
of a few row groups. `ReadAhead` reads in a thread: a segment's bytes must not stop the event loop.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tokentape.replay.bodies import Bodies
from tokentape.replay.prompts import NO_BLOCKS, Blocks, hashes_of_copy
from tokentape.replay.schedule import PART
from tokentape.traces.errors import TapeError

SESSION = ("session_id", "session_source", "turn_index")
BLOCK = ("block_tokens", "block_unit", "block_scope", "prefix_partial")
COPIED = (*SESSION, *BLOCK, "block_hashes")
MODELS = ("model_requested", "model")  # the first that is known is the one to ask for
TOLD_ANEW = (*MODELS, "endpoint")  # columns that a replayed request has of its own
GROUPS_KEPT = 4  # where rows are asked for in no known order
OPEN_FILES = 4
LOOK_AHEAD = 8_000  # requests: two row groups of the size that a tape is written with
APART = 4 * LOOK_AHEAD  # requests between two uses of a row group that is not kept meanwhile
MOST_HELD = 64  # row groups for requests that wait for others: some hundred MB

Positions = NDArray[np.int32]


@dataclass(frozen=True)
class Group:
    """A row group: `first` is the position of its first row on the tape."""

    file: Path
    number: int
    first: int
    rows: int


class _Loaded:
    """The columns of a row group that say anything at all."""

    def __init__(self, table: pa.Table, bodies: dict[int, bytes]) -> None:
        self.bodies = bodies  # by position on the tape
        columns = {name: table[name].combine_chunks() for name in table.column_names}
        self._ids = columns.pop("request_id").storage
        self.columns = {n: c for n, c in columns.items() if c.null_count < len(c)}

    def request_id(self, at: int) -> bytes:
        return bytes(self._ids[at].as_py())

    def cell(self, name: str, at: int) -> Any:
        column = self.columns.get(name)
        return None if column is None else column[at].as_py()


class TapeRows:
    """Rows by their position on a tape: segment after segment, as they lie in the files.

    It can be sent to another process: what has been read stays here.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        bytes_per_token: float = 1.0,
        bodies: Bodies | None = None,
    ) -> None:
        """Args: bytes_per_token: of prompt text, to count blocks of bytes in tokens."""
        self.bodies = bodies  # where they are to be sent again
        self.groups = list(groups)
        self.bytes_per_token = bytes_per_token
        self.starts = np.array([g.first for g in self.groups], dtype=np.int64)
        self.misses = 0  # row groups that were read while somebody waited
        self._clear()

    def _clear(self) -> None:
        self._loaded: OrderedDict[int, _Loaded] = OrderedDict()
        self._files: OrderedDict[Path, pq.ParquetFile] = OrderedDict()
        self._lock = threading.Lock()
        self._keep: int | None = GROUPS_KEPT

    def __getstate__(self) -> dict[str, Any]:
        """All but what has been read."""
        names = ("groups", "bytes_per_token", "bodies")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As new."""
        self.__init__(**state)  # type: ignore[misc]

    def request_id(self, position: int) -> bytes:
        """The id of a request."""
        loaded, at = self._find(position)
        return loaded.request_id(at)

    def columns(self, position: int, copy: int = 0) -> dict[str, Any]:
        """Columns that a replayed request takes over from its source; no NULL is among them.

        A copy but the first belongs to a session of its own, and to blocks that no other copy has:
        a tape of copies can be replayed, and what its prompts share is what they shared.
        """
        loaded, at = self._find(position)
        cells = {n: column[at] for n, column in loaded.columns.items() if n not in TOLD_ANEW}
        row = {name: cell.as_py() for name, cell in cells.items() if cell.is_valid}
        if copy and "session_id" in row:
            row["session_id"] = f"{row['session_id']}#{copy}"
        if copy and row.get("block_hashes"):
            hashes = np.array(row["block_hashes"], dtype=np.int64)
            row["block_hashes"] = hashes_of_copy(hashes, copy).tolist()
        return row

    def model(self, position: int) -> str | None:
        """The model that was asked for, else the one that answered."""
        loaded, at = self._find(position)
        name: str | None = loaded.cell(MODELS[0], at) or loaded.cell(MODELS[1], at)
        return name

    def body(self, position: int) -> tuple[bytes, str]:
        """The recorded body of a request, and the path that it was posted to."""
        loaded, at = self._find(position)
        return loaded.bodies[position], str(loaded.cell("endpoint", at) or "")

    def blocks(self, position: int) -> Blocks:
        """The prefix blocks of a request, in tokens."""
        loaded, at = self._find(position)
        if "block_hashes" not in loaded.columns:
            return NO_BLOCKS
        hashes = loaded.columns["block_hashes"][at]
        if not hashes.is_valid or not len(hashes.values):
            return NO_BLOCKS
        size = int(loaded.cell("block_tokens", at) or 0)
        if loaded.cell("block_unit", at) == "byte":
            size = round(size / self.bytes_per_token)
        local = loaded.cell("block_scope", at) == "session"
        session = str(loaded.cell("session_id", at)) if local else ""
        return Blocks(hashes.values.to_numpy(), max(1, size), session)

    def group_of(self, positions: Positions) -> NDArray[np.int32]:
        """The row groups that hold these positions."""
        return (np.searchsorted(self.starts, positions, side="right") - 1).astype(np.int32)

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Columns of a row group; those that an old segment lacks are not there."""
        with self._lock:
            return self._read(group, columns)

    def load(self, group: int) -> None:
        """Have a row group ready."""
        with self._lock:
            if group not in self._loaded:
                table = self._read(group, ("request_id", *COPIED, *TOLD_ANEW))
                where = self.groups[group]
                bodies = self.bodies.of(where.first, where.rows) if self.bodies else {}
                self._loaded[group] = _Loaded(table, bodies)
                while self._keep is not None and len(self._loaded) > self._keep:
                    self._loaded.popitem(last=False)

    def keep(self, groups: int | None) -> None:
        """How many row groups stay, the latest ones; None: all until they are dropped."""
        self._keep = groups

    def drop(self, group: int) -> None:
        """Forget a row group."""
        self._loaded.pop(group, None)

    def drop_oldest(self) -> None:
        """Forget the row group that was read first."""
        with contextlib.suppress(KeyError):  # the lock may be held for as long as a read takes
            self._loaded.popitem(last=False)

    @property
    def held(self) -> int:
        """Row groups in memory."""
        return len(self._loaded)

    def group_at(self, position: int) -> int:
        """The row group that holds a position."""
        return int(np.searchsorted(self.starts, position, side="right")) - 1

    def _find(self, position: int) -> tuple[_Loaded, int]:
        group = self.group_at(position)
        loaded = self._loaded.get(group)
        while loaded is None:
            self.misses += 1
            self.load(group)
            loaded = self._loaded.get(group)
        return loaded, position - self.groups[group].first

    def _read(self, group: int, columns: Sequence[str]) -> pa.Table:
        where = self.groups[group]
        try:
            file = self._opened(where.file)
            present = set(file.schema_arrow.names)
            wanted = [name for name in columns if name in present]
            return file.read_row_group(where.number, wanted, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            why = str(error).splitlines()[0][:160]
            raise TapeError(f"{where.file}: cannot be read any more ({why})") from None

    def _opened(self, path: Path) -> pq.ParquetFile:
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = pq.ParquetFile(path)
            while len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        return file


def _uses(rows: TapeRows, positions: Positions) -> NDArray[np.int64]:
    """(row group, first request, last request, requests) of each stretch of a plan that needs one.

    In the order of their first requests.
    """
    found: list[list[int]] = []
    open_uses: dict[int, list[int]] = {}
    for at in range(0, len(positions), PART):  # long arrays in parts, for the sake of memory
        groups = rows.group_of(positions[at : at + PART])
        order = np.argsort(groups, kind="stable")
        of = groups[order]
        begins = np.flatnonzero(
            (np.diff(of, prepend=-1) != 0) | (np.diff(order, prepend=0) > APART)
        )
        ends = np.append(begins[1:], len(of)) - 1
        for group, first, last, count in zip(
            of[begins].tolist(),
            (at + order[begins]).tolist(),
            (at + order[ends]).tolist(),
            (ends - begins + 1).tolist(),
            strict=True,
        ):
            use = open_uses.get(group)
            if use is not None and first - use[2] <= APART:
                use[2] = last
                use[3] += count
            else:
                open_uses[group] = [group, first, last, count]
                found.append(open_uses[group])
    uses = np.array(found, dtype=np.int64).reshape(-1, 4)
    return uses[np.argsort(uses[:, 1], kind="stable")]


class ReadAhead:
    """Reads the row groups of a share in the order in which its requests come up.

    `built` is told of each request that has been built; it never waits. `most_held`: row groups
    that are needed at one time, because rows were sealed in another order than they arrived, or
    copies of them are sent at several times. One that is not needed for long goes and comes back. A
    request that comes up late, as it waits for another, keeps its row group, unless MOST_HELD are
    held: then the oldest goes, and is read again.
    """

    def __init__(self, rows: TapeRows, positions: Positions) -> None:
        self._rows = rows
        self._positions = positions
        uses = _uses(rows, positions)
        self._opening, self._first = uses[:, 0], uses[:, 1]
        self._left = uses[:, 3].tolist()  # requests that are not built, of each use
        self._of_group: dict[int, list[int]] = {}  # its uses
        for number, group in enumerate(self._opening.tolist()):
            self._of_group.setdefault(group, []).append(number)
        ended = np.searchsorted(np.sort(uses[:, 2]), self._first, side="left")
        self.most_held = int((np.arange(1, len(uses) + 1) - ended).max(initial=0))
        self._furthest = self._loaded = 0
        self._wanted = 0  # uses whose row groups are to be there
        self._wake = threading.Event()
        self._ended = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Read what comes first, here and now, and go on in a thread."""
        self._rows.keep(None)
        self._want()
        while self._loaded < self._wanted:
            self._load_next()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def built(self, number: int) -> None:
        """A request has been built: what it alone needed goes, what is next comes."""
        group = self._rows.group_at(int(self._positions[number]))
        uses = self._of_group[group]
        use = next(u for u in reversed(uses) if self._first[u] <= number)
        self._left[use] -= 1
        if not self._left[use]:
            self._drop(group)
        elif self._rows.held > max(MOST_HELD, 2 * self.most_held):
            self._rows.drop_oldest()
        if number >= self._furthest:
            self._furthest = number + 1
            self._want()

    def _want(self) -> None:
        wanted = self._wanted
        while wanted < len(self._first) and self._first[wanted] < self._furthest + LOOK_AHEAD:
            wanted += 1
        if wanted > self._wanted:
            self._wanted = wanted
            self._wake.set()

    def _drop(self, group: int) -> None:
        """Forget a row group that no use needs now."""
        if not any(self._left[use] for use in self._of_group[group] if use < self._loaded):
            self._rows.drop(group)

    def stop(self) -> None:
        """End the thread."""
        self._ended = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        self._rows.keep(GROUPS_KEPT)

    def _run(self) -> None:
        # Not niced: while it holds the interpreter's lock and is not run, the event loop waits.
        while not self._ended:
            self._wake.wait()
            self._wake.clear()
            with contextlib.suppress(TapeError):  # whoever needs it meets it again, and says it
                while self._loaded < self._wanted and not self._ended:
                    self._load_next()

    def _load_next(self) -> None:
        use = self._loaded
        group = int(self._opening[use])
        self._loaded += 1
        if self._left[use]:
            self._rows.load(group)
        if not self._left[use]:  # meanwhile somebody read and dropped it
            self._drop(group)
