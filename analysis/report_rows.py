"""What the standard report shows, as plain rows: every query of it, and nothing else.

Nothing is computed here. A number that is not known is None, and what is missing has its row too.
"""

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
    phases: list[Row] | None
    interference: list[Row] | None

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
            "phases": self.phases,
            "interference": self.interference,
        }


def ask(session: Session, *, phases: bool = False) -> ReportRows:
    """Ask all that the report shows; two passes over the events, one for ICL, one for ITL.

    phases: queue, prefill and decode as well, and what prefills cost others; some passes more.
    """
    order = {run: i for i, run in enumerate(session.labels)}

    def rows(query: str) -> list[Row]:
        found: list[Row] = session.table(query).to_pylist()
        return sorted(found, key=lambda row: order[row["run"]])

    tapes = rows(_TAPES)
    for row, tape in zip(tapes, session.tapes, strict=True):
        row["facts"] = tape.facts
    return ReportRows(
        tapes=tapes,
        metrics=rows("FROM metrics_long ORDER BY metric, stat"),
        titles=dict(session.sql("SELECT metric, title FROM metrics").fetchall()),
        clocks=rows("FROM clocks ORDER BY stamp, requests DESC, clock"),
        quality=rows("FROM clocks_quality"),
        errors=rows(_ERRORS),
        late_causes=rows(_CAUSES),
        goodput=sorted(slo.goodput(session), key=lambda row: order[row["run"]]),
        steady=rows("FROM steady"),
        stalls=rows("FROM stall_rates"),
        prefixes=rows("FROM prefix_reuse"),
        phases=rows("FROM phases_totals ORDER BY method") if phases else None,
        interference=rows("FROM interference") if phases else None,
    )
