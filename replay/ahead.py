"""What is made ready before it is due, and how long before: bodies, and the times to arm them.

Both are bounded: bodies by their bytes, times by a chunk, so that a plan of ten million requests
costs no more than its due times. Nothing here knows a clock.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from yarl import URL

NS_PER_S = 1_000_000_000
ARM_AHEAD_NS = 15_000_000  # arming costs 0.3 to 0.5 ms, so it is done when nothing is due
ARM_COST_NS = 600_000  # what one is allowed for where many are due together
MOST_AHEAD_NS = 2 * NS_PER_S  # an armed request holds a connection
CHUNK = 4_096  # times that are worked out together: 0.1 ms
ROW_BYTES = 3_000  # in memory, of a request beside its body; measured
HASH_BYTES = 40  # of each block hash in its row


@dataclass(frozen=True)
class Outgoing:
    """One request, ready to be sent; `row` holds what its row says whatever happens.

    leave_events: leave when so many events have come; leave_after_ns: so long after it was sent.
    """

    url: URL
    headers: dict[str, str]
    body: bytes
    row: dict[str, Any]
    leave_events: int = 0
    leave_after_ns: int | None = None

    @property
    def size(self) -> int:
        """Bytes of memory, about."""
        return len(self.body) + ROW_BYTES + HASH_BYTES * len(self.row.get("block_hashes", ()))


class Ahead:
    """Requests built before they are due, bounded by the bytes that they take."""

    def __init__(self, prepare: Callable[[int], Outgoing], count: int, limit_bytes: int) -> None:
        self._prepare = prepare
        self._count = count
        self._limit_bytes = limit_bytes
        self._ready: deque[Outgoing] = deque()
        self._bytes = 0
        self._built = 0

    def __len__(self) -> int:
        return len(self._ready)

    @property
    def peers(self) -> list[URL]:
        """A URL of each peer that those which are ready go to, that of the next one first."""
        return list({outgoing.url.origin(): outgoing.url for outgoing in self._ready}.values())

    @property
    def full(self) -> bool:
        """True when nothing more is to be built now."""
        return self._built == self._count or self._bytes >= self._limit_bytes

    def build(self) -> None:
        """Build the next one."""
        outgoing = self._prepare(self._built)
        self._built += 1
        self._bytes += outgoing.size
        self._ready.append(outgoing)

    def take(self) -> Outgoing:
        """The next in order; built on the spot if none is ready."""
        if not self._ready:
            self.build()
        outgoing = self._ready.popleft()
        self._bytes -= outgoing.size
        return outgoing


class ArmTimes:
    """When to begin with each request, so that all are ready ARM_AHEAD_NS before they are due.

    Where many are due together the first ones begin earlier, by ARM_COST_NS for each behind them,
    and by MOST_AHEAD_NS at most. Asked in order, a time costs next to nothing.
    """

    def __init__(self, due_ns: NDArray[np.int64]) -> None:
        self._due_ns = due_ns
        self._chunk = -1
        self._times: list[int] = []
        # For each chunk: the least of (due - what all before it cost) of all chunks behind it.
        starts = range(0, len(due_ns), CHUNK)
        self._behind = np.full(len(starts) + 1, np.iinfo(np.int64).max)
        for number in reversed(range(len(starts))):
            least = self._free(number)[0].min()
            self._behind[number] = min(least, self._behind[number + 1])

    def __len__(self) -> int:
        return len(self._due_ns)

    def __getitem__(self, number: int) -> int:
        chunk, place = divmod(number, CHUNK)
        if chunk != self._chunk:
            self._chunk, self._times = chunk, self._worked_out(chunk)
        return self._times[place]

    def _free(self, chunk: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(due times less the cost of all requests before each, that cost) of a chunk."""
        due = self._due_ns[chunk * CHUNK : (chunk + 1) * CHUNK]
        cost = np.arange(chunk * CHUNK, chunk * CHUNK + len(due), dtype=np.int64) * ARM_COST_NS
        return due - cost, cost

    def _worked_out(self, chunk: int) -> list[int]:
        free, cost = self._free(chunk)
        least = np.minimum.accumulate(np.append(free, self._behind[chunk + 1])[::-1])[::-1][:-1]
        latest = least + cost - ARM_AHEAD_NS
        times: list[int] = np.maximum(latest, free + cost - MOST_AHEAD_NS).tolist()
        return times
