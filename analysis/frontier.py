"""The frontier of some runs: points with intervals, the operating point, the speed of light.

The points are the view `frontier`. Here is what SQL has no part for: bootstrap intervals, and the
three steps of the field: a baseline's frontier, the point to run at, what the others push it to.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tokentape.analysis import display, statistics
from tokentape.analysis.session import Session
from tokentape.traces.errors import UsageError

_REPLIES = "SELECT run, arrival_ns, tokens_per_s, weight FROM _frontier_replies"
_SECONDS = """
SELECT rates.run, rates.from_ns, output_tokens
FROM rates_over_time(1_000_000_000) AS rates
JOIN _frontier_windows AS w USING (run)
WHERE rates.from_ns >= w.from_ns AND rates.from_ns + 1_000_000_000 <= w.until_ns
"""


@dataclass(frozen=True)
class LightSpeed:
    """What memory allows: each token reads the model once, so no user can be faster."""

    model_bytes: float
    bytes_per_s_gpu: float

    def tokens_per_s_user(self, gpus: float) -> float:
        """The most tokens/s that one stream can have on so many GPUs (roofline, batch of one)."""
        return self.bytes_per_s_gpu * gpus / self.model_bytes


@dataclass(frozen=True)
class Frontier:
    """Rows of the view `frontier`, best for the user first, with intervals and a part in the story.

    operating: the run with the most tokens/s/GPU whose attainment is at least `attain`; None where
    none is, or no SLO was given. pushed: the most tokens/s/GPU of any run that is as good for the
    user as the baseline's operating point, over what that point has.
    """

    points: list[dict[str, Any]]
    baseline: list[str]
    attain: float
    operating: str | None
    pushed: float | None
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    def text(self, width: int = 100) -> str:
        """A table for a terminal, then the three steps."""
        lines = [f"! {w}" for w in self.warnings]
        lines += [*([""] if lines else []), *display.lines([self.table()], width)]
        story = self.story()
        lines += [*([""] if self.baseline else []), *story]
        return "\n".join(lines) + "\n"

    def table(self) -> display.Table:
        """The points with their intervals."""
        rows = [
            [
                p["run"],
                p["configuration"] or display.NOTHING,
                _with_span(p, "tokens_per_s_user"),
                _with_span(p, "tokens_per_s_gpu"),
                display.figure(p["usd_per_m_output"]),
                display.figure(p["joules_per_output_token"]),
                display.share(p["attainment"]),
                display.share(p["of_light_speed"]),
                p["part"],
            ]
            for p in self.points
        ]
        head = ["run", "configuration", "tokens/s/user", "tokens/s/GPU", "USD/M out", "J/token"]
        head += ["met SLO", "of light", ""]
        return display.Table(head, rows, texts=2)

    def story(self) -> list[str]:
        """The three steps, as far as they were asked for."""
        lines = []
        if self.baseline:
            lines += [f"baseline: {', '.join(self.baseline)}"]
        if self.operating:
            lines.append(f"operating point at {self.attain:.0%} of requests: {self.operating}")
        if self.pushed is not None:
            lines.append(
                f"pushed: {self.pushed:.2f}x the tokens/s/GPU of the baseline, its users as fast"
            )
        return lines


def frontier(
    session: Session,
    *,
    baseline: Collection[str] = (),
    attain: float = 0.99,
    light: LightSpeed | None = None,
) -> Frontier:
    """The frontier of the session's runs; UsageError where a baseline is none of them.

    baseline: run labels whose frontier the others may push; empty: none.
    """
    if unknown := set(baseline) - set(session.labels):
        raise UsageError(
            f"--baseline {min(unknown)}: no such run; there are {', '.join(session.labels)}"
        )
    points = session.table("FROM frontier ORDER BY tokens_per_s_user DESC NULLS LAST").to_pylist()
    replies, seconds = session.table(_REPLIES), session.table(_SECONDS)
    for point in points:
        point.update(_intervals(point, replies, seconds))
        speed, gpus = point["tokens_per_s_user"], point["gpus"]
        known = light is not None and speed is not None and gpus is not None
        point["of_light_speed"] = speed / light.tokens_per_s_user(gpus) if light and known else None
    operating = _operating(points, attain)
    for point in points:
        point["part"] = _part(point, operating)
    return Frontier(
        points=points,
        baseline=[run for run in session.labels if run in set(baseline)],
        attain=attain,
        operating=operating,
        pushed=_pushed(points, set(baseline), attain),
        warnings=_warnings(session, points),
    )


def _intervals(point: dict[str, Any], replies: Any, seconds: Any) -> dict[str, Any]:
    """95 % of the median of the users' speeds and of the mean rate; None on too short a run."""
    mine = np.array(replies["run"].to_pylist()) == point["run"]
    speeds, at_ns, weights = (
        replies[c].to_numpy()[mine] for c in ("tokens_per_s", "arrival_ns", "weight")
    )
    user = statistics.estimate(speeds, at_ns, 0.5, weights)
    mine = np.array(seconds["run"].to_pylist()) == point["run"]
    rate = statistics.mean(
        seconds["output_tokens"].to_numpy()[mine], seconds["from_ns"].to_numpy()[mine]
    )
    gpus = point["gpus"] or float("nan")
    known = rate.lo is not None and rate.hi is not None and point["gpus"] is not None
    return {
        "tokens_per_s_user_lo": user.lo,
        "tokens_per_s_user_hi": user.hi,
        "tokens_per_s_gpu_lo": (rate.lo or 0.0) / gpus if known else None,
        "tokens_per_s_gpu_hi": (rate.hi or 0.0) / gpus if known else None,
    }


def _operating(points: list[dict[str, Any]], attain: float) -> str | None:
    good = [p for p in points if p["attainment"] is not None and p["attainment"] >= attain]
    known = [p for p in good if p["tokens_per_s_gpu"] is not None]
    return max(known, key=lambda p: float(p["tokens_per_s_gpu"]))["run"] if known else None


def _pushed(points: list[dict[str, Any]], baseline: set[str], attain: float) -> float | None:
    old = [p for p in points if p["run"] in baseline and p["tokens_per_s_gpu"] is not None]
    chosen = _operating(old, attain) or next(iter(p["run"] for p in old), None)
    if chosen is None or len(old) == len(points):
        return None
    [at] = [p for p in old if p["run"] == chosen]
    as_fast = [
        p["tokens_per_s_gpu"]
        for p in points
        if p["tokens_per_s_gpu"] is not None
        and (p["tokens_per_s_user"] or 0) >= (at["tokens_per_s_user"] or 0)
    ]
    return float(max(as_fast) / at["tokens_per_s_gpu"]) if at["tokens_per_s_gpu"] else None


def _part(point: dict[str, Any], operating: str | None) -> str:
    if point["run"] == operating:
        return "operating point"
    if point["dominated"] is None:
        return "not placed"
    return "dominated" if point["dominated"] else "frontier"


def _warnings(session: Session, points: list[dict[str, Any]]) -> list[str]:
    found = []
    for label, tape in zip(session.labels, session.tapes, strict=True):
        level = (tape.facts.get("verdict") or {}).get("level", "valid")
        if level != "valid":
            found.append(f"the run {label} is {level}; see report {label}")
    for p in points:
        if p["measured_in"] == "whole run":
            found.append(f"{p['run']} has no steady window: ramp and drain are in its numbers")
        if p["gpus"] is None:
            found.append(f"{p['run']} does not say how many GPUs it had; give --gpus {p['run']}=N")
    models = {p["model"] for p in points} - {None}
    if len(models) > 1:
        found.append(f"the runs are of different models: {', '.join(sorted(models))}")
    return found


def _with_span(point: dict[str, Any], name: str) -> str:
    lo, hi = point[f"{name}_lo"], point[f"{name}_hi"]
    shown = display.figure(point[name])
    return (
        shown
        if lo is None or hi is None
        else f"{shown} ({display.figure(lo)}..{display.figure(hi)})"
    )
