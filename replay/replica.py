"""What one replica of a fleet would have got of the fleet's tape: a router is simulated. Pure.

The router sees arrivals, how long each request lasted when it was recorded, and, for `prefix`, the
prefix blocks. It is a model: the fleet's real router had its own rule, and a replica of other
hardware would have been more or less loaded. The plan compares it with thinning by session.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from tokentape.replay.operators import Kin, Operator, Selected, Thin
from tokentape.traces.errors import UsageError

Routing = Literal["round-robin", "least-loaded", "prefix"]
ROUTINGS: tuple[Routing, ...] = ("round-robin", "least-loaded", "prefix")

# As SGLang's cache-aware router has them: a prefix counts from half of the prompt on, and no
# prefix counts while the loads are this far apart.
MATCH_SHARE = Fraction(1, 2)
APART_REQUESTS, APART_RATIO = 32, 1.5
MOST_BLOCKS = 20_000_000  # that a router remembers: about 3 GB

_SAYS: dict[str, str] = {
    "round-robin": (
        "turns of a session go to other replicas, so think time and prefixes are torn apart; "
        "arrivals are more even than those of users"
    ),
    "least-loaded": (
        "turns of a session go to whoever has least to do, so think time and prefixes are torn "
        "apart; a burst is shared out, and long requests keep new ones away"
    ),
    "prefix": (
        "sessions and common prefixes stay at the replica that has them, unless it is far behind; "
        "caches are endless here, so reuse is the most that this routing can give"
    ),
}


@dataclass(frozen=True)
class Replica:
    """The requests that go to one replica, `index` of `count`, from 0."""

    index: int
    count: int
    routing: Routing
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UsageError(f"--replica {self.index}/{self.count}: count from 0/{self.count}")

    @property
    def words(self) -> str:
        """As it was asked for."""
        return f"replica {self.index}/{self.count} by {self.routing}"

    @property
    def distorts(self) -> str:
        """In a sentence."""
        return _SAYS[self.routing]

    @property
    def instead(self) -> Operator | None:
        """What would be simpler, and what the plan compares this with."""
        return Thin(Fraction(1, self.count), self.seed)

    def apply(self, chosen: Selected, kin: Kin) -> Selected:
        """The requests of this replica; UsageError where the tape lacks what the router sees."""
        if self.routing == "round-robin":
            return chosen.only(np.arange(len(chosen)) % self.count == self.index)
        if kin.duration_ns is None:
            raise UsageError(f"--replica: {self.routing} needs a tape that was read with durations")
        fleet = _Fleet(self.count)
        ends_ns = chosen.time_ns + kin.duration_ns[chosen.row]
        home = fleet.by_load if self.routing == "least-loaded" else fleet.by_prefix
        homes = np.empty(len(chosen), dtype=np.int32)
        for at, blocks in enumerate(_blocks(chosen, kin, wanted=self.routing == "prefix")):
            fleet.until(int(chosen.time_ns[at]))
            homes[at] = home(int(ends_ns[at]), blocks)
        return chosen.only(homes == self.index)


def _blocks(chosen: Selected, kin: Kin, *, wanted: bool) -> Iterator[list[int]]:
    """The blocks of each request, in order; none where they are not wanted."""
    if not wanted:
        yield from ([] for _ in range(len(chosen)))
        return
    seen = 0
    for sizes, names in kin.prefixes(chosen) if kin.prefixes else ():
        seen += len(names)
        if seen > MOST_BLOCKS:
            raise UsageError(
                f"--routing prefix: more than {MOST_BLOCKS:,} prefix blocks; give a --window"
            )
        at, every = 0, names.tolist()
        for size in sizes.tolist():
            yield every[at : at + size]
            at += size
    if not seen:
        raise UsageError("--routing prefix: the tape knows no prefix blocks; use least-loaded")


class _Fleet:
    """Replicas as a router sees them: how many requests each has, and which blocks it has seen."""

    def __init__(self, count: int) -> None:
        self._open = [0] * count
        self._turn = list(range(count))  # of equal ones the one that was chosen longest ago
        self._chosen = count
        self._ends: list[tuple[int, int]] = []
        self._by_load = [(0, k, k) for k in range(count)]  # heap with stale entries
        self._owners: dict[int, int] = {}  # block: the replicas that have it, as bits

    def until(self, now_ns: int) -> None:
        """Let the requests end that have ended by then."""
        while self._ends and self._ends[0][0] <= now_ns:
            _, replica = heapq.heappop(self._ends)
            self._open[replica] -= 1
            self._push(replica)

    def by_load(self, end_ns: int, _: list[int]) -> int:
        """Send a request to the replica with the fewest."""
        return self._send(self._idlest(), end_ns)

    def by_prefix(self, end_ns: int, blocks: list[int]) -> int:
        """Send a request to the replica that knows most of its prefix, see the constants above."""
        least = self._open[self._idlest()]
        most = max(self._open)
        replica = None
        if most - least <= APART_REQUESTS or most <= APART_RATIO * least:
            replica = self._best_match(blocks)
        home = self._send(self._idlest() if replica is None else replica, end_ns)
        for block in blocks:
            self._owners[block] = self._owners.get(block, 0) | 1 << home
        return home

    def _best_match(self, blocks: list[int]) -> int | None:
        owners, matched = -1, 0
        for block in blocks:
            still = owners & self._owners.get(block, 0)
            if not still:
                break
            owners, matched = still, matched + 1
        if not blocks or matched < MATCH_SHARE * len(blocks):
            return None
        among = [k for k in range(len(self._open)) if owners >> k & 1]
        return min(among, key=lambda k: (self._open[k], self._turn[k]))

    def _send(self, replica: int, end_ns: int) -> int:
        self._open[replica] += 1
        self._turn[replica] = self._chosen
        self._chosen += 1
        heapq.heappush(self._ends, (end_ns, replica))
        self._push(replica)
        return replica

    def _push(self, replica: int) -> None:
        heapq.heappush(self._by_load, (self._open[replica], self._turn[replica], replica))

    def _idlest(self) -> int:
        while True:
            load, turn, replica = self._by_load[0]
            if (load, turn) == (self._open[replica], self._turn[replica]):
                return replica
            heapq.heappop(self._by_load)
