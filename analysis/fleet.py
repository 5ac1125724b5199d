"""How many GPUs some traffic needs, and what they cost: a capture's peak over a run's capacity.

The capacity is that of the operating point of some runs (frontier.py): the load that one deployment
carried while it met the SLO. Every assumption is in the answer, beside what it rests on.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from tokentape.analysis import display
from tokentape.analysis.frontier import frontier
from tokentape.analysis.session import Session
from tokentape.traces.errors import UsageError

HOURS_A_MONTH = 730.0
RATES = ("requests", "input_tokens", "output_tokens")
_SLICES = """
WITH _slices AS (
  SELECT
    time_bucket_ns(arrival_ns - first_ns, {slice_ns}) AS from_ns,
    count(*) AS n,
    sum(weight) AS requests,
    sum(weight * input_tokens)::DOUBLE AS input_tokens,
    sum(weight * output_tokens)::DOUBLE AS output_tokens
  FROM requests
  JOIN (SELECT run, first_ns, last_ns FROM _run_spans) USING (run)
  WHERE run = '{run}'
  GROUP BY ALL
)
FROM _slices
"""
_SPLIT = """
SELECT prefill_share
FROM price_split(
  (SELECT any_value(prefill_ns_per_token) / 1e9 FROM prefill_fit WHERE run = '{run}'), 0.1
)
WHERE run = '{run}'
"""


@dataclass(frozen=True)
class Fleet:
    """What the traffic of `traffic` needs of deployments like that of `run`; None: not known.

    need: deployments at the peak, without headroom and spare; lo and hi are its interval. busiest:
    which rate decides. usd_per_m_*: over the traffic's mean rates, so idle GPUs are paid as well.
    """

    traffic: str
    run: str
    gpus_each: float
    busiest: str
    peak_from_ns: int
    need: float
    need_lo: float | None
    need_hi: float | None
    deployments: int
    deployments_lo: int | None
    deployments_hi: int | None
    gpus: float
    usd_per_month: float | None
    usd_per_m_input: float | None
    usd_per_m_output: float | None
    assumptions: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    def text(self) -> str:
        """The answer, then what it rests on."""
        span = "too short a run for an interval"
        if self.deployments_lo is not None and self.deployments_hi is not None:
            each = self.gpus_each
            span = f"{self.deployments_lo * each:g} to {self.deployments_hi * each:g} at 95 %"
        lines = [
            (
                f"{self.gpus:g} GPUs ({span}): {self.deployments} times the {self.gpus_each:g} "
                f"of {self.run}"
            ),
            f"peak need: {self.need:.2f} deployments, decided by {self.busiest.replace('_', ' ')}",
            f"USD a month: {display.figure(self.usd_per_month)}",
            (
                f"USD for a million tokens: input {display.figure(self.usd_per_m_input)}, "
                f"output {display.figure(self.usd_per_m_output)}"
            ),
            "",
            *(f"- {assumption}" for assumption in self.assumptions),
        ]
        return "\n".join(lines) + "\n"


def fleet(
    session: Session,
    traffic: str,
    *,
    attain: float = 0.99,
    headroom: float = 0.2,
    spare: int = 1,
    peak_ns: int = 3_600_000_000_000,
) -> Fleet:
    """Size deployments for the run labelled `traffic`; the session's other runs are candidates.

    headroom: part added to the peak. spare: deployments that may fail.
    UsageError where no candidate meets the SLO, or one does not say how many GPUs it had.
    """
    points = [p for p in frontier(session, attain=attain).points if p["run"] != traffic]
    able = [p for p in points if p["attainment"] is not None and p["attainment"] >= attain]
    known = [p for p in able if p["tokens_per_s_gpu"] is not None]
    if not able:
        raise UsageError(f"fleet: no run met the SLO for {attain:.0%} of its requests")
    if not known:
        raise UsageError("fleet: the runs do not say how many GPUs they had; give --gpus")
    point = max(known, key=lambda p: float(p["tokens_per_s_gpu"]))
    capacity = dict(zip(RATES, (point[c] for c in _CAPACITIES), strict=True))
    slices, length_s = _slices(session, traffic, peak_ns)
    peak, busiest, need = _peak(slices, capacity, min(length_s, peak_ns / 1e9))
    lo, hi = _interval(point, need, peak["n"])

    def count(needed: float | None) -> int | None:
        return None if needed is None else math.ceil(needed * (1 + headroom)) + spare

    deployments = math.ceil(need * (1 + headroom)) + spare
    gpus = deployments * point["gpus"]
    price = point["usd_per_gpu_hour"]
    usd = None if price is None else gpus * price * HOURS_A_MONTH
    return Fleet(
        traffic=traffic,
        run=point["run"],
        gpus_each=point["gpus"],
        busiest=busiest,
        peak_from_ns=peak["from_ns"],
        need=need,
        need_lo=lo,
        need_hi=hi,
        deployments=deployments,
        deployments_lo=count(lo),
        deployments_hi=count(hi),
        gpus=gpus,
        usd_per_month=usd,
        **_unit_prices(session, point["run"], slices, length_s, usd),
        assumptions=_assumptions(
            point, traffic, attain, headroom, spare, slices, length_s, peak_ns
        ),
    )


_CAPACITIES = ("offered_per_s", "input_tokens_per_s", "output_tokens_per_s")


def _slices(session: Session, run: str, peak_ns: int) -> tuple[list[dict[str, Any]], float]:
    quoted = run.replace("'", "''")
    found = session.table(_SLICES.format(slice_ns=peak_ns, run=quoted)).to_pylist()
    spans = session.table("SELECT run, last_ns - first_ns AS ns FROM _run_spans").to_pylist()
    [length_ns] = [span["ns"] for span in spans if span["run"] == run] or [0]
    if not length_ns:
        raise UsageError(f"fleet: {run} holds no traffic")
    return found, length_ns / 1e9


def _peak(
    slices: list[dict[str, Any]], capacity: dict[str, Any], slice_s: float
) -> tuple[dict[str, Any], str, float]:
    """The slice that needs most, the rate that decides it, and how many deployments it needs."""
    needs = [
        (one[rate] / slice_s / capacity[rate], rate, i)
        for i, one in enumerate(slices)
        for rate in RATES
        if one[rate] is not None and capacity[rate]
    ]
    need, rate, i = max(needs)
    return slices[i], rate, need


def _interval(
    point: dict[str, Any], need: float, n: int
) -> tuple[float, float] | tuple[None, None]:
    """The need with capacity and peak (a Poisson count) at the ends of their intervals."""
    lo, hi, mid = (point[f"tokens_per_s_gpu{end}"] for end in ("_lo", "_hi", ""))
    if not lo or hi is None:
        return None, None
    noise = 1.96 / math.sqrt(n)
    return need * max(1 - noise, 0) * mid / hi, need * (1 + noise) * mid / lo


def _unit_prices(
    session: Session, run: str, slices: list[dict[str, Any]], length_s: float, usd: float | None
) -> dict[str, float | None]:
    """USD for a million tokens of a mean month, split as the run's GPUs spent their time."""
    split = session.table(_SPLIT.format(run=run.replace("'", "''"))).to_pylist()
    share = split[0]["prefill_share"] if split else None
    months = length_s / 3600 / HOURS_A_MONTH
    prices: dict[str, float | None] = {}
    for name, part in (("input", share), ("output", None if share is None else 1 - share)):
        tokens = sum(one[f"{name}_tokens"] or 0 for one in slices) / months
        known = usd is not None and part is not None and tokens
        prices[f"usd_per_m_{name}"] = usd * part * 1e6 / tokens if usd and part and known else None
    return prices


def _assumptions(
    point: dict[str, Any],
    traffic: str,
    attain: float,
    headroom: float,
    spare: int,
    slices: list[dict[str, Any]],
    length_s: float,
    peak_ns: int,
) -> list[str]:
    short = length_s * 1e9 < peak_ns
    peak = f"the whole of {traffic}, which is shorter" if short else f"the busiest of {len(slices)}"
    rates = ", ".join(f"{display.figure(point[c])} {c.replace('_', ' ')}" for c in _CAPACITIES)
    mix = point["input_tokens_per_s"] / max(point["output_tokens_per_s"], 1e-9)
    ours = sum(s["input_tokens"] or 0 for s in slices) / max(
        sum(s["output_tokens"] or 0 for s in slices), 1e-9
    )
    return [
        f"peak of {display.duration(peak_ns)}: {peak}",
        (
            f"one deployment carries what {point['run']} did ({point['measured_in']}): {rates}; "
            f"{point['attainment']:.2%} in the SLO of {attain:.0%}; more was not tried"
        ),
        (
            f"input tokens for each output token: {display.figure(ours)} here, "
            f"{display.figure(mix)} in the run; the rate that needs most decides"
        ),
        "requests spread evenly over deployments, and prefix reuse survives the spreading",
        f"{headroom:.0%} headroom over the peak; {spare} deployments may fail",
        f"a month has {HOURS_A_MONTH:g} h, all paid; its traffic is the mean of {traffic}",
        "the interval holds the noise of the run's rate and of the peak's count, and no growth",
    ]
