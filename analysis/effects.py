"""What changed from A to B in each statistic: over the same requests, with intervals.

Requests are paired by a key, and a request's block of time is that of its time in A on both sides,
so that what the traffic did drops out of the paired block bootstrap. Where a side has several runs,
what one run differs by from the next is added to the interval: blocks of one run cannot show it.

Source: Zou and Donner 2008, "Construction of confidence limits about effect measures" (MOVER), for
the sum of two independent uncertainties given by their limits: distances add up in squares.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tokentape.analysis import display, statistics
from tokentape.analysis.statistics import Floats, Ints

Mask = npt.NDArray[np.bool_]
STATS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
SIDES = ("A", "B")


@dataclass(frozen=True)
class Effect:
    """A statistic of both sides over the same requests; `lo` and `hi` bound `change` at 95 %.

    change: B / A - 1. None with too few pairs; lo and hi also with too few blocks of time.
    between_runs: relative standard deviation of the runs of one side; None with one run a side.
    n: pairs of requests, for gaps the fewer of both sides' gaps.
    """

    group: str
    metric: str
    stat: str
    a: float | None
    b: float | None
    change: float | None
    lo: float | None
    hi: float | None
    n: int
    between_runs: float | None = None

    @property
    def word(self) -> str:
        """higher, lower, no clear change, or too few."""
        if self.lo is None or self.hi is None:
            return display.TOO_FEW
        return "higher" if self.lo > 0 else "lower" if self.hi < 0 else "no clear change"


@dataclass(frozen=True)
class Pairs:
    """Rows of both sides: `key` numbers the requests, `run` the runs; `at_ns` of each key in A."""

    key: Ints
    run: Ints
    sides: dict[str, Mask]
    at_ns: Ints = field(repr=False)

    def both(self, mask: Mask) -> Mask:
        """Which keys have a row of the mask on either side."""
        n = len(self.at_ns)
        a, b = (np.bincount(self.key[self.sides[s] & mask], minlength=n) > 0 for s in SIDES)
        return a & b

    def blocks(self, keys: Mask) -> tuple[Ints, int]:
        """The block of time of each of these keys (0 for others), and how many there are."""
        numbers, n_blocks = statistics.blocks_of(self.at_ns[keys])
        block = np.zeros(len(keys), np.int64)
        block[keys] = numbers
        return block, n_blocks


@dataclass(frozen=True)
class Samples:
    """Values with their weight, block and run, of one side."""

    values: Floats
    weights: Floats
    block: Ints
    run: Ints

    def quantiles(self) -> list[float]:
        """Each of STATS over all samples."""
        return [statistics.quantile(self.values, p, self.weights) for p in STATS.values()]

    def by_run(self) -> list[list[float]]:
        """The same for each run that has samples."""
        runs = (self.run == run for run in np.unique(self.run))
        return [self.only(mine).quantiles() for mine in runs]

    def only(self, mask: Mask) -> "Samples":
        """Those samples alone."""
        return Samples(self.values[mask], self.weights[mask], self.block[mask], self.run[mask])


def of_requests(
    pairs: Pairs, values: Floats, weights: Floats, member: Mask, group: str, metric: str
) -> list[Effect]:
    """The effect on each statistic of a metric that has one value for each request."""
    known = np.isfinite(values) & member
    keys = pairs.both(known)
    block, n_blocks = pairs.blocks(keys)
    chosen = (pairs.sides[s] & known & keys[pairs.key] for s in SIDES)
    a, b = (Samples(values[m], weights[m], block[pairs.key[m]], pairs.run[m]) for m in chosen)
    return list(effects(a, b, n_blocks, int(keys.sum()), group, metric))


def effects(
    a: Samples, b: Samples, n_blocks: int, n: int, group: str, metric: str
) -> Iterator[Effect]:
    """One for each of STATS; `n` says how many samples both sides have for sure."""
    ends: Sequence[tuple[float, float] | None] = [None] * len(STATS)
    if n and n_blocks >= statistics.LEAST_BLOCKS:
        draws, levels = statistics.resamples(n_blocks), list(STATS.values())
        of_a, of_b = (
            statistics.bootstrap_quantiles(x.values, x.block, draws, levels, x.weights)
            for x in (a, b)
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = [statistics.interval(change, n_blocks) for change in of_b / of_a - 1]
    old, new = (x.quantiles() if n else [] for x in (a, b))
    runs = [x.by_run() if n else [] for x in (a, b)]
    for i, (stat, p) in enumerate(STATS.items()):
        if n <= math.ceil(p * n):
            yield Effect(group, metric, stat, None, None, None, None, None, n)
            continue
        change = new[i] / old[i] - 1 if old[i] else None
        found = ends[i] if n >= statistics.least_for_interval(p) else None
        each = [[of_run[i] for of_run in side] for side in runs]
        spread = between(each) if min(map(min, each)) > 0 else None
        if found is not None and change is not None and spread is not None:
            found = widened(change, found, spread, [len(side) for side in each])
        lo, hi = found or (None, None)
        yield Effect(
            group, metric, stat, old[i], new[i], change, lo, hi, n, spread[0] if spread else None
        )


def between(each: Sequence[Sequence[float]]) -> tuple[float, int] | None:
    """(standard deviation of the log of a run of a side, degrees of freedom), both sides pooled.

    None where no side has two runs. A side of one run is taken to vary as the other does.
    """
    return pooled([np.log(side) for side in each])


def pooled(sides: Sequence[Floats]) -> tuple[float, int] | None:
    """(standard deviation within sides, degrees of freedom); None where no side has two values."""
    df = sum(len(side) - 1 for side in sides)
    if not df:
        return None
    squares = sum(float(((side - side.mean()) ** 2).sum()) for side in sides)
    return math.sqrt(squares / df), df


def reach(spread: tuple[float, int], runs: Sequence[int]) -> float:
    """How far the difference of two means of so many runs may be off: 95 %, Student's t."""
    sd, df = spread
    return statistics.student(df) * sd * math.sqrt(sum(1 / k for k in runs))


def widened(
    change: float, ends: tuple[float, float], spread: tuple[float, int], runs: Sequence[int]
) -> tuple[float, float]:
    """The interval of a relative change with what runs differ by, on a log scale."""
    more, middle = reach(spread, runs), math.log1p(change)
    lo, hi = (middle - math.log1p(max(end, -1 + 1e-12)) for end in ends)
    return (
        math.expm1(middle - math.hypot(lo, more)),
        math.expm1(middle + math.hypot(hi, more)),
    )
