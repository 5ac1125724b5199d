"""Intervals of quantiles, of requests that are not independent: block bootstrap over time.

Requests that are near in time share a queue, so resampling single requests gives intervals far too
narrow (measured: a nominal 95 % covers 23 % of the time near saturation). Whole blocks of time are
resampled instead. All is numpy over histograms of ranks; nothing here reads a tape.

Source: Hesterberg 2014, "What Teachers Should Know about the Bootstrap", for the expanded
percentile interval, which widens the percentiles as Student's t does where blocks are few.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LEVEL = 0.95
REPLICATES = 1000
SEED = 20261127
LEAST_BLOCKS = 8  # fewer say nothing about how blocks differ
_MOST_BLOCKS = 200
_BLOCK_NS = 30_000_000_000  # several busy periods; measured: 91 % coverage of the median at 8/s
_FEWEST_WANTED = 12  # a short run is cut finer, down to this many blocks
_BINS = 2000


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % interval; lo and hi are None where the sample cannot give them.

    n_eff: how many independent samples would be as good; None where there is no interval.
    """

    value: float | None
    lo: float | None
    hi: float | None
    n: int
    n_eff: float | None


def least_for_interval(p: float) -> int:
    """Samples for a two-sided 95 % interval of the p-quantile: 368 for p99 (binomial)."""
    return math.ceil(math.log((1 - LEVEL) / 2) / math.log(max(p, 1 - p)))


def blocks_of(at_ns: Ints) -> tuple[Ints, int]:
    """The block of each instant, from 0, and how many blocks the whole span has."""
    if not len(at_ns):
        return np.zeros(0, np.int64), 0
    start, span = int(at_ns.min()), int(at_ns.max() - at_ns.min()) + 1
    length = max(min(_BLOCK_NS, -(-span // _FEWEST_WANTED)), -(-span // _MOST_BLOCKS), 1)
    return (at_ns - start) // length, -(-span // length)


def resamples(n_blocks: int, seed: int = SEED) -> Floats:
    """How often each replicate draws each block: float[REPLICATES, n_blocks], rows sum to it."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_blocks, np.full(n_blocks, 1 / n_blocks), REPLICATES).astype(float)


def quantile(values: Floats, p: float, weights: Floats | None = None) -> float:
    """The smallest value that at least p of the weight does not exceed; there must be one."""
    order = np.argsort(values, kind="stable")
    below = np.cumsum(np.ones(len(values)) if weights is None else weights[order])
    return float(values[order][np.searchsorted(below, p * below[-1] * (1 - 1e-12))])


def bootstrap_quantiles(
    values: Floats,
    blocks: Ints,
    draws: Floats,
    levels: Sequence[float],
    weights: Floats | None = None,
) -> Floats:
    """Quantiles in each replicate, exact or to within a rank bin: float[levels, replicates].

    NaN where a replicate has no value. Cost: one product of draws with a histogram of every block.
    """
    ordered = np.sort(values)
    edges, n = np.unique(ordered), len(ordered)
    if len(edges) > 2 * _BINS:
        fine = np.concatenate([np.linspace(0, n - 1, _BINS), np.linspace(0.98 * n, n - 1, _BINS)])
        edges = np.unique(ordered[fine.astype(np.int64)])
    histogram = np.zeros((draws.shape[1], len(edges)))
    place = (blocks, np.searchsorted(edges, values))
    np.add.at(histogram, place, 1 if weights is None else weights)
    below = np.cumsum(draws @ histogram, axis=1)
    total = below[:, -1:]
    found = [edges[(below >= p * total * (1 - 1e-12)).argmax(axis=1)] for p in levels]
    return np.where(total[:, 0] > 0, np.array(found), np.nan)


def interval(replicates: Floats, n_blocks: int) -> tuple[float, float] | None:
    """Expanded percentile interval of the replicates of a statistic; None with too few blocks."""
    finite = replicates[np.isfinite(replicates)]
    if n_blocks < LEAST_BLOCKS or len(finite) < REPLICATES / 2:
        return None
    reach = math.sqrt(n_blocks / (n_blocks - 1)) * student(n_blocks - 1)
    outside = NormalDist().cdf(-reach)
    lo, hi = np.quantile(finite, [outside, 1 - outside])
    return float(lo), float(hi)


def estimate(values: Floats, at_ns: Ints, p: float, weights: Floats | None = None) -> Estimate:
    """The p-quantile of samples that were taken at these instants, with its interval."""
    n = len(values)
    if n <= math.ceil(p * n):  # as enough_samples in prelude.quantiles
        return Estimate(None, None, None, n, None)
    value = quantile(values, p, weights)
    blocks, n_blocks = blocks_of(at_ns)
    if n_blocks < LEAST_BLOCKS:
        return Estimate(value, None, None, n, None)
    n_eff = _effective(values <= value, blocks, n_blocks)
    if n_eff < least_for_interval(p) / 4:  # the tail was met in too few independent moments
        return Estimate(value, None, None, n, n_eff)
    draws = resamples(n_blocks)
    ends = interval(bootstrap_quantiles(values, blocks, draws, [p], weights)[0], n_blocks)
    lo, hi = ends or (None, None)
    return Estimate(value, lo, hi if n >= least_for_interval(p) else None, n, n_eff)


def mean(values: Floats, at_ns: Ints) -> Estimate:
    """The mean of equally long slices of time, with its interval; None where there are none."""
    n = len(values)
    if not n:
        return Estimate(None, None, None, 0, None)
    blocks, n_blocks = blocks_of(at_ns)
    if n_blocks < LEAST_BLOCKS:
        return Estimate(float(values.mean()), None, None, n, None)
    draws = resamples(n_blocks)
    sums = draws @ np.bincount(blocks, values, minlength=n_blocks)
    counts = draws @ np.bincount(blocks, minlength=n_blocks)
    lo, hi = interval(sums / np.maximum(counts, 1e-300), n_blocks) or (None, None)
    return Estimate(float(values.mean()), lo, hi, n, None)


def share(hits: Floats, at_ns: Ints, weights: Floats | None = None) -> Estimate:
    """The part of requests with hits = 1 (else 0), with its interval; None where there are none.

    Blocks that happen to agree say nothing about how far they could differ, so the interval reaches
    at least as far as that of independent requests (Wilson 1927).
    """
    n = len(hits)
    if not n:
        return Estimate(None, None, None, 0, None)
    each = np.ones(n) if weights is None else weights
    value = float((hits * each).sum() / each.sum())
    blocks, n_blocks = blocks_of(at_ns)
    if n_blocks < LEAST_BLOCKS:
        return Estimate(value, None, None, n, None)
    draws = resamples(n_blocks)
    hit = draws @ np.bincount(blocks, hits * each, minlength=n_blocks)
    drawn = draws @ np.bincount(blocks, each, minlength=n_blocks)
    found = interval(np.where(drawn > 0, hit / np.maximum(drawn, 1e-300), np.nan), n_blocks)
    if found is None:
        return Estimate(value, None, None, n, None)
    z2 = NormalDist().inv_cdf((1 + LEVEL) / 2) ** 2 / n
    middle, reach = value + z2 / 2, math.sqrt(z2 * (value * (1 - value) + z2 / 4))
    lo = min(found[0], max((middle - reach) / (1 + z2), 0.0))
    hi = max(found[1], min((middle + reach) / (1 + z2), 1.0))
    return Estimate(value, lo, hi, n, _effective(hits > 0, blocks, n_blocks))


def _effective(below: npt.NDArray[np.bool_], blocks: Ints, n_blocks: int) -> float:
    """Variance of the share below, as if samples were independent, over that seen by blocks."""
    n, share = len(below), float(below.mean())
    sizes = np.bincount(blocks, minlength=n_blocks)
    hits = np.bincount(blocks, below, minlength=n_blocks)
    seen = float(((hits - share * sizes) ** 2).sum()) * n_blocks / (n_blocks - 1) / n**2
    return min(float(n), share * (1 - share) / seen) if seen else float(n)


def student(df: float) -> float:
    """97.5 % point of Student's t: exact to df 2, then Abramowitz and Stegun 26.7.5."""
    if df < 2:  # between 1 and 2 the wider one
        return math.tan(math.pi * LEVEL / 2)
    if df < 3:
        return LEVEL * math.sqrt(2 / (1 - LEVEL**2))
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / df + second / df**2 + third / df**3
