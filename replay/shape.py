"""What a load feels like to a server, in a few numbers, before and after each operator.

CV of gaps and dispersion of counts are 1 for independent (Poisson) arrivals and larger for bursts;
their definitions and source are in `traces/arrivals.py`. Reuse is that of an endless prefix cache.
All of it follows from the tape and the options: nothing here has been sent.
"""

import textwrap
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokentape.replay.operators import Operator, Selected
from tokentape.replay.reuse import MOST_BLOCKS, repeated_blocks
from tokentape.replay.schedule import NS_PER_S, Ints, Schedule
from tokentape.replay.sessions import Numbers, of_copies
from tokentape.replay.source import Source
from tokentape.traces.arrivals import dispersion

_IN = "      "
HEAD = ("load", "requests", "sessions", "CV of gaps", "dispersion 1 s", "60 s", "turn gap", "reuse")


@dataclass(frozen=True)
class Shape:
    """One load. None where it has too little to say it.

    gap_cv: deviation of the gaps over their mean. dispersion_1s, dispersion_60s: variance of the
    counts in windows of that width over their mean. turn_gap_ns: median from the arrival of a turn
    to that of the next one of its session. reuse: share of the prefix blocks that an endless cache
    would have seen before, of the first `reuse_requests`.
    """

    load: str
    requests: int
    sessions: int
    gap_cv: float | None
    dispersion_1s: float | None
    dispersion_60s: float | None
    turn_gap_ns: int | None
    reuse: float | None
    reuse_requests: int
    distorts: str = ""

    @property
    def reuse_is_partial(self) -> bool:
        """True where there were more blocks than are looked at."""
        return self.reuse is not None and self.reuse_requests < self.requests

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)

    def cells(self) -> tuple[str, ...]:
        """For people, as HEAD has them."""
        gap_ns = self.turn_gap_ns
        return (
            self.load,
            f"{self.requests:,}",
            f"{self.sessions:,}" if self.sessions else "-",
            _number(self.gap_cv),
            _number(self.dispersion_1s),
            _number(self.dispersion_60s),
            "-" if gap_ns is None else f"{gap_ns / NS_PER_S:.2f} s",
            "-"
            if self.reuse is None
            else f"{100 * self.reuse:.1f} %" + "*" * self.reuse_is_partial,
        )


class Shapes:
    """Takes the shape of each load that it is told, for `make_schedule`."""

    def __init__(self, source: Source, operators: tuple[Operator, ...] = ()) -> None:
        self.found: list[Shape] = []
        self._source = source
        self._distorts = {o.words: o.distorts for o in operators}

    def __call__(self, load: str, chosen: Selected) -> None:
        """Take one more."""
        self.add(load, chosen.time_ns, chosen.row, chosen.copy, self._distorts.get(load, ""))

    def add(
        self,
        load: str,
        time_ns: Ints,
        row: NDArray[np.int32],
        copy: NDArray[np.int16],
        distorts: str = "",
    ) -> None:
        """Take the shape of requests that are sorted by time."""
        sessions = of_copies(self._source.sessions[row], copy)
        gaps = np.diff(time_ns)
        repeated, blocks, counted = repeated_blocks(self._source, row, copy)
        self.found.append(
            Shape(
                load=load,
                requests=len(row),
                sessions=int(np.count_nonzero(np.bincount(sessions[sessions >= 0]))),
                gap_cv=_rounded(gaps.std() / gaps.mean()) if gaps.any() else None,
                dispersion_1s=_rounded(dispersion(time_ns, NS_PER_S)),
                dispersion_60s=_rounded(dispersion(time_ns, 60 * NS_PER_S)),
                turn_gap_ns=_turn_gap_ns(time_ns, sessions),
                reuse=_rounded(repeated / blocks) if blocks else None,
                reuse_requests=counted if blocks else 0,
                distorts=distorts,
            )
        )

    def sped(self, factor: str, schedule: Schedule, *, scaled_think: bool = True) -> None:
        """Take the shape of the plan itself, which the speed came last to."""
        does = (
            "all gaps, think time too, are divided by it; the CV of the gaps and prefix reuse stay"
        )
        if not scaled_think:
            does = (
                "gaps are divided by it, think time stays as recorded: turns come later than these "
                "figures say; prefix reuse stays"
            )
        self.add(
            f"speed {factor}",
            schedule.due_ns,
            schedule.source_index,
            schedule.copy_index,
            does,
        )

    def lines(self) -> list[str]:
        """A table with a line for each load, and one for what each step does to it."""
        rows = [HEAD, *(shape.cells() for shape in self.found)]
        widths = [max(len(row[k]) for row in rows) for k in range(len(HEAD))]
        lines = [_aligned(HEAD, widths)]
        for shape, row in zip(self.found, rows[1:], strict=True):
            lines.append(_aligned(row, widths))
            if shape.distorts:
                lines += textwrap.wrap(
                    shape.distorts, 90, initial_indent=_IN, subsequent_indent=_IN
                )
        if any(shape.reuse_is_partial for shape in self.found):
            lines.append(f"    * of the first requests, as many as have {MOST_BLOCKS:,} blocks")
        return lines


def _turn_gap_ns(time_ns: Ints, sessions: Numbers) -> int | None:
    """The median over all turns but the first; None where no session has two."""
    together = sessions >= 0
    order = np.argsort(sessions[together], kind="stable")
    of, at = sessions[together][order], time_ns[together][order]
    gaps = np.diff(at)[np.diff(of) == 0]
    return int(np.median(gaps)) if len(gaps) else None


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    first, *rest = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
    return "    " + "  ".join([first.strip().ljust(widths[0]), *rest])


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 4)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
