"""How well A and B met SLOs, over the requests that both judge, with intervals.

A difference of attainments is in parts of requests, not relative: from 99.0 % to 98.0 % is -0.01.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pyarrow as pa

from tokentape.analysis import display, effects, statistics
from tokentape.analysis.effects import SIDES, Mask, Pairs
from tokentape.analysis.session import Session
from tokentape.analysis.statistics import Estimate, Floats, Ints

_JUDGED = """
SELECT place, slo, (verdict = 'met')::DOUBLE AS met
FROM goodput_requests
JOIN (SELECT run, request_id::UUID AS request_id, place FROM _compared_requests)
  USING (run, request_id)
WHERE verdict <> 'unjudged'
"""


@dataclass(frozen=True)
class Attained:
    """An SLO on both sides: parts of the `n` requests that met it, goodput of the whole runs.

    change: B - A, in parts of requests, bounded by lo and hi at 95 %; they are None with too few
    requests or blocks of time. goodput: requests/s that met it, mean of a side's runs.
    """

    slo: str
    a: Estimate
    b: Estimate
    change: float | None
    lo: float | None
    hi: float | None
    goodput_a: float | None
    goodput_b: float | None
    n: int

    def line(self) -> str:
        """One line for people."""
        sides = (("A", self.a, self.goodput_a), ("B", self.b, self.goodput_b))
        told = "; ".join(
            f"{side} {display.share(e.value)}{_span(e)}, {display.figure(goodput)} met/s"
            for side, e, goodput in sides
        )
        if self.change is None:
            return f"SLO {self.slo}: no request of both sides is judged by it"
        span = "too few for an interval"
        if self.lo is not None and self.hi is not None:
            span = f"95 % {100 * self.lo:+.2f} .. {100 * self.hi:+.2f}"
        return (
            f"SLO {self.slo}: {told}; {100 * self.change:+.2f} % of requests, {span} (n={self.n:,})"
        )


def _span(found: Estimate) -> str:
    if found.lo is None or found.hi is None:
        return ""
    return f" ({display.share(found.lo)} .. {display.share(found.hi)})"


def attained(session: Session, rows: pa.Table, pairs: Pairs, weights: Floats) -> list[Attained]:
    """One for each SLO of the session; rows: `run` and `request_id`, in the order of `pairs`."""
    number = pa.array(np.arange(rows.num_rows))
    session.give(
        "_compared_requests", rows.select(["run", "request_id"]).append_column("place", number)
    )
    judged = session.table(_JUDGED)
    place, slo, met = (judged[c].to_numpy() for c in ("place", "slo", "met"))
    goodput: dict[str, dict[str, float | None]] = {}
    for run, name, per_s in session.sql("SELECT run, slo, goodput_per_s FROM goodput").fetchall():
        goodput.setdefault(name, {})[run] = per_s
    side_of = {
        side: set(rows["run"].filter(pa.array(mask)).to_pylist())
        for side, mask in pairs.sides.items()
    }
    found = []
    for name in sorted(goodput):
        hits = np.full(rows.num_rows, np.nan)
        hits[place[slo == name]] = met[slo == name]
        a, b = (_mean([goodput[name].get(run) for run in side_of[side]]) for side in SIDES)
        found.append(of_slo(name, pairs, hits, weights, (a, b)))
    return found


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def of_slo(
    slo: str,
    pairs: Pairs,
    hits: Floats,
    weights: Floats,
    goodput: tuple[float | None, float | None],
) -> Attained:
    """The objective named `slo`; hits: 1 for a request that met it, 0 else, NaN for unjudged."""
    known = np.isfinite(hits)
    keys = pairs.both(known)
    chosen = [pairs.sides[s] & known & keys[pairs.key] for s in SIDES]
    a, b = (statistics.share(hits[m], pairs.at_ns[pairs.key[m]], weights[m]) for m in chosen)
    n = int(keys.sum())
    if a.value is None or b.value is None:
        return Attained(slo, a, b, None, None, None, *goodput, n)
    change = b.value - a.value
    block, n_blocks = pairs.blocks(keys)
    if n_blocks < statistics.LEAST_BLOCKS:
        return Attained(slo, a, b, change, None, None, *goodput, n)
    draws = statistics.resamples(n_blocks)
    of_a, of_b = (_parts(hits[m], weights[m], block[pairs.key[m]], draws) for m in chosen)
    ends = statistics.interval(of_b - of_a, n_blocks)
    if ends is None:
        return Attained(slo, a, b, change, None, None, *goodput, n)
    middle, least = _of_independent_pairs(pairs, hits, chosen, keys)
    by_run = [_by_run(hits[m], weights[m], pairs.run[m]) for m in chosen]
    spread = effects.pooled(by_run)
    more = effects.reach(spread, [len(side) for side in by_run]) if spread else 0.0
    lo = change - np.hypot(change - min(ends[0], middle - least), more)
    hi = change + np.hypot(max(ends[1], middle + least) - change, more)
    return Attained(slo, a, b, change, float(lo), float(hi), *goodput, n)


def _parts(hits: Floats, weights: Floats, block: Ints, draws: Floats) -> Floats:
    """The part that met it in each replicate; NaN where a replicate has no request."""
    n_blocks = draws.shape[1]
    met = draws @ np.bincount(block, hits * weights, minlength=n_blocks)
    drawn = draws @ np.bincount(block, weights, minlength=n_blocks)
    return np.where(drawn > 0, met / np.maximum(drawn, 1e-300), np.nan)


def _by_run(hits: Floats, weights: Floats, run: Ints) -> Floats:
    runs = [run == one for one in np.unique(run)]
    return np.array([np.average(hits[m], weights=weights[m]) for m in runs])


def _of_independent_pairs(
    pairs: Pairs, hits: Floats, chosen: list[Mask], keys: Mask
) -> tuple[float, float]:
    """(middle, half width) of the interval if pairs were independent: the least that is claimed.

    Blocks that happen to agree say nothing about how far they could differ. Source: Agresti and Min
    2005, "Simple improved confidence intervals for comparing matched proportions".
    """
    sums = [np.bincount(pairs.key[m], hits[m], minlength=len(keys))[keys] for m in chosen]
    counts = [np.bincount(pairs.key[m], minlength=len(keys))[keys] for m in chosen]
    a, b = (s / np.maximum(c, 1) for s, c in zip(sums, counts, strict=True))
    better, worse, n = np.maximum(b - a, 0).sum(), np.maximum(a - b, 0).sum(), len(a) + 2
    off = math.sqrt(better + worse + 1 - (better - worse) ** 2 / n) / n
    return float((better - worse) / n), off * NormalDist().inv_cdf((1 + statistics.LEVEL) / 2)
