"""Many runs in order of time: each metric with its interval, and where it changed for good.

A change point is the split of the runs at which the two sides differ most, on a log scale, if
random orders of the same runs give such a difference in fewer than 1 of 100 cases; each side is
then split again. One odd run is no change: a side has three runs or more.
Source: Matteson and James 2014 (E-divisive) for the permutation test and the recursion; the
statistic here is Welch's t, which needs fewer runs than their energy distance.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tokentape.analysis import display, gates, statistics
from tokentape.analysis.session import Session
from tokentape.traces.errors import UsageError

METRICS = ("ttft", "ttft_arrival", "tpot", "e2e")
STATS = {"p50": 0.5, "p99": 0.99}
LEAST_RUNS = 10  # 5 against 5: 1 of 126 ways
LEAST_SIDE = 3
CHANCE = 1 / 100
LEAST_HISTORY = 5  # runs before the last, for a gate
GATES = (*(f"{metric}_{stat}" for metric in METRICS for stat in STATS), "output_tokens_per_s_mean")
_ORDERS = 2000
_SEED = 20261127

_VALUES = """
SELECT
  run,
  arrival_ns,
  weight,
  (first_content_ns - sent_ns)::DOUBLE AS ttft,
  (first_content_ns - arrival_ns)::DOUBLE AS ttft_arrival,
  tpot_ns AS tpot,
  (end_ns - sent_ns)::DOUBLE AS e2e
FROM requests
LEFT JOIN (
  SELECT run, request_id, max(tpot_ns) AS tpot_ns
  FROM tpot
  GROUP BY run, request_id
) USING (run, request_id)
WHERE outcome = 'ok'
"""
_RUNS = "SELECT run FROM tapes ORDER BY created_unix_ns NULLS FIRST"
_RATES = "SELECT run, output_tokens_per_s FROM rates"


@dataclass(frozen=True)
class Change:
    """From the run `at` on, `change` (new / old - 1, of geometric means) with its 95 % interval.

    chance: part of random orders with a split as clear.
    """

    at: str
    change: float
    lo: float
    hi: float
    chance: float


@dataclass(frozen=True)
class Series:
    """One metric over the runs, oldest first; None where a run has too few samples."""

    metric: str
    stat: str
    unit: str
    values: list[float | None]
    intervals: list[tuple[float | None, float | None]]
    changes: list[Change]
    n: int

    @property
    def word(self) -> str:
        """too few runs, no change, or how many."""
        if self.n < LEAST_RUNS:
            return f"{display.TOO_FEW} (n={self.n})"
        return (
            f"{len(self.changes)} changes"
            if len(self.changes) > 1
            else ("1 change" if self.changes else "no change")
        )


@dataclass(frozen=True)
class Trend:
    """All series over the same runs."""

    runs: list[str]
    series: list[Series]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"runs": self.runs, "series": [asdict(s) | {"word": s.word} for s in self.series]}

    def text(self, width: int = 100) -> str:
        """One line for each metric, then one for each change."""
        rows = [[f"{s.metric} {s.stat}", s.word, *self._latest(s)] for s in self.series]
        head = ["metric", "over the runs", "first", "latest", "95 %"]
        lines = [f"{len(self.runs)} runs: {self.runs[0]} .. {self.runs[-1]}", ""]
        lines += display.table(head, rows, width, texts=2)
        changes = [
            [f"{s.metric} {s.stat}", c.at, f"{100 * c.change:+.1f} %", _span(c), f"{c.chance:.3f}"]
            for s in self.series
            for c in s.changes
        ]
        head = ["changed", "from the run", "by", "95 %", "by chance"]
        lines += ["", *display.table(head, changes, width, texts=2)] if changes else []
        return "\n".join(lines) + "\n"

    def _latest(self, series: Series) -> Iterator[str]:
        for value in (series.values[0], series.values[-1]):
            yield display.quantity(value, series.unit)
        lo, hi = (display.quantity(end, series.unit) for end in series.intervals[-1])
        yield f"{lo} .. {hi}"


def trend(session: Session) -> Trend:
    """The session's runs in order of when they were made; UsageError for one run only."""
    runs = [run for (run,) in session.sql(_RUNS).fetchall()]
    if len(runs) < 2:
        raise UsageError("trend: give two runs or more")
    table = session.table(_VALUES)
    names = np.array(table["run"].to_pylist())
    series = []
    for metric in METRICS:
        values = table[metric].to_numpy()
        known = np.isfinite(values)
        for stat, p in STATS.items():
            found = [
                statistics.estimate(
                    values[mine],
                    table["arrival_ns"].to_numpy()[mine],
                    p,
                    table["weight"].to_numpy()[mine],
                )
                for mine in (known & (names == run) for run in runs)
            ]
            ends = [(e.lo, e.hi) for e in found]
            series.append(_series(metric, stat, "ns", runs, [e.value for e in found], ends))
    rates = dict(session.sql(_RATES).fetchall())
    speeds = [rates.get(run) for run in runs]
    unknown: list[tuple[float | None, float | None]] = [(None, None)] * len(runs)
    series.append(_series("output_tokens_per_s", "mean", "tokens/s", runs, speeds, unknown))
    return Trend(runs, series)


def _series(
    metric: str,
    stat: str,
    unit: str,
    runs: list[str],
    values: list[float | None],
    intervals: list[tuple[float | None, float | None]],
) -> Series:
    found = changes(runs, values)
    n = sum(value is not None and value > 0 for value in values)
    return Series(metric, stat, unit, values, intervals, found, n)


def changes(runs: Sequence[str], values: Sequence[float | None]) -> list[Change]:
    """The change points of a series, oldest first; what is None or not above 0 is left out."""
    known = [(run, math.log(v)) for run, v in zip(runs, values, strict=True) if v and v > 0]
    logs = np.array([v for _, v in known])
    return [
        _change(known[at][0], logs[begin:at], logs[at:end], chance)
        for begin, at, end, chance in _splits(logs, 0, len(logs))
    ]


def _splits(logs: Any, begin: int, end: int) -> list[tuple[int, int, int, float]]:
    """(begin, split, end, chance) of every change between two runs, in order."""
    part = logs[begin:end]
    if len(part) < LEAST_RUNS:
        return []
    at, best = _clearest(part[None, :])
    rng = np.random.default_rng(_SEED)
    orders = rng.permuted(np.tile(part, (_ORDERS, 1)), axis=1)
    chance = (1 + int((_clearest(orders)[1] >= best[0] * (1 - 1e-9)).sum())) / (_ORDERS + 1)
    if chance >= CHANCE:
        return []
    split = begin + int(at[0])
    before, after = _splits(logs, begin, split), _splits(logs, split, end)
    # the sides of a change end where the next change begins
    first = before[-1][1] if before else begin
    last = after[0][1] if after else end
    return [*before, (first, split, last, chance), *after]


def _clearest(rows: Any) -> tuple[Any, Any]:
    """For each row, where Welch's t between the two sides is largest, and how large."""
    n = rows.shape[1]
    scores = [_welch(rows[:, :k], rows[:, k:]) for k in range(LEAST_SIDE, n - LEAST_SIDE + 1)]
    found = np.array(scores)
    return found.argmax(axis=0) + LEAST_SIDE, found.max(axis=0)


def _welch(a: Any, b: Any) -> Any:
    spread = np.sqrt(a.var(axis=1, ddof=1) / a.shape[1] + b.var(axis=1, ddof=1) / b.shape[1])
    return np.abs(b.mean(axis=1) - a.mean(axis=1)) / np.maximum(spread, 1e-9)


def _change(at: str, old: Any, new: Any, chance: float) -> Change:
    step = float(new.mean() - old.mean())
    parts = [side.var(ddof=1) / len(side) for side in (old, new)]
    df = sum(parts) ** 2 / max(
        sum(v**2 / (len(s) - 1) for v, s in zip(parts, (old, new), strict=True)), 1e-300
    )
    reach = statistics.student(max(df, 1)) * math.sqrt(sum(parts))
    return Change(at, math.expm1(step), math.expm1(step - reach), math.expm1(step + reach), chance)


def _span(change: Change) -> str:
    return f"{100 * change.lo:+.1f} .. {100 * change.hi:+.1f} %"


def judge(found: Trend, texts: Sequence[str]) -> dict[str, str | None]:
    """Why the latest run fails each gate, or None; UsageError where a gate cannot be read.

    It fails with a change beyond the limit that lies outside the interval in which one more run of
    the history is expected (95 %, Student's t on a log scale). The history is the runs before it,
    from the last change point on. One that is too short to tell fails too: nothing was shown.
    """
    return {text: _judge(found, gates.parse(text, GATES)) for text in texts}


def _judge(found: Trend, gate: gates.Gate) -> str | None:
    [series] = [s for s in found.series if f"{s.metric}_{s.stat}" == gate.name]
    if gate.is_time and series.unit != "ns":
        raise UsageError(f"--fail-if {gate.text}: {series.metric} is no time: use %")
    value = series.values[-1]
    if not value or value <= 0:
        return f"{gate.text}: {display.TOO_FEW} samples in {found.runs[-1]}"
    if gate.own:
        return f"{gate.text}: {display.duration(value)}" if gate.beyond(value) else None
    logs = _history(found.runs[:-1], series.values[:-1])
    if len(logs) < LEAST_HISTORY:
        return f"{gate.text}: too few runs before {found.runs[-1]} (n={len(logs)})"
    usual = math.exp(float(logs.mean()))
    reach = statistics.student(len(logs) - 1) * float(logs.std(ddof=1))
    reach *= math.sqrt(1 + 1 / len(logs))
    lo, hi = (value / usual * math.exp(end) - 1 for end in (-reach, reach))
    change = value - usual if gate.is_time else value / usual - 1
    if gate.beyond(change) and gate.clear(lo, hi):
        more = f"{100 * (value / usual - 1):+.1f} %"
        told = f"{more} over {len(logs)} runs, 95 % {100 * lo:+.1f} .. {100 * hi:+.1f} %"
        return f"{gate.text}: {told}"
    return None


def _history(runs: Sequence[str], values: Sequence[float | None]) -> Any:
    """Logs of the values since the last change point."""
    found = changes(runs, values)
    begin = runs.index(found[-1].at) if found else 0
    return np.array([math.log(v) for v in values[begin:] if v and v > 0])
