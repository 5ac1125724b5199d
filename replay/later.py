"""Requests that wait for others: built while those run, armed and released as their time is known.

They go beside the requests whose times the plan fixes; `sender.py` asks which of both comes first.
A body is built from the moment that all parents have been sent, so that it is ready when they end.
All times are ns after the start of the run. Nothing here looks at a clock or parses a reply.
"""

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from tokentape.replay.ahead import ARM_AHEAD_NS, ARM_COST_NS, Outgoing
from tokentape.replay.turns import Followers
from tokentape.traces.clock import wall_unix_ns
from tokentape.traces.identity import request_id

FAR_NS = 1 << 62
AHEAD_BYTES = 32 << 20  # of bodies that wait for their parents' ends
ARMED_TOGETHER = 100  # for so many that may be due together there is time to arm all


class Later[A]:
    """The requests of a share that wait for others; `A` is what one is when it is armed."""

    def __init__(
        self,
        followers: Followers,
        prepare: Callable[[int], Outgoing],
        launch: Callable[[Outgoing, int, int], A],
    ) -> None:
        """Args: launch: arms a request, given its number and the instant at which it is due."""
        self._followers = followers
        self._prepare = prepare
        self._launch = launch
        self._known = followers.known
        self._armed: list[tuple[int, int, A]] = []
        self._to_build: deque[int] = deque()
        self._ready: dict[int, Outgoing] = {}
        self._bytes = 0
        self.after_failure = 0  # sent after a parent that had failed

    @property
    def over(self) -> bool:
        """True when each has been released."""
        return not (self._followers.left or self._known or self._armed)

    @property
    def armed(self) -> list[A]:
        """Those that hold a connection and wait for their time."""
        return [armed for *_, armed in self._armed]

    @property
    def armed_due_ns(self) -> int:
        """When the first armed one is due; FAR_NS: none is."""
        return self._armed[0][0] if self._armed else FAR_NS

    @property
    def due_ns(self) -> int:
        """When the first of those is due whose time is known; FAR_NS: none is."""
        known_ns = self._known[0][0] if self._known else FAR_NS
        return min(known_ns, self.armed_due_ns)

    @property
    def arm_ns(self) -> int:
        """When the next is to be armed; FAR_NS: none is."""
        if not self._known:
            return FAR_NS
        together = min(len(self._known), ARMED_TOGETHER)
        return self._known[0][0] - ARM_AHEAD_NS - together * ARM_COST_NS

    def arm(self) -> None:
        """Arm the next one."""
        due_ns, number = heappop(self._known)
        outgoing = self._ready.pop(number, None)
        if outgoing is None:
            outgoing = self._prepare(number)  # no quiet moment came, or no room
        else:
            self._bytes -= outgoing.size
        heappush(self._armed, (due_ns, number, self._launch(outgoing, number, due_ns)))

    def take(self) -> A:
        """The first one that is due, to be released; armed on the spot if it is not."""
        if self._known and self._known[0][0] < self.armed_due_ns:
            self.arm()
        return heappop(self._armed)[2]

    def build(self) -> bool:
        """Build a body that will be needed; False when there is none, or no room."""
        while self._to_build and self._bytes < AHEAD_BYTES:
            number = self._to_build.popleft()
            if self._followers.is_open(number):
                outgoing = self._ready[number] = self._prepare(number)
                self._bytes += outgoing.size
                return True
        return False

    def sent(self, number: int, due_ns: int) -> dict[str, Any]:
        """A request was sent, of this kind or another: the columns that its row gets."""
        row: dict[str, Any] = {}
        story = self._followers.story(number)
        if story is not None:
            row["parents"] = story.parents
            self.after_failure += story.after_failure
            if story.all_ended:
                row["think_ns"] = due_ns - story.last_end_ns
        if self._followers.waited_for(number):
            row["request_id"] = request_id(wall_unix_ns())
            self._to_build += self._followers.sent(number, row["request_id"], due_ns)
        return row

    def ended(self, number: int, end_ns: int, *, failed: bool) -> bool:
        """A request has ended; whether the due time of another is known by that."""
        before = len(self._known)
        self._followers.ended(number, end_ns, failed=failed)
        return len(self._known) > before
