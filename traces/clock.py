"""Clocks: monotonic stamps, their anchors to wall time, and the tape's own time base.

Every stamp inside a process is CLOCK_MONOTONIC ns; a tape stores ns since its wall epoch. The one
place where wall time is read; everything else asks here.
"""

import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ANCHOR_TRIES = 100  # the narrowest bracket of these reads is kept; 150 ns is usually reached


@dataclass(frozen=True)
class Anchor:
    """One instant on both clocks; `uncertainty_ns` is half the bracket around the wall read."""

    wall_unix_ns: int
    monotonic_ns: int
    uncertainty_ns: int

    def as_dict(self) -> dict[str, int]:
        """The anchor as a segment's footer holds it."""
        return asdict(self)


def wall_unix_ns() -> int:
    """The wall clock, ns since 1970; only for anchors, names and folders."""
    return time.time_ns()


def take_anchor(tries: int = ANCHOR_TRIES) -> Anchor:
    """The (wall, monotonic) pair with the narrowest bracket out of `tries` reads."""
    best = None
    for _ in range(tries):
        before = time.monotonic_ns()
        wall = time.time_ns()
        after = time.monotonic_ns()
        if best is None or after - before < best[0]:
            best = (after - before, wall, (before + after) // 2)
    assert best is not None
    return Anchor(best[1], best[2], (best[0] + 1) // 2)


def boot_id() -> str:
    """An id that changes when the host boots, since CLOCK_MONOTONIC starts anew then."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


@dataclass(frozen=True)
class TapeClock:
    """Converts one process's monotonic stamps to tape time; one anchor serves an incarnation.

    Later anchors are stored beside it and never applied, so differences stay those of the
    monotonic clock whatever the wall clock does.
    """

    epoch_unix_ns: int
    anchor: Anchor
    clock_id: str

    @classmethod
    def start(cls, epoch_unix_ns: int, worker: str, anchor: Anchor | None = None) -> "TapeClock":
        """A clock for this process, anchored now, or as others of this host are."""
        clock_id = f"{platform.node()}/{boot_id()}/{worker}"
        return cls(epoch_unix_ns, anchor or take_anchor(), clock_id)

    @classmethod
    def resume(cls, epoch_unix_ns: int, footer: dict[str, Any]) -> "TapeClock":
        """The clock that wrote this footer, for a process of the same host that goes on with it."""
        return cls(epoch_unix_ns, Anchor(**footer["anchors"][0]), footer["clock_id"])

    @property
    def offset_ns(self) -> int:
        """What is added to a monotonic stamp to get tape time."""
        return self.anchor.wall_unix_ns - self.anchor.monotonic_ns - self.epoch_unix_ns

    def tape_ns(self, monotonic_ns: int) -> int:
        """Tape time of a monotonic stamp."""
        return monotonic_ns + self.offset_ns

    def unix_ns(self, monotonic_ns: int) -> int:
        """Wall time of a monotonic stamp, by the one anchor."""
        return monotonic_ns + self.offset_ns + self.epoch_unix_ns

    def footer(self) -> dict[str, Any]:
        """What a segment says about its clock: its id, and anchors, the one in force first."""
        return {"clock_id": self.clock_id, "anchors": [self.anchor.as_dict()]}
