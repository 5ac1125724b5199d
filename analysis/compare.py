"""A against B: requests paired by where they come from, effects with intervals, a gate for CI.

Two replays of one tape send the same requests, so B - A of a statistic is taken over the same
requests, and the bootstrap draws the same blocks of time for both sides: what the traffic did drops
out. Each side may be several runs; a request then counts once for each of them.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tokentape.analysis import comparable, display, gates, statistics
from tokentape.analysis.comparable import Length, column
from tokentape.analysis.session import Session
from tokentape.traces.errors import UsageError

METRICS = ("ttft", "ttft_arrival", "tpot", "e2e")
STATS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
GROUPS = {"prompt tokens up to": "bucket", "model": "model", "turn": "turn"}
_MOST_GROUPS = 12  # of one kind; the largest are shown
GATES = (*(f"{metric}_{stat}" for metric in METRICS for stat in STATS), "failed")

_ROWS = """
SELECT
  run,
  coalesce(source_request_id, request_id)::VARCHAR || '/' || coalesce(copy_index, 0) AS key,
  arrival_ns - min(arrival_ns) OVER (PARTITION BY run) AS at_ns,
  outcome,
  outcome IS NOT DISTINCT FROM 'ok' AS ok,
  coalesce(model, 'unknown') AS model,
  coalesce(pow(2, ceil(log2(greatest(input_tokens, 1))))::BIGINT::VARCHAR, 'unknown') AS bucket,
  CASE WHEN turn_index > 0 THEN 'later' WHEN turn_index = 0 THEN 'first' ELSE 'none' END AS turn,
  input_tokens,
  cached_tokens,
  output_tokens,
  weight,
  CASE WHEN ok THEN first_content_ns - sent_ns END::DOUBLE AS ttft,
  CASE WHEN ok THEN first_content_ns - arrival_ns END::DOUBLE AS ttft_arrival,
  CASE WHEN ok THEN tpot_ns END::DOUBLE AS tpot,
  CASE WHEN ok THEN end_ns - sent_ns END::DOUBLE AS e2e
FROM requests
LEFT JOIN (
  SELECT run, request_id, max(tpot_ns) AS tpot_ns
  FROM tpot
  GROUP BY run, request_id
) USING (run, request_id)
"""


@dataclass(frozen=True)
class Effect:
    """A statistic of both sides over the same requests; `lo` and `hi` bound `change` at 95 %.

    change: B / A - 1. None with too few pairs; lo and hi also with too few blocks of time.
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

    @property
    def word(self) -> str:
        """higher, lower, no clear change, or too few."""
        if self.lo is None or self.hi is None:
            return display.TOO_FEW
        return "higher" if self.lo > 0 else "lower" if self.hi < 0 else "no clear change"


@dataclass(frozen=True)
class Comparison:
    """What changed from A to B, and what keeps the two from being comparable."""

    a: list[str]
    b: list[str]
    pairs: int
    unpaired: dict[str, int]
    failed: dict[str, float]
    outcomes: dict[str, dict[str, int]]
    failed_on_one_side: dict[str, int]
    lengths: list[Length]
    effects: list[Effect]
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        effects = [asdict(e) | {"word": e.word} for e in self.effects]
        return asdict(self) | {"effects": effects}

    def facts(self) -> list[str]:
        """What changed beside the latencies, one line each: outcomes, then lengths."""
        failed = ", ".join(f"{side} {share:.2%}" for side, share in self.failed.items())
        lines = [f"{self.pairs:,} requests in both; failed: {failed}"]
        if any(set(found) != {"ok"} for found in self.outcomes.values()):
            told = "; ".join(
                f"{side} {', '.join(f'{name} {n:,}' for name, n in found.items())}"
                for side, found in self.outcomes.items()
            )
            one = ", ".join(f"{side} {n:,}" for side, n in self.failed_on_one_side.items())
            lines += [f"outcomes: {told}", f"failed on one side: {one}"]
        return lines + [length.line() for length in self.lengths if length.n]

    def text(self, width: int = 100) -> str:
        """Tables for a terminal; groups only where their change is clear."""
        shown = [e for e in self.effects if e.group == "all" or e.word in ("higher", "lower")]
        rows = [
            [
                e.group,
                f"{e.metric} {e.stat}",
                e.word,
                display.duration(e.a),
                display.duration(e.b),
                percent(e.change),
                span(e),
                display.count(e.n),
            ]
            for e in shown
        ]
        head = ["group", "metric", "B is", "A", "B", "change", "95 %", "n"]
        lines = [
            f"A: {', '.join(self.a)}",
            f"B: {', '.join(self.b)}",
            *self.facts(),
            *(f"! {warning}" for warning in self.warnings),
            "",
            *display.table(head, rows, width, texts=3),
        ]
        return "\n".join(lines) + "\n"


def compare(session: Session, a: Sequence[str], b: Sequence[str]) -> Comparison:
    """Compare the runs labelled `a` with those labelled `b`; UsageError where no request pairs."""
    rows = session.table(_ROWS)
    runs = np.asarray(rows["run"].to_pylist(), dtype=object)
    keys = np.asarray(rows["key"].to_pylist(), dtype=object)
    sides = {"A": np.isin(runs, list(a)), "B": np.isin(runs, list(b))}
    both = np.intersect1d(keys[sides["A"]], keys[sides["B"]])
    if not len(both):
        raise UsageError(
            f"compare: {', '.join(a)} and {', '.join(b)} share no request; replay one tape for both"
        )
    paired = np.isin(keys, both)
    masks = {side: mask & paired for side, mask in sides.items()}
    ok = column(rows, "ok")
    effects = [
        effect
        for group, member in _members(rows, masks["A"] | masks["B"])
        for metric in METRICS
        for effect in _effects(rows, keys, masks, member, group, metric)
    ]
    return Comparison(
        a=list(a),
        b=list(b),
        pairs=len(both),
        unpaired={side: int((mask & ~paired).sum()) for side, mask in sides.items()},
        failed={side: float(1 - ok[mask].mean()) for side, mask in masks.items()},
        outcomes=comparable.outcomes(rows, masks),
        failed_on_one_side=comparable.failed_on_one_side(keys, ok, masks),
        lengths=comparable.lengths(rows, keys, masks),
        effects=effects,
        warnings=comparable.warnings(session, rows, {"A": a, "B": b}, sides, masks),
    )


def _members(rows: pa.Table, used: Any) -> list[tuple[str, Any]]:
    """(name, mask) of all requests, and of the largest groups where there are several."""
    found: list[tuple[str, Any]] = [("all", used)]
    for kind, named in GROUPS.items():
        values = np.asarray(rows[named].to_pylist(), dtype=object)
        names, sizes = np.unique(values[used].astype(str), return_counts=True)
        if len(names) > 1:
            largest = names[np.argsort(-sizes, kind="stable")][:_MOST_GROUPS]
            found += [(f"{kind} {name}", used & (values == name)) for name in largest]
    return found


def _effects(
    rows: pa.Table, keys: Any, masks: dict[str, Any], member: Any, group: str, metric: str
) -> list[Effect]:
    """The effect on each statistic, over the requests of a group that both sides have."""
    values, at_ns, weights = (column(rows, c) for c in (metric, "at_ns", "weight"))
    known = np.isfinite(values) & member
    both = np.intersect1d(keys[masks["A"] & known], keys[masks["B"] & known])
    at_of = dict(zip(keys[masks["A"]], at_ns[masks["A"]], strict=True))
    # a request's block is that of its time in A, on both sides
    numbers, n_blocks = statistics.blocks_of(np.array([at_of[k] for k in both], dtype=np.int64))
    block_of = dict(zip(both, numbers.tolist(), strict=True))
    draws = statistics.resamples(n_blocks) if n_blocks >= statistics.LEAST_BLOCKS else None
    chosen = {side: mask & known & np.isin(keys, both) for side, mask in masks.items()}
    blocks = {s: np.array([block_of[k] for k in keys[m]], np.int64) for s, m in chosen.items()}
    ends: dict[str, tuple[float, float] | None] = {}
    if draws is not None:
        a, b = (
            statistics.bootstrap_quantiles(
                values[m], blocks[s], draws, list(STATS.values()), weights[m]
            )
            for s, m in chosen.items()
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            changes = b / a - 1
        ends = {s: statistics.interval(c, n_blocks) for s, c in zip(STATS, changes, strict=True)}
    n = len(both)
    found = []
    for stat, p in STATS.items():
        if n <= math.ceil(p * n):
            found.append(Effect(group, metric, stat, None, None, None, None, None, n))
            continue
        old, new = (statistics.quantile(values[m], p, weights[m]) for m in chosen.values())
        enough = n >= statistics.least_for_interval(p)
        lo, hi = (ends.get(stat) if enough else None) or (None, None)
        found.append(
            Effect(group, metric, stat, old, new, new / old - 1 if old else None, lo, hi, n)
        )
    return found


def judge(found: Comparison, texts: Sequence[str]) -> dict[str, str | None]:
    """Why each gate fails, or None: it fails on a change beyond its limit that is clearly not zero.

    A gate on too few pairs fails too: nothing was shown. UsageError where a gate cannot be read.
    """
    return {text: _judge(found, gates.parse(text, GATES)) for text in texts}


def _judge(found: Comparison, gate: gates.Gate) -> str | None:
    if gate.name == "failed":
        if gate.is_time:
            raise UsageError(f"--fail-if {gate.text}: failed is a part of requests: failed>+1%")
        more = found.failed["B"] - found.failed["A"]
        return f"{gate.text}: {more:+.2%} of requests" if gate.beyond(more) else None
    metric, _, stat = gate.name.rpartition("_")
    [effect] = [e for e in found.effects if (e.group, e.metric, e.stat) == ("all", metric, stat)]
    if effect.a is None or effect.b is None:
        return f"{gate.text}: too few pairs (n={effect.n})"
    if gate.own:
        failed = gate.beyond(effect.b)
        return f"{gate.text}: {display.duration(effect.b)}" if failed else None
    if effect.change is None or effect.lo is None or effect.hi is None:
        return f"{gate.text}: too few pairs (n={effect.n})"
    change = effect.b - effect.a if gate.is_time else effect.change
    if gate.beyond(change) and gate.clear(effect.lo, effect.hi):
        told = display.duration(change) if gate.is_time else percent(effect.change)
        return f"{gate.text}: {told}, 95 % {span(effect)}"
    return None


def percent(change: float | None) -> str:
    return display.NOTHING if change is None else f"{100 * change:+.1f} %"


def span(effect: Effect) -> str:
    if effect.lo is None or effect.hi is None:
        return display.TOO_FEW
    return f"{100 * effect.lo:+.1f} .. {100 * effect.hi:+.1f} %"
