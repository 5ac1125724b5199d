"""Which operators a user asks for, and in which order they are applied. Applies none."""

from dataclasses import dataclass
from fractions import Fraction

from tokentape.replay.operators import Loop, Multiply, Operator, Spread, Thin
from tokentape.replay.replica import ROUTINGS, Replica, Routing
from tokentape.traces.errors import UsageError


@dataclass(frozen=True)
class Asked:
    """The operators that a user asks for; None or False leaves one out.

    loop_ns: of the run, not of the tape; loop_passes: instead of it. replica: (index, count).
    """

    thin: Fraction | None = None
    multiply: Fraction | None = None
    loop_ns: int | None = None
    loop_passes: Fraction | None = None
    spread: bool = False
    replica: tuple[int, int] | None = None
    routing: Routing | None = None

    @property
    def other_requests(self) -> bool:
        """True when not just the requests of the window are sent, each once."""
        asked = (self.thin, self.multiply, self.loop_ns, self.loop_passes, self.replica)
        return any(value is not None for value in asked)

    @property
    def copies(self) -> bool:
        """True when requests are sent more often than they came."""
        return any(value is not None for value in (self.multiply, self.loop_ns, self.loop_passes))

    def operators(self, seed: int, speed: Fraction, step_ns: int | None) -> tuple[Operator, ...]:
        """Them, in the order in which they are applied.

        UsageError for one that cannot be meant. `step_ns`: arrival_resolution_ns of the tape.
        """
        found: list[Operator] = []
        if self.spread:
            if not step_ns:
                raise UsageError(
                    "--spread: the tape does not say how coarse its arrivals are "
                    "(arrival_resolution_ns), so they stay as they are"
                )
            found.append(Spread(step_ns, seed))
        if (self.replica is None) != (self.routing is None):
            raise UsageError(
                f"--replica, --routing: give both; the fleet's routing was one of "
                f"{', '.join(ROUTINGS)}"
            )
        if self.replica is not None and self.routing is not None:
            found.append(Replica(*self.replica, self.routing, seed))
        if self.thin is not None:
            found.append(Thin(self.thin, seed))
        if self.multiply is not None:
            found.append(Multiply(self.multiply, seed))
        if self.loop_ns is not None:
            found.append(Loop(run_ns=self.loop_ns, speed=speed))
        if self.loop_passes is not None:
            found.append(Loop(passes=self.loop_passes))
        return tuple(found)

    def as_dict(self) -> dict[str, str | int | bool | None]:
        """As a tape keeps it."""
        return {
            "thin": str(self.thin) if self.thin is not None else None,
            "multiply": str(self.multiply) if self.multiply is not None else None,
            "loop_ns": self.loop_ns,
            "loop_passes": str(self.loop_passes) if self.loop_passes is not None else None,
            "spread": self.spread,
            "replica": "/".join(map(str, self.replica)) if self.replica else None,
            "routing": self.routing,
        }
