"""The instant from which the due times of a run count: soon, or one that many hosts agreed on.

A common instant is given in wall time and kept on the monotonic clock of each host, so hosts differ
by the errors of their wall clocks, which nobody here can know: the tape says which was believed.
"""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import monotonic_ns
from typing import Any, Protocol

from tokentape.traces.clock import Anchor, take_anchor, wall_unix_ns
from tokentape.traces.errors import TokentapeError, UsageError

NS_PER_S = 1_000_000_000
AFTER_NS = 100_000_000  # from "all is ready" to the start, where none is agreed on
WARM_BEFORE_NS = 3 * NS_PER_S  # servers close idle connections, some after 5 s
FAR_NS = 3600 * NS_PER_S
LOOK_EVERY_S = 1.0  # at the wall clock, which may be set meanwhile


class Start(Protocol):
    """Tells a sender when to go on. All instants are CLOCK_MONOTONIC ns of this host."""

    def prepared(self) -> Awaitable[None]:
        """The bodies are built: wait until connections should be opened."""

    def instant(self, lead_ns: int) -> Awaitable[int]:
        """All is ready: the start, `lead_ns` away at least, which arming takes before it."""


@dataclass
class StartAt:
    """Starts at an instant of the wall clock, or at once where none is given."""

    at_unix_ns: int | None = None
    t0_ns: int = 0
    anchor: Anchor | None = field(default=None, repr=False)

    async def prepared(self) -> None:
        """Wait until shortly before the start."""
        while self.at_unix_ns is not None:
            left_ns = self._at_ns(self.at_unix_ns) - monotonic_ns() - WARM_BEFORE_NS
            if left_ns <= 0:
                return
            await asyncio.sleep(min(left_ns / NS_PER_S, LOOK_EVERY_S))

    async def instant(self, lead_ns: int) -> int:
        """The start; TokentapeError when it cannot be met any more."""
        if self.at_unix_ns is None:
            self.t0_ns = monotonic_ns() + AFTER_NS + lead_ns
            self.anchor = take_anchor()
            return self.t0_ns
        self.t0_ns = self._at_ns(self.at_unix_ns)
        late_ns = monotonic_ns() + lead_ns - self.t0_ns
        if late_ns > 0:
            raise TokentapeError(
                f"--start-at: this host was ready {late_ns / NS_PER_S:.1f} s too late, and sent "
                "nothing; give all shards a later instant"
            )
        return self.t0_ns

    def facts(self) -> dict[str, Any]:
        """What the tape says of the start."""
        found: dict[str, Any] = {"start_at_unix_ns": self.at_unix_ns}
        if self.anchor is not None:
            passed_ns = self.t0_ns - self.anchor.monotonic_ns
            found |= {
                "t0_unix_ns": self.anchor.wall_unix_ns + passed_ns,
                "anchor": self.anchor.as_dict(),
                "clock": "this host's wall clock; its error against other hosts is not known",
            }
        return found

    def _at_ns(self, at_unix_ns: int) -> int:
        """The instant on the monotonic clock, as the wall clock stands now."""
        self.anchor = take_anchor()
        return self.anchor.monotonic_ns + at_unix_ns - self.anchor.wall_unix_ns


def check_start(at_unix_ns: int) -> str:
    """One line on a start to come; UsageError when it is past."""
    left_ns = at_unix_ns - wall_unix_ns()
    at = datetime.fromtimestamp(at_unix_ns / NS_PER_S, tz=UTC)
    shown = at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if left_ns <= 0:
        raise UsageError(
            f"--start-at: {shown} was {-left_ns / NS_PER_S:.0f} s ago by this host's clock; "
            "give an instant to come, the same for every shard"
        )
    far = ", more than an hour away" if left_ns > FAR_NS else ""
    return f"start: {shown} by this host's clock, in {left_ns / NS_PER_S:.0f} s{far}"
