"""The slowest requests of a run, and what they share; all of it from sql/tails/tails.sql."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from tokentape.analysis import display
from tokentape.analysis.session import Session
from tokentape.traces.errors import UsageError

METRICS = (
    *("ttft", "ttft_arrival", "ttfa", "ttfa_arrival", "tpot"),
    *("e2e", "e2e_content", "e2e_arrival", "send_lag"),
)
CLEAR = 10.8  # G of a 2 x 2 table that chance exceeds once in 1,000 (chi square, one degree)
_MOST_GROUPS, _MOST_REQUESTS = 12, 10
_NAMES = {
    "prompt": "prompt tokens up to",
    "output": "output tokens up to",
    "in_flight": "in flight up to",
    "waiting": "first tokens awaited up to",
    "reads": "read by our process",
    "client": "client reads",
    "worker": "our worker",
}
_COUNT = """
SELECT count(*) AS n, count(*) FILTER (tail) AS in_tail, any_value(threshold_ns) AS threshold_ns
FROM tails_of"""
_FACTS = """
SELECT
  sealed_requests / nullif(sealed_requests + lost_requests + unsealed_requests, 0) AS coverage,
  (SELECT count(*) FROM coverage AS c WHERE c.run = tapes.run AND NOT recording) AS pauses,
  (
    SELECT count(*) FROM requests AS r
    WHERE r.run = tapes.run AND outcome IS DISTINCT FROM 'ok'
  ) AS failed
FROM tapes
WHERE run = '{run}'
"""


@dataclass(frozen=True)
class Tails:
    """One run's tail. `n` requests have the metric, `in_tail` of them are above the threshold.

    coverage: part of what was seen that the tape holds; what is not on it may be the worst.
    """

    run: str
    metric: str
    above: str
    threshold_ns: float | None
    n: int
    in_tail: int
    failed: int
    coverage: float | None
    pauses: int
    groups: list[dict[str, Any]]
    worst: list[dict[str, Any]]
    sql: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    def text(self, width: int = 100) -> str:
        """Tables for a terminal, with the SQL that says the same."""
        lines = [f"{self.run}: {self.metric} above {self.above}", *self._cautions()]
        if self.threshold_ns is None:
            return "\n".join([*lines, f"too few (n={self.n}) to have a {self.above}"]) + "\n"
        lines.insert(1, f"over {display.duration(self.threshold_ns)}: {self.in_tail} of {self.n:,}")
        groups = self.groups_table()
        none = ["", "nothing is clearly more common in the tail than by chance"]
        lines += ["", *display.lines([groups], width)] if groups.rows else none
        worst = [
            [
                str(w["response_id"] or display.NOTHING),
                str(w["trace_id"] or display.NOTHING),
                display.duration(w["value_ns"]),
                *(w[c] for c in ("prompt", "output", "in_flight", "waiting", "cache", "minute")),
            ]
            for w in self.worst
        ]
        head = ["worst: response id", "trace id", self.metric, "prompt", "output", "in flight"]
        lines += ["", *display.table([*head, "waiting", "cache", "minute"], worst, width, texts=2)]
        lines += ["", *(f"{what}: {query}" for what, query in self.sql.items())]
        return "\n".join(lines) + "\n"

    def groups_table(self) -> display.Table:
        """What the tail shares, clearest first."""
        rows = [
            [
                _NAMES.get(g["property"], g["property"]),
                g["value"],
                f"{display.figure(g['lift'])}x",
                *(display.share(g[f"share_of_{which}"]) for which in ("tail", "all")),
                display.count(g["in_tail"]),
                display.count(g["requests"]),
            ]
            for g in self.groups
        ]
        head = ["shared by the tail", "", "lift", "of tail", "of all", "in tail", "requests"]
        return display.Table(head, rows, texts=2)

    def _cautions(self) -> list[str]:
        told = [f"the tape holds {display.share(self.coverage)} of what was seen"]
        if self.pauses:
            told.append(f"the recorder paused in {self.pauses} of its samples")
        if self.failed:
            told.append(f"{self.failed:,} requests without outcome ok have no latency here")
        return [f"! {line}" for line in told] if len(told) > 1 else told


def tails(session: Session, metric: str, above: str) -> list[Tails]:
    """The tail of each run of the session; `above` is a percentile such as p99.

    UsageError for a metric that has no value for each request, or what is no percentile.
    """
    if metric not in METRICS:
        raise UsageError(f"--metric {metric}: need one of {', '.join(METRICS)}")
    level = _level(above)
    return [_of_run(session, run, metric, above, level) for run in session.labels]


def _level(above: str) -> float:
    digits = above.removeprefix("p")
    if above.startswith("p") and digits.replace(".", "", 1).isdigit() and 0 < float(digits) < 100:
        return float(digits) / 100
    raise UsageError(f"--above {above}: need a percentile such as p99 or p99.9")


def _of_run(session: Session, run: str, metric: str, above: str, level: float) -> Tails:
    quoted = run.replace("'", "''")
    of = f"('{metric}', {level:g}) WHERE run = '{quoted}'"
    sql = {
        "the groups": f"FROM tails_groups{of} AND evidence > {CLEAR} ORDER BY evidence DESC",
        "the requests": f"FROM tails_of{of} AND tail ORDER BY value_ns DESC",
    }
    [count] = session.table(f"{_COUNT}{of}").to_pylist()
    [facts] = session.table(_FACTS.format(run=quoted)).to_pylist()
    enough = count["n"] > math.ceil(level * count["n"])  # as enough_samples in prelude.quantiles
    return Tails(
        run=run,
        metric=metric,
        above=above,
        threshold_ns=count["threshold_ns"] if enough else None,
        n=count["n"],
        in_tail=count["in_tail"] if enough else 0,
        failed=facts["failed"],
        coverage=facts["coverage"],
        pauses=facts["pauses"],
        groups=_rows(session, sql["the groups"], _MOST_GROUPS) if enough else [],
        worst=_rows(session, sql["the requests"], _MOST_REQUESTS) if enough else [],
        sql=sql,
    )


def _rows(session: Session, query: str, most: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = session.table(f"{query} LIMIT {most}").to_pylist()
    return found
