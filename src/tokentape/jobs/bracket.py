"""The search for the highest speed that meets an SLO: pure, so that it can be tried on anything.

It doubles or halves from the first speed until one is met and one is not, then halves the bracket
in proportion. Each speed is measured once; a larger one than one that was missed is never tried.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

DIGITS = 3  # of a speed
MOST_PROBES = 20

Why = Literal["tight", "told apart no further", "never met", "always met", "most probes"]


@dataclass(frozen=True)
class Judged:
    """What a speed gave: the share that met the SLO, and 95 % of it; None where too few."""

    speed: Fraction
    attainment: float
    lo: float | None
    hi: float | None
    attain: float

    @property
    def met(self) -> bool:
        """Enough requests met the SLO."""
        return self.attainment >= self.attain

    @property
    def clear(self) -> bool:
        """The interval is all on one side, so another run would say the same."""
        if self.lo is None or self.hi is None:
            return False
        return self.lo >= self.attain if self.met else self.hi < self.attain


@dataclass
class Bracket:
    """Where the capacity lies: at `met` or above, below `missed`; None is not known."""

    met: Judged | None = None
    missed: Judged | None = None
    tried: list[Judged] = field(default_factory=list)
    why: Why | None = None

    @property
    def ratio(self) -> float:
        """Upper over lower end."""
        if self.met is None or self.missed is None:
            return math.inf
        return float(self.missed.speed / self.met.speed)

    def interval(self) -> tuple[Fraction | None, Fraction | None]:
        """The highest speed that was clearly met below all misses, the lowest clearly missed."""
        clear = [j for j in self.tried if j.clear]
        low = [j.speed for j in clear if j.met]
        high = [j.speed for j in clear if not j.met]
        first = min(high, default=None)
        return max((s for s in low if first is None or s < first), default=None), first

    def add(self, judged: Judged) -> None:
        """Take in a measured speed."""
        self.tried.append(judged)
        if judged.met:
            if self.met is None or judged.speed > self.met.speed:
                self.met = judged
        elif self.missed is None or judged.speed < self.missed.speed:
            self.missed = judged

    def text(self) -> str:
        """The bracket on a few words."""
        low = f"{float(self.met.speed):g}x" if self.met else "nothing"
        high = f"{float(self.missed.speed):g}x" if self.missed else "any speed tried"
        return f"between {low} (met) and {high} ({'missed' if self.missed else 'not missed'})"


def search(
    measure: Callable[[Fraction], Judged],
    bracket: Bracket,
    *,
    first: Fraction,
    least: Fraction,
    most: Fraction,
    tolerance: float,
) -> None:
    """Narrow the bracket until it is tight or cannot be; `bracket.why` says which.

    tolerance: 0.05 for ends that differ by 5 %. What `measure` raises ends the search, and the
    bracket holds what was known by then.
    """
    speed = min(max(first, least), most)
    while len(bracket.tried) < MOST_PROBES:
        bracket.add(measure(speed))
        met, missed = bracket.met, bracket.missed
        if missed is None:
            assert met is not None
            if met.speed >= most:
                bracket.why = "always met"
                return
            speed = min(most, met.speed * 2)
        elif met is None:
            if missed.speed <= least:
                bracket.why = "never met"
                return
            speed = max(least, missed.speed / 2)
        elif bracket.ratio <= 1 + tolerance:
            bracket.why = "tight"
            return
        elif not met.clear and not missed.clear and len(bracket.tried) > 2:
            bracket.why = "told apart no further"
            return
        else:
            speed = rounded(math.sqrt(met.speed * missed.speed))
            if not met.speed < speed < missed.speed:
                bracket.why = "tight"
                return
    bracket.why = "most probes"


def rounded(speed: float) -> Fraction:
    """A speed to DIGITS digits: a name that can be typed again."""
    return Fraction(f"{speed:.{DIGITS}g}")
