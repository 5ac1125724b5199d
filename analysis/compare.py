"""A against B: requests paired by where they come from, effects with intervals, a gate for CI.

Two replays of one tape send the same requests, so B - A of a statistic is taken over the same
requests, and the bootstrap draws the same blocks of time for both sides: what the traffic did drops
out. Each side may be several runs; a request then counts once for each of them.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tokentape.analysis import display, statistics
from tokentape.analysis.session import Session
from tokentape.traces.errors import UsageError

METRICS = ("ttft", "ttft_arrival", "tpot", "e2e")
STATS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
GROUPS = {"prompt tokens up to": "bucket", "model": "model", "turn": "turn"}
_MOST_GROUPS = 12  # of one kind; the largest are shown
_LIMIT = r"\s*>\s*\+?(\d+(?:\.\d+)?)%"
_GATE = re.compile(rf"(\w+)_(p50|p90|p99){_LIMIT}|(failed){_LIMIT}")
GATE_FORM = "METRIC_STAT>+N%, such as ttft_p99>+5%, or failed>+1%"

_ROWS = """
SELECT
  run,
  coalesce(source_request_id, request_id)::VARCHAR || '/' || coalesce(copy_index, 0) AS key,
  arrival_ns - min(arrival_ns) OVER (PARTITION BY run) AS at_ns,
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
    effects: list[Effect]
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        effects = [asdict(e) | {"word": e.word} for e in self.effects]
        return asdict(self) | {"effects": effects}

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
                _percent(e.change),
                _span(e),
                display.count(e.n),
            ]
            for e in shown
        ]
        head = ["group", "metric", "B is", "A", "B", "change", "95 %", "n"]
        failed = ", ".join(f"{side} {share:.2%}" for side, share in self.failed.items())
        lines = [
            f"A: {', '.join(self.a)}",
            f"B: {', '.join(self.b)}",
            f"{self.pairs:,} requests in both; failed: {failed}",
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
    ok = _column(rows, "ok")
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
        effects=effects,
        warnings=_warnings(session, rows, sides, masks),
    )


def _column(rows: pa.Table, name: str) -> statistics.Floats:
    """A column as floats, NULL as NaN."""
    found: statistics.Floats = rows[name].cast(pa.float64()).to_numpy()
    return found


def _members(rows: pa.Table, used: Any) -> list[tuple[str, Any]]:
    """(name, mask) of all requests, and of the largest groups where there are several."""
    found: list[tuple[str, Any]] = [("all", used)]
    for kind, column in GROUPS.items():
        values = np.asarray(rows[column].to_pylist(), dtype=object)
        names, sizes = np.unique(values[used].astype(str), return_counts=True)
        if len(names) > 1:
            largest = names[np.argsort(-sizes, kind="stable")][:_MOST_GROUPS]
            found += [(f"{kind} {name}", used & (values == name)) for name in largest]
    return found


def _effects(
    rows: pa.Table, keys: Any, masks: dict[str, Any], member: Any, group: str, metric: str
) -> list[Effect]:
    """The effect on each statistic, over the requests of a group that both sides have."""
    values, at_ns, weights = (_column(rows, c) for c in (metric, "at_ns", "weight"))
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


def _warnings(
    session: Session, rows: pa.Table, sides: dict[str, Any], masks: dict[str, Any]
) -> list[str]:
    """Why a difference may not be the candidate's doing."""
    found = []
    for label, tape in zip(session.labels, session.tapes, strict=True):
        level = (tape.facts.get("verdict") or {}).get("level", "valid")
        if level != "valid":
            found.append(f"the run {label} is {level}; see report {label}")
    for side, mask in sides.items():
        alone = int(mask.sum() - masks[side].sum())
        if alone > 0.01 * mask.sum():
            found.append(f"{alone:,} of {int(mask.sum()):,} requests of {side} have no pair")
    cached, prompt, output = (
        _column(rows, c) for c in ("cached_tokens", "input_tokens", "output_tokens")
    )
    shares = {s: np.nansum(cached[m]) / max(np.nansum(prompt[m]), 1) for s, m in masks.items()}
    if abs(shares["A"] - shares["B"]) > 0.05:
        told = ", ".join(f"{side} {share:.1%}" for side, share in shares.items())
        found.append(f"prompt tokens from the cache differ: {told}")
    for what, column in (("input", prompt), ("output", output)):
        known = {s: column[m][np.isfinite(column[m])] for s, m in masks.items()}
        means = {s: float(values.mean()) for s, values in known.items() if len(values)}
        if len(means) == 2 and abs(means["B"] - means["A"]) > 0.01 * means["A"]:
            told = ", ".join(f"{side} {display.figure(mean)}" for side, mean in means.items())
            found.append(f"mean {what} tokens differ: {told}")
    return found + _answers([tape.facts.get("sentinels") for tape in session.tapes])


def _answers(told: list[dict[str, Any] | None]) -> list[str]:
    """Whether the candidates answered the same fixed questions alike, where they were asked."""
    asked = [t for t in told if t]
    if len(asked) < 2 or len({t["version"] for t in asked}) > 1:
        return []
    digests = [[answer["digest"] for answer in t["before"]] for t in asked]
    differ = sum(len(set(answers)) > 1 for answers in zip(*digests, strict=False))
    if not differ:
        return []
    what = "other arithmetic, another model or a broken one"
    return [f"{differ} of {len(digests[0])} sentinels were answered differently: {what}"]


def judge(found: Comparison, gates: Sequence[str]) -> dict[str, str | None]:
    """Why each gate fails, or None: it fails on a change beyond its limit that is clearly not zero.

    A gate on too few pairs fails too: nothing was shown. UsageError where a gate cannot be read.
    """
    return {gate: _judge(found, gate) for gate in gates}


def _judge(found: Comparison, gate: str) -> str | None:
    match = _GATE.fullmatch(gate.strip())
    if not match or (match[1] and match[1] not in METRICS):
        raise UsageError(f"--fail-if {gate}: need {GATE_FORM}; METRIC of {', '.join(METRICS)}")
    if match[4]:
        more = found.failed["B"] - found.failed["A"]
        return f"{gate}: {more:+.2%} of requests" if more > float(match[5]) / 100 else None
    [effect] = [
        e for e in found.effects if (e.group, e.metric, e.stat) == ("all", match[1], match[2])
    ]
    if effect.change is None or effect.lo is None:
        return f"{gate}: too few pairs (n={effect.n})"
    if effect.change > float(match[3]) / 100 and effect.lo > 0:
        return f"{gate}: {_percent(effect.change)}, 95 % {_span(effect)}"
    return None


def _percent(change: float | None) -> str:
    return display.NOTHING if change is None else f"{100 * change:+.1f} %"


def _span(effect: Effect) -> str:
    if effect.lo is None or effect.hi is None:
        return display.TOO_FEW
    return f"{100 * effect.lo:+.1f} .. {100 * effect.hi:+.1f} %"
