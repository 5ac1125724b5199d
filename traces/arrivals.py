"""How requests arrive: rate, burstiness, how coarse their clock was, where none came. Pure.

CV is the standard deviation of the gaps over their mean: 1 for a Poisson process. The index of
dispersion is the variance of the counts in windows over their mean: 1 for Poisson too, and larger
where bursts come in bursts; the windows are 1 s, or the smallest whole second that makes no more
than a million of them. Source: Gusella, "Characterizing the variability of arrival processes with
indexes of dispersion", IEEE JSAC 9(2), 1991.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NS_PER_S = 1_000_000_000
MOST_WINDOWS = 1_000_000
MANY_TIES = 0.2  # a share of arrivals beyond the first at their instant: more is no chance
COARSE_NS = 100_000_000  # a step that divides every gap, from this on, is worth a warning


@dataclass(frozen=True)
class Arrivals:
    """What the arrivals of a tape say; None where there are too few to say it.

    `step_ns` divides every gap. `quantised` is true where the trace's clock was so coarse that
    arrivals share instants or a step, so that a replay sends them in volleys.
    """

    first_ns: int | None = None
    last_ns: int | None = None
    per_s: float | None = None
    most_per_s: int | None = None
    instants: int = 0
    cv: float | None = None
    dispersion: float | None = None
    window_s: int | None = None
    step_ns: int | None = None
    usual_gap_ns: int | None = None
    quantised: bool = False
    longest_gap_ns: int | None = None
    longest_gap_at_ns: int | None = None


def arrivals_of(times_ns: NDArray[np.int64]) -> Arrivals:
    """The figures for a tape's arrivals, in any order."""
    times = np.sort(times_ns)
    if not len(times):
        return Arrivals()
    first, last = int(times[0]), int(times[-1])
    span_ns = last - first
    if not span_ns:
        return Arrivals(first, last, most_per_s=len(times), instants=1)
    gaps = np.diff(times)
    between = gaps[gaps > 0]
    step_ns = int(np.gcd.reduce(between))
    longest = int(np.argmax(gaps))
    window_s = max(1, -(-span_ns // NS_PER_S // MOST_WINDOWS))
    ties = 1 - (len(between) + 1) / len(times)
    return Arrivals(
        first_ns=first,
        last_ns=last,
        per_s=len(gaps) * NS_PER_S / span_ns,
        most_per_s=most_within(times, NS_PER_S),
        instants=len(between) + 1,
        cv=float(gaps.std() / gaps.mean()),
        dispersion=dispersion(times, window_s * NS_PER_S),
        window_s=window_s,
        step_ns=step_ns,
        usual_gap_ns=int(np.median(between)),
        quantised=len(times) > 10 and (ties > MANY_TIES or step_ns >= COARSE_NS),
        longest_gap_ns=int(gaps[longest]),
        longest_gap_at_ns=int(times[longest]),
    )


def dispersion(sorted_ns: NDArray[np.int64], width_ns: int) -> float | None:
    """The index of dispersion over whole windows of a width.

    None for fewer than two windows, or for so many that they would not fit into memory.
    """
    since_ns = sorted_ns - sorted_ns[:1]
    windows = int(since_ns[-1]) // width_ns if len(since_ns) else 0
    if not 2 <= windows <= 20 * MOST_WINDOWS:
        return None
    inside = since_ns[since_ns < windows * width_ns]
    counts = np.bincount(inside // width_ns, minlength=windows)
    return float(counts.var() / counts.mean())


def most_within(sorted_ns: NDArray[np.int64], width_ns: int) -> int:
    """The most arrivals that any half-open interval of a width holds."""
    after = np.searchsorted(sorted_ns, sorted_ns + width_ns, side="left")
    return int((after - np.arange(len(sorted_ns))).max())
