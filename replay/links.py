"""Who waited for whom on a tape, and how long after: the dependencies of turns and of agents.

A link goes from a request to one of its `parents`. What was offered before its parent had ended did
not wait for that end: such a link is parallel, and counts from the parent's own arrival. It sends
nothing and decides no due time; `turns.py` does.
"""

from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tokentape.replay.sessions import Digests, Numbers, mixed
from tokentape.traces.reader import Tape

Ints = NDArray[np.int64]
UNKNOWN = np.iinfo(np.int64).min
NOT_ON_TAPE = -1
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Links:
    """The links of a tape, by row of the child.

    child, parent: int32[m], rows; a parent is NOT_ON_TAPE where the tape lacks it. wait_ns:
    int64[m], from the parent's end to the child's arrival (the think time, the same for all parents
    of a child); where `parallel`, from the parent's arrival instead. slack_ns: int64[m], how much
    later than this link alone asks the child arrived, because it waited for another parent.
    cycle: rows of which each waits for the next, the first one again at the end; empty: none.
    """

    child: Numbers
    parent: Numbers
    wait_ns: Ints
    parallel: NDArray[np.bool_]
    slack_ns: Ints
    cycle: tuple[int, ...] = ()
    backward: int = 0  # parents that came after their child, so that it cannot have waited
    unknown_think: int = 0  # requests sent at once after their parents, as no time is known

    def __len__(self) -> int:
        return len(self.child)

    @property
    def missing(self) -> int:
        """Parents that are not on the tape."""
        return int(np.count_nonzero(self.parent == NOT_ON_TAPE))


_NONE = np.empty(0, np.int64)
_NO_ROWS = _NONE.astype(np.int32)
NO_LINKS = Links(_NO_ROWS, _NO_ROWS, _NONE, _NONE.astype(np.bool_), _NONE)


@dataclass
class LinkScan:
    """Gathers the links of a tape, batch after batch."""

    _rows: list[Ints] = field(default_factory=list)
    _parents: list[Digests] = field(default_factory=list)
    _think_ns: list[Ints] = field(default_factory=list)

    def take(self, table: pa.Table, at: int) -> None:
        """Add a batch whose first row has the position `at`."""
        lists = table["parents"].combine_chunks()
        owner = np.asarray(pc.list_parent_indices(lists), dtype=np.int64)
        if len(owner):
            think = pc.fill_null(table["think_ns"].cast(pa.int64()), UNKNOWN)
            self._rows.append(owner + at)
            self._parents.append(_id_keys(pc.list_flatten(lists)))
            self._think_ns.append(think.to_numpy()[owner])

    def links(self, tape: Tape, arrival_ns: Ints, duration_ns: Ints) -> Links:
        """What was found; `duration_ns` is 0 or less where an end is not known."""
        if not self._rows:
            return NO_LINKS
        child = np.concatenate(self._rows)
        parent = _positions(tape, np.concatenate(self._parents))
        cycle = _cycle(child, parent, arrival_ns)
        return _measured(
            child, parent, np.concatenate(self._think_ns), arrival_ns, duration_ns, cycle
        )


def _id_keys(ids: pa.Array) -> Digests:
    """64 bits of each 128-bit id: two ids of one key are on no tape of this world."""
    storage = ids.storage if isinstance(ids, pa.ExtensionArray) else ids
    data = storage.buffers()[1]
    words = np.frombuffer(data, dtype=">u8", count=2 * len(storage), offset=16 * storage.offset)
    high, low = words.astype(np.uint64).reshape(-1, 2).T
    return np.asarray(mixed(high * _ODD + mixed(low)))


def _positions(tape: Tape, parents: Digests) -> Ints:
    """The rows of these ids, NOT_ON_TAPE where there is none. Reads the ids of all rows."""
    keys, inverse = np.unique(parents, return_inverse=True)
    where = np.full(len(keys), NOT_ON_TAPE, dtype=np.int64)
    at = 0
    for segment in tape.segments:
        with pq.ParquetFile(segment.path) as file:
            for number in range(file.num_row_groups):
                ids = file.read_row_group(number, ["request_id"])["request_id"]
                here = _id_keys(ids.combine_chunks())
                place = np.minimum(np.searchsorted(keys, here), len(keys) - 1)
                found = np.flatnonzero(keys[place] == here)
                where[place[found]] = at + found
                at += len(here)
    return where[inverse]


def _cycle(child: Ints, parent: Ints, arrival_ns: Ints) -> tuple[int, ...]:
    """Rows that wait for each other in a ring; none where all parents arrived first."""
    here = parent != NOT_ON_TAPE
    child, parent = child[here], parent[here]
    if bool(np.all(arrival_ns[parent] < arrival_ns[child])):
        return ()
    graph: dict[int, list[int]] = {}
    for one, other in zip(child.tolist(), parent.tolist(), strict=True):
        graph.setdefault(one, []).append(other)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return tuple(reversed(error.args[1]))
    return ()


def _measured(
    child: Ints,
    parent: Ints,
    think_ns: Ints,
    arrival_ns: Ints,
    duration_ns: Ints,
    cycle: tuple[int, ...],
) -> Links:
    """With the times of each link: the recorded think time first, else from the parents' ends."""
    here = parent != NOT_ON_TAPE
    known = here & (duration_ns[parent] > 0)
    gap_ns = np.where(known, arrival_ns[child] - arrival_ns[parent] - duration_ns[parent], UNKNOWN)
    offset_ns = np.where(here, arrival_ns[child] - arrival_ns[parent], 0)
    recorded = think_ns >= 0
    below_zero = (think_ns < 0) & (think_ns != UNKNOWN)
    parallel = here & ~recorded & np.where(known, gap_ns < 0, below_zero)
    waiting = here & ~parallel
    least = np.full(len(arrival_ns), np.iinfo(np.int64).max)
    at = np.flatnonzero(waiting & known)
    np.minimum.at(least, child[at], gap_ns[at])  # the last end: the least gap
    computed = least[child]
    blind = waiting & ~recorded & (computed == np.iinfo(np.int64).max)
    wait = np.where(recorded, think_ns, np.where(blind, 0, computed))
    wait = np.where(parallel, offset_ns, np.where(here, wait, 0))
    slack = np.where(waiting & known, np.maximum(gap_ns - wait, 0), 0)
    backward = here & parallel & (offset_ns < 0)
    kept = np.flatnonzero(~backward)
    return Links(
        child[kept].astype(np.int32),
        parent[kept].astype(np.int32),
        np.maximum(wait[kept], 0),
        parallel[kept],
        slack[kept],
        cycle,
        int(np.count_nonzero(backward)),
        len(np.unique(child[blind])),
    )


def together(sessions: Numbers, links: Links) -> Numbers:
    """Who must not be parted, by row: sessions, joined where a request of one waits for another's.

    The same array where no two are joined; -1 for a request that is by itself.
    """
    here = links.parent != NOT_ON_TAPE
    child, parent = links.child[here], links.parent[here]
    width = int(sessions.max(initial=-1)) + 1
    one, other = (_node(sessions, rows, width) for rows in (child, parent))
    apart = one != other
    if not apart.any():
        return sessions
    heads = _joined(one[apart].tolist(), other[apart].tolist())
    nodes = np.fromiter(heads.keys(), dtype=np.int64, count=len(heads))
    head = np.fromiter(heads.values(), dtype=np.int64, count=len(heads))
    order = np.argsort(nodes)
    nodes, head = nodes[order], head[order]
    mine = _node(sessions, np.arange(len(sessions)), width)
    place = np.minimum(np.searchsorted(nodes, mine), len(nodes) - 1)
    is_joined = nodes[place] == mine
    mine[is_joined] = head[place[is_joined]]
    alone = (sessions < 0) & ~is_joined
    known = pa.array(mine, mask=alone).dictionary_encode().indices
    return np.asarray(known.fill_null(-1).to_numpy(zero_copy_only=False), dtype=np.int32)


def _node(sessions: Numbers, rows: NDArray[np.integer], width: int) -> Ints:
    """The session of each row, or a number of its own."""
    mine = sessions[rows].astype(np.int64)
    return np.where(mine < 0, rows + np.int64(width), mine)


def _joined(one: list[int], other: list[int]) -> dict[int, int]:
    """The head of each node's group, by union-find."""
    head: dict[int, int] = {}

    def find(node: int) -> int:
        path = []
        while (above := head.setdefault(node, node)) != node:
            path.append(node)
            node = above
        for below in path:
            head[below] = node
        return node

    for a, b in zip(one, other, strict=True):
        first, second = sorted((find(a), find(b)))
        head[second] = first
    return {node: find(node) for node in list(head)}


def digests_of(groups: Numbers, sessions: Digests) -> Digests:
    """A digest for each row that all of a group share: that of its first row's session, or row."""
    count = int(groups.max(initial=-1)) + 1
    first = np.full(count, len(groups), dtype=np.int64)
    inside = np.flatnonzero(groups >= 0)
    np.minimum.at(first, groups[inside], inside)
    of_group = sessions[first]
    nameless = of_group == 0
    of_group[nameless] = mixed(first[nameless].astype(np.uint64) + _ODD)
    digests = sessions.copy()
    digests[inside] = of_group[groups[inside]]
    return digests
