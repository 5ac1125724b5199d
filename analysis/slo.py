"""Service level objectives as the reader gives them, and how well runs met them.

What meeting an SLO means is defined in sql/slo/goodput.sql; here are its Python form and the
interval of the attainment, which needs a bootstrap.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tokentape.analysis import statistics

if TYPE_CHECKING:
    from tokentape.analysis.session import Session

LIMITS = ("ttft", "ttft_arrival", "ttfa", "ttfa_arrival", "tpot", "e2e", "e2e_arrival")
UNMET = ("missed", "failed", "aborted", "cut")  # verdicts of goodput_judged
SLO_TABLE = pa.schema(
    [
        ("slo", pa.string()),
        ("preset", pa.string()),
        ("model", pa.string()),
        ("tenant", pa.string()),
        ("prompt_from", pa.int64()),
        ("prompt_until", pa.int64()),
        *((f"{metric}_ns", pa.int64()) for metric in LIMITS),
    ]
)
UNKNOWN_PRESETS = """
SELECT preset FROM _slos
WHERE preset IS NOT NULL AND preset NOT IN (SELECT slo FROM slos_presets)
"""
_JUDGED = """
SELECT run, slo, verdict, arrival_ns, weight FROM goodput_requests
WHERE verdict <> 'unjudged'
"""


@dataclass(frozen=True)
class Slo:
    """One objective: limits in ns by metric (of LIMITS), for all requests or for a class of them.

    preset: a name in the view slos_presets, for the limits that are not given here.
    """

    name: str
    limits_ns: Mapping[str, int] = field(default_factory=dict)
    preset: str | None = None
    model: str | None = None
    tenant: str | None = None
    prompt_from: int | None = None
    prompt_until: int | None = None

    def row(self) -> dict[str, Any]:
        """The row of SLO_TABLE."""
        return {
            "slo": self.name,
            "preset": self.preset,
            "model": self.model,
            "tenant": self.tenant,
            "prompt_from": self.prompt_from,
            "prompt_until": self.prompt_until,
            **{f"{metric}_ns": self.limits_ns.get(metric) for metric in LIMITS},
        }


def slo_table(slos: Iterable[Slo]) -> pa.Table:
    """What the views `slos` and `goodput` stand on."""
    return pa.Table.from_pylist([slo.row() for slo in slos], schema=SLO_TABLE)


def goodput(session: "Session") -> list[dict[str, Any]]:
    """Rows of the view `goodput` with `judged` requests and `lo`, `hi`: 95 % of the attainment.

    lo and hi are None where the run is too short for an interval.
    """
    if not session.table("FROM slos").num_rows:
        return []
    rows: list[dict[str, Any]] = session.table("FROM goodput ORDER BY run, slo").to_pylist()
    judged = session.table(_JUDGED)
    keys = np.array(
        [f"{r}\0{s}" for r, s in zip(*(judged[c].to_pylist() for c in ("run", "slo")), strict=True)]
    )
    met = np.array([v == "met" for v in judged["verdict"].to_pylist()], dtype=float)
    at_ns, weights = judged["arrival_ns"].to_numpy(), judged["weight"].to_numpy()
    for row in rows:
        mine = keys == f"{row['run']}\0{row['slo']}"
        found = statistics.share(met[mine], at_ns[mine], weights[mine])
        row.update(judged=row["requests"] - row["unjudged"], lo=found.lo, hi=found.hi)
    return rows
