"""A against B: requests paired by where they come from, effects with intervals, a gate for CI.

Two replays of one tape send the same requests, so a change is taken over the same requests
(effects.py, gap_effects.py, attainment.py). Each side may be several runs; a request then counts
once for each of them, and what runs of one side differ by is in the intervals.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tokentape.analysis import comparable, display, effects, gap_effects, gates
from tokentape.analysis.attainment import Attained, attained
from tokentape.analysis.comparable import Length, column
from tokentape.analysis.effects import STATS, Effect, Pairs
from tokentape.analysis.session import Session
from tokentape.analysis.statistics import Ints
from tokentape.traces.errors import UsageError

METRICS = ("ttft", "ttft_arrival", "tpot", "e2e")
GROUPS = {"prompt tokens up to": "bucket", "model": "model", "turn": "turn"}
_MOST_GROUPS = 12  # of one kind; the largest are shown
_ALL = (*METRICS, *gap_effects.METRICS)
_PARTS = ("failed", "slo_attainment")  # of requests, so a change is in per cent of all of them
GATES = (*(f"{metric}_{stat}" for metric in _ALL for stat in STATS), *_PARTS)

_ROWS = """
SELECT
  run,
  request_id,
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
    attained: list[Attained]
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
        lines += [length.line() for length in self.lengths if length.n]
        return [*lines, *self._between_runs(), *(found.line() for found in self.attained)]

    def _between_runs(self) -> list[str]:
        """How far runs of one side lie apart, which the intervals hold; or that nobody knows."""
        if len(self.a) == len(self.b) == 1:
            return ["one run a side: what another run would differ by is not in the intervals"]
        told = ", ".join(
            f"{e.metric} {e.stat} {e.between_runs:.1%}"
            for e in self.effects
            if e.group == "all" and e.stat == "p50" and e.between_runs is not None
        )
        return [f"standard deviation between runs of a side: {told}"] if told else []

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
    keys = comparable.numbered(rows, "key")
    sides = {"A": np.isin(runs, list(a)), "B": np.isin(runs, list(b))}
    both = np.intersect1d(keys[sides["A"]], keys[sides["B"]])
    if not len(both):
        raise UsageError(
            f"compare: {', '.join(a)} and {', '.join(b)} share no request; replay one tape for both"
        )
    paired = np.isin(keys, both)
    masks = {side: mask & paired for side, mask in sides.items()}
    ok, weights, pairs = column(rows, "ok"), column(rows, "weight"), _pairs(rows, keys, masks)
    members = _members(rows, masks["A"] | masks["B"])
    found = [
        effect
        for group, member in members
        for metric in METRICS
        for effect in effects.of_requests(
            pairs, column(rows, metric), weights, member, group, metric
        )
    ]
    streamed = np.isfinite(column(rows, "ttft"))
    found += gap_effects.of_gaps(session, rows, pairs, streamed, members)
    return Comparison(
        a=list(a),
        b=list(b),
        pairs=len(both),
        unpaired={side: int((mask & ~paired).sum()) for side, mask in sides.items()},
        failed={side: float(1 - ok[mask].mean()) for side, mask in masks.items()},
        outcomes=comparable.outcomes(rows, masks),
        failed_on_one_side=comparable.failed_on_one_side(keys, ok, masks),
        lengths=comparable.lengths(rows, keys, masks),
        attained=attained(session, rows, pairs, weights),
        effects=found,
        warnings=comparable.warnings(session, rows, {"A": a, "B": b}, sides, masks),
    )


def _pairs(rows: pa.Table, keys: Ints, masks: dict[str, Any]) -> Pairs:
    """A key's time is that of its last row in A."""
    at_ns = np.zeros(int(keys.max()) + 1, np.int64)
    at_ns[keys[masks["A"]]] = rows["at_ns"].to_numpy()[masks["A"]]
    return Pairs(keys, comparable.numbered(rows, "run"), masks, at_ns)


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


def judge(found: Comparison, texts: Sequence[str]) -> dict[str, str | None]:
    """Why each gate fails, or None: it fails on a change beyond its limit that is clearly not zero.

    A gate on too few pairs fails too: nothing was shown. UsageError where a gate cannot be read.
    """
    return {text: _judge(found, gates.parse(text, GATES)) for text in texts}


def _judge(found: Comparison, gate: gates.Gate) -> str | None:
    if gate.name in _PARTS:
        if gate.is_time:
            raise UsageError(
                f"--fail-if {gate.text}: {gate.name} is a part of requests: {gate.name}>+1%"
            )
        return _judge_attained(found, gate) if gate.name != "failed" else _judge_failed(found, gate)
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


def _judge_failed(found: Comparison, gate: gates.Gate) -> str | None:
    more = found.failed["B"] - found.failed["A"]
    return f"{gate.text}: {more:+.2%} of requests" if gate.beyond(more) else None


def _judge_attained(found: Comparison, gate: gates.Gate) -> str | None:
    """Every SLO is held to the gate; one without an interval fails it."""
    if not found.attained:
        raise UsageError(f"--fail-if {gate.text}: give the objective, such as --slo ttft=500ms")
    for slo in found.attained:
        if slo.change is None or slo.lo is None or slo.hi is None:
            return f"{gate.text}: too few pairs for {slo.slo} (n={slo.n})"
        if gate.beyond(slo.change) and gate.clear(slo.lo, slo.hi):
            span = f"{100 * slo.lo:+.2f} .. {100 * slo.hi:+.2f} %"
            return f"{gate.text}: {slo.change:+.2%} of requests for {slo.slo}, 95 % {span}"
    return None


def percent(change: float | None) -> str:
    return display.NOTHING if change is None else f"{100 * change:+.1f} %"


def span(effect: Effect) -> str:
    if effect.lo is None or effect.hi is None:
        return display.TOO_FEW
    return f"{100 * effect.lo:+.1f} .. {100 * effect.hi:+.1f} %"
