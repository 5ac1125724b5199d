"""The highest speed of a tape at which a candidate meets an SLO, by runs that stay as tapes.

A speed is met where the share of all requests that meet every limit, failed ones in the
denominator, is the wanted one or more: the goodput of `report --slo`. A run whose verdict blames
the client says nothing of the candidate and ends the search.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from tokentape.analysis.session import connect
from tokentape.analysis.slo import Slo, goodput
from tokentape.analysis.statistics import least_for_interval
from tokentape.jobs.bracket import Bracket, Judged, search
from tokentape.jobs.probes import Done, Probes
from tokentape.replay.run import Plan
from tokentape.traces.errors import CannotKeepUp, GateNotMet, TapeError

SHORT_S = 60.0  # in 60 s at 2 % above its capacity a server is 1.2 s behind


@dataclass
class Capacity:
    """What a search found; `done` are its runs by speed, `limit` why no higher speed was tried."""

    attain: float
    bracket: Bracket = field(default_factory=Bracket)
    done: dict[Fraction, Done] = field(default_factory=dict)
    limit: CannotKeepUp | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        met = self.bracket.met
        low, high = self.bracket.interval()
        return {
            "speed": float(met.speed) if met else None,
            "requests_per_s": self.done[met.speed].per_s if met else None,
            "missed_at": float(self.bracket.missed.speed) if self.bracket.missed else None,
            "lo": float(low) if low is not None else None,
            "hi": float(high) if high is not None else None,
            "attain": self.attain,
            "stopped_by": str(self.limit) if self.limit else self.bracket.why,
            "probes": [
                {
                    "speed": float(j.speed),
                    "attainment": j.attainment,
                    "lo": j.lo,
                    "hi": j.hi,
                    "met": j.met,
                    "requests": self.done[j.speed].requests,
                    "requests_per_s": self.done[j.speed].per_s,
                    "span_s": self.done[j.speed].span_s,
                    "verdict": self.done[j.speed].verdict,
                    "tape": str(self.done[j.speed].tape),
                }
                for j in sorted(self.bracket.tried, key=lambda j: j.speed)
            ],
        }

    def text(self) -> str:
        """A line for each probe, then the answer."""
        lines = []
        for j in sorted(self.bracket.tried, key=lambda j: j.speed):
            done = self.done[j.speed]
            lines.append(
                f"  {float(j.speed):>7g}x  {done.per_s:>8.2f}/s  {said(j)}, "
                f"{done.requests:,} requests, {done.verdict}  {done.tape.name}"
            )
        return "\n".join([*lines, *self._short(), self.answer()])

    def _short(self) -> list[str]:
        """Whether an end of the bracket stands on a run too short to see a server fall behind."""
        ends = [j for j in (self.bracket.met, self.bracket.missed) if j is not None]
        spans = [self.done[j.speed].span_s for j in ends]
        if min(spans, default=SHORT_S) >= SHORT_S:
            return []
        behind = "a server that falls behind slowly looks as if it kept up"
        return [f"! runs of {min(spans):.3g} s: {behind}; --duration {SHORT_S:.0f}s or more"]

    def answer(self) -> str:
        """The answer on one line."""
        bracket, met = self.bracket, self.bracket.met
        low, high = bracket.interval()
        ends = " .. ".join("?" if e is None else f"{float(e):g}x" for e in (low, high))
        if met is None:
            missed = f" down to {float(bracket.missed.speed):g}x" if bracket.missed else ""
            return f"capacity: none: the SLO is not met{missed}"
        at = f"{float(met.speed):g}x, {self.done[met.speed].per_s:.2f} requests/s"
        if bracket.missed is None:
            return f"capacity: at least {at}: the SLO was met at every speed tried"
        reason = {
            "tight": "",
            "told apart no further": "; longer runs would tell more",
            "most probes": "; it stopped after so many probes",
        }.get(bracket.why or "", "; it stopped early")
        missed = f"missed at {float(bracket.missed.speed):g}x"
        return f"capacity: {at} ({missed}; clearly met .. clearly missed: {ends}){reason}"


def said(judged: Judged) -> str:
    """How a speed did, in words."""
    span = (
        "no interval"
        if judged.lo is None or judged.hi is None
        else f"{100 * judged.lo:.1f} .. {100 * judged.hi:.1f}"
    )
    word = "met" if judged.met else "missed"
    clear = "" if judged.clear else ", not clearly"
    return f"{word}{clear}: {100 * judged.attainment:.2f} % ({span})"


def capacity(
    probes: Probes,
    slos: Sequence[Slo],
    found: Capacity,
    *,
    first: Fraction,
    least: Fraction,
    most: Fraction,
    tolerance: float,
) -> None:
    """Search; `found` is filled as it goes, so that it can be shown however the search ends.

    GateNotMet where no speed meets the SLO, CannotKeepUp where this machine is the limit.
    """

    def measure(speed: Fraction) -> Judged:
        done = found.done[speed] = probes.run(f"{float(speed):g}x", speed)
        judged = judge(done, slos, found.attain)
        probes.tell(f"{done.tape.name}: {said(judged)}")
        return judged

    try:
        search(measure, found.bracket, first=first, least=least, most=most, tolerance=tolerance)
    except CannotKeepUp as error:
        found.limit = error
        raise CannotKeepUp(f"{error}. {found.answer()}") from None
    if found.bracket.why == "never met":
        raise GateNotMet(f"{found.answer()} (--speed FROM..TO goes lower)")


def judge(done: Done, slos: Sequence[Slo], attain: float) -> Judged:
    """How a run did; of several SLOs, the one that fared worst."""
    with connect([done.tape], slos=slos) as session:
        rows = [row for row in goodput(session) if row["attainment"] is not None]
    if not rows:
        raise TapeError(f"{done.tape}: no request to which a limit of --slo applies")
    worst = min(rows, key=lambda row: float(row["attainment"]))
    return Judged(done.speed, worst["attainment"], worst["lo"], worst["hi"], attain)


def needed(plan: Plan, attain: float) -> str:
    """How long a run must be for the share at `attain` to have an interval, beside this plan."""
    least = least_for_interval(attain)
    per_s = plan.schedule.mean_per_s
    lasting = f", {math.ceil(least / per_s):,} s at {per_s:.3g}/s" if per_s else ""
    enough = "" if len(plan) >= least else ": too few, take a longer --window or --duration"
    return (
        f"p{100 * attain:g}: an interval needs {least:,} requests{lasting}; "
        f"this plan has {len(plan):,}{enough}"
    )
