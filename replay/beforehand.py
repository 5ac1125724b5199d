"""What a candidate is sent before a run and apart from it: requests to warm it up, cached prefixes.

None of it has a row, telemetry begins after it, and its prompts are either those of nobody
(warming up) or the beginnings that requests of a window share with what came before the window.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokentape.replay.aborts import Aborts
from tokentape.replay.ahead import Outgoing
from tokentape.replay.reuse import block_names
from tokentape.replay.schedule import OUTSIDE_WINDOW, Offered, Schedule
from tokentape.replay.share import Share
from tokentape.replay.source import Source
from tokentape.replay.transport import NO_REPLY, fetch
from tokentape.traces.errors import TokentapeError

AT_ONCE = 8  # in flight; enough for batches, and few enough to keep their order in a cache
LONGEST_S = 600.0  # of one request, where the run has no limit of its own


@dataclass(frozen=True)
class Prefixes:
    """Beginnings of prompts: the first `blocks[i]` blocks of request `numbers[i]` of a plan."""

    numbers: NDArray[np.int64]
    blocks: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.numbers)

    @classmethod
    def of(cls, source: Source, offered: Offered, schedule: Schedule) -> "Prefixes":
        """What an endless cache would hold, when a window begins, of the prompts in the window.

        The one that was used last comes last; one that another begins with is not sent again.
        """
        earlier = _before(offered, schedule)
        if not source.with_blocks or not len(earlier):
            return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
        none = np.zeros(len(earlier), dtype=np.int16)
        used = np.concatenate([keys for _, keys in block_names(source, earlier, none)])
        held, from_end = np.unique(used[::-1], return_index=True)
        longest: dict[int, tuple[int, int]] = {}  # (request, blocks) by the name of the last block
        inner: set[int] = set()
        number = 0
        for sizes, keys in block_names(source, schedule.source_index, schedule.copy_index):
            known, at = np.isin(keys, held), 0
            for size in sizes.tolist():
                new = np.flatnonzero(~known[at : at + size])
                count = int(new[0]) if len(new) else size
                if count:
                    names = keys[at : at + count].tolist()
                    longest.setdefault(names[-1], (number, count))
                    inner.update(names[:-1])
                at += size
                number += 1
        ends = np.array([name for name in longest if name not in inner], dtype=np.uint64)
        latest = -from_end[np.searchsorted(held, ends)]
        chosen = [longest[name] for name in ends[np.argsort(latest, kind="stable")].tolist()]
        pairs = np.array(chosen, dtype=np.int64).reshape(-1, 2)
        return cls(pairs[:, 0], pairs[:, 1])


def _before(offered: Offered, schedule: Schedule) -> NDArray[np.int32]:
    """Rows that reached an engine before the window, in order of their arrival."""
    outside = schedule.left_out.get(OUTSIDE_WINDOW)
    if outside is None or not len(schedule.due_ns):
        return np.empty(0, dtype=np.int32)
    begins = offered.arrival_ns[schedule.source_index].min()
    early: NDArray[np.int32] = outside[
        (offered.arrival_ns[outside] < begins) & (offered.reason[outside] == 0)
    ]
    return early


@dataclass(frozen=True)
class Sent:
    """How many requests of one kind were sent beforehand, and what went wrong with how many."""

    what: str
    requests: int
    troubles: Counter[str]

    def as_dict(self) -> dict[str, Any]:
        """As the run's tape keeps it."""
        return {"requests": self.requests, "failed": dict(self.troubles)}

    def doubts(self) -> list[str]:
        """What it says against the run."""
        if not self.troubles:
            return []
        why = ", ".join(f"{n} {trouble}" for trouble, n in self.troubles.most_common())
        return [f"{self.troubles.total()} of {self.requests} {self.what} failed: {why}"]


def warm_up(share: Share, count: int) -> Sent:
    """Send the first requests of a plan, again and again until `count`, with prompts of nobody."""
    other = replace(share, namespace=f"{share.namespace} warm-up", aborts=Aborts(), verbatim=False)
    requests = (other.outgoing(number % len(other)) for number in range(count))
    return asyncio.run(_send(share, "requests to warm up", requests))


def prime(share: Share, prefixes: Prefixes) -> Sent:
    """Send beginnings of prompts, each for one token of output, so that a cache holds them."""
    pairs = zip(prefixes.numbers.tolist(), prefixes.blocks.tolist(), strict=True)
    requests = (share.beginning(number, blocks) for number, blocks in pairs)
    return asyncio.run(_send(share, "prefixes to prime the cache", requests))


async def _send(share: Share, what: str, requests: Iterable[Outgoing]) -> Sent:
    troubles: Counter[str] = Counter()
    waiting = iter(requests)
    timeout_s = share.timeout_ns / 1e9 if share.timeout_ns else LONGEST_S
    sent = 0

    async def one_after_another() -> None:
        nonlocal sent
        for request in waiting:
            sent += 1
            trouble = await _trouble(share, request, timeout_s)
            if trouble is not None:
                troubles[trouble] += 1

    await asyncio.gather(*(one_after_another() for _ in range(AT_ONCE)))
    return Sent(what, sent, troubles)


async def _trouble(share: Share, request: Outgoing, timeout_s: float) -> str | None:
    """What went wrong with a request, in two words."""
    ca = share.target.address.ca
    try:
        status, _, _ = await fetch(
            "POST", str(request.url), request.headers, request.body, timeout_s, ca
        )
    except TimeoutError:
        return "timed out"
    except (*NO_REPLY, TokentapeError) as error:
        return type(error).__name__
    return None if status == 200 else f"status {status}"
