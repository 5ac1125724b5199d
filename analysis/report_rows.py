"""What the standard report shows, as plain rows: every query of it, and nothing else.

Nothing is computed here. A number that is not known is None, and what is missing has its row too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokentape.analysis import slo
from tokentape.analysis.session import Session

Row = dict[str, Any]

_TAPES = """
WITH
  _models AS (
    SELECT run, list(model ORDER BY requests DESC, model) AS models
    FROM (SELECT run, model, count(*) AS requests FROM requests GROUP BY ALL)
    WHERE model IS NOT NULL
    GROUP BY run
  )
SELECT
  tapes.* EXCLUDE (facts),
  coalesce(models, []) AS models,
  from_ns,
  until_ns,
  wall_epoch_unix_ns + from_ns AS first_arrival_unix_ns
FROM tapes
LEFT JOIN _models USING (run)
LEFT JOIN (SELECT run, from_ns, until_ns FROM rates) USING (run)
"""
_ASKED_APART = "('stalled_share', 'goodput', 'slo_attainment')"
_ERRORS = "FROM outcomes_errors ORDER BY requests DESC, outcome, http_status, error_type"
_CAUSES = "FROM schedule_causes WHERE late_cause IS NOT NULL ORDER BY requests DESC, late_cause"


@dataclass(frozen=True)
class ReportRows:
    """What a session's tapes say; every list has its rows in the order of the tapes."""

    tapes: list[Row]
    metrics: list[Row]
    titles: dict[str, str]
    clocks: list[Row]
    quality: list[Row]
    errors: list[Row]
    late_causes: list[Row]
    goodput: list[Row]
    steady: list[Row]
    stalls: list[Row]
    prefixes: list[Row]
    speculation: list[Row]
    phases: list[Row] | None
    interference: list[Row] | None
    calibration: list[Row] | None

    def as_dict(self) -> Row:
        """The tidy rows and the facts, for JSON: stable keys, NULL as None."""
        return {
            "tapes": self.tapes,
            "metrics": self.metrics,
            "clocks": self.clocks,
            "quality": self.quality,
            "errors": self.errors,
            "late_causes": self.late_causes,
            "goodput": self.goodput,
            "steady": self.steady,
            "stalls": self.stalls,
            "prefixes": self.prefixes,
            "speculation": self.speculation,
            "phases": self.phases,
            "interference": self.interference,
            "calibration": self.calibration,
        }


def ask(session: Session, *, phases: bool = False) -> ReportRows:
    """Ask all that the report shows; two passes over the events, one for stalls, one for the rest.

    phases: queue, prefill and decode as well, and what prefills cost others; some passes more.
    """
    order = {run: i for i, run in enumerate(session.labels)}

    def rows(query: str) -> list[Row]:
        return sorted(session.rows(query), key=lambda row: order[row["run"]])

    tapes = rows(_TAPES)
    for row, tape in zip(tapes, session.tapes, strict=True):
        row["facts"] = tape.facts
    stalls = rows("FROM stall_rates")
    goodput = sorted(slo.goodput(session), key=lambda row: order[row["run"]])
    metrics = rows(f"FROM metrics_long WHERE metric NOT IN {_ASKED_APART} ORDER BY metric, stat")
    metrics += _singles(metrics, stalls, goodput)
    metrics += rows("FROM phases_long") if phases else []
    metrics.sort(key=lambda row: (order[row["run"]], row["metric"], row["stat"]))
    return ReportRows(
        tapes=tapes,
        metrics=metrics,
        titles=dict(session.sql("SELECT metric, title FROM metrics").fetchall()),
        clocks=rows("FROM clocks ORDER BY stamp, requests DESC, clock"),
        quality=rows("FROM clocks_quality"),
        errors=rows(_ERRORS),
        late_causes=rows(_CAUSES),
        goodput=goodput,
        steady=rows("FROM steady") if any(t["role"] == "replay" for t in tapes) else [],
        stalls=stalls,
        prefixes=rows("FROM prefix_reuse"),
        speculation=rows("FROM speculation WHERE drafts > 0 ORDER BY source"),
        phases=rows("FROM phases_totals ORDER BY method") if phases else None,
        interference=rows("FROM interference") if phases else None,
        calibration=rows("FROM calibration_phases ORDER BY method, phase DESC") if phases else None,
    )


def _singles(metrics: list[Row], stalls: list[Row], goodput: list[Row]) -> Iterator[Row]:
    """The rows of metrics_long for what was asked apart, so that it is computed once."""
    likes = [row for row in metrics if row["metric"] == "completed_per_s"]  # the same attempted ...
    found = {row["run"]: row for row in stalls}
    for like in likes:
        of_run = [row for row in goodput if row["run"] == like["run"]]
        rows = [
            ("stalled_share", "value", "1", found.get(like["run"], {}), "stalled_share", "replies")
        ]
        for row in of_run or [{}]:
            stat = row.get("slo", "value")
            rows.append(("goodput", stat, "requests/s", row, "goodput_per_s", "judged"))
            rows.append(("slo_attainment", stat, "1", row, "attainment", "judged"))
        for metric, stat, unit, row, value, n in rows:
            known = {"value": row.get(value), "n": int(row.get(n) or 0), "unit": unit}
            yield like | {"metric": metric, "stat": stat} | known
