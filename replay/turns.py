"""Turns of a plan: which request waits for which, and when it is due as those end. Pure.

`make_waits` derives the waits of a plan from a tape's links and the schedule alone; `Followers`
keeps account of them while a run goes on. Neither knows a clock or a socket.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from heapq import heappush
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tokentape.replay.links import NO_LINKS, NOT_ON_TAPE, Links
from tokentape.replay.schedule import Ints, Schedule, scale_ns
from tokentape.traces.errors import UsageError

Turns = Literal["after", "think", "open"]
NOT_PLANNED = -1


@dataclass(frozen=True)
class Waits:
    """Who waits for whom in a plan, by number in its order; sorted by parent.

    parent, child: int32[m]. wait_ns: int64[m], from the parent's end, or from its arrival where
    `parallel`, to the child's due time at the earliest. floor_ns: int64[n], before which a request
    is not due, whatever its parents do: in ns after the start of the run.
    """

    parent: NDArray[np.int32]
    child: NDArray[np.int32]
    wait_ns: Ints
    parallel: NDArray[np.bool_]
    floor_ns: Ints

    @property
    def dependent(self) -> int:
        """Requests that wait for another."""
        return len(np.unique(self.child))

    def part(self, kept: NDArray[np.int32]) -> "Waits | None":
        """Those of some requests, by ascending number; parents outside it are not waited for."""
        number = np.full(len(self.floor_ns), NOT_PLANNED, dtype=np.int32)
        number[kept] = np.arange(len(kept), dtype=np.int32)
        parent, child = number[self.parent], number[self.child]
        here = (parent >= 0) & (child >= 0)
        if not here.any():
            return None
        waits, parallel = self.wait_ns[here], self.parallel[here]
        return Waits(parent[here], child[here], waits, parallel, self.floor_ns[kept])


@dataclass(frozen=True)
class TurnPlan:
    """How a plan keeps turns: its waits (None: no request waits), and what became of the rest.

    context: parents that are not in the plan; they count as done when they were, relative to the
    child. links: of the whole tape.
    """

    turns: Turns
    links: Links
    scaled_think: bool = True
    waits: Waits | None = None
    context: int = 0

    @property
    def dependent(self) -> int:
        """Requests that wait for another."""
        return self.waits.dependent if self.waits is not None else 0

    def as_dict(self) -> dict[str, Any]:
        """For the plan's JSON and the run's tape."""
        return {
            "turns": self.turns if len(self.links) else "open",
            "think": "scaled" if self.scaled_think else "recorded",
            "dependent_requests": self.dependent,
            "dependencies": len(self.waits.parent) if self.waits is not None else 0,
            "parallel_dependencies": int(self.waits.parallel.sum()) if self.waits else 0,
            "parents_as_context": self.context,
            "parents_not_on_tape": self.links.missing,
            "parents_after_their_child": self.links.backward,
            "think_times_unknown": self.links.unknown_think,
        }

    def lines(self, requests: int, factor: str) -> list[str]:
        """How turns are kept, for people; nothing where nobody waited for anybody."""
        if not len(self.links):
            return []
        if self.turns == "open":
            linked = len(np.unique(self.links.child))
            waited = (
                f"  turns: open; {linked:,} requests of the tape waited for others when recorded"
            )
            return [f"{waited}; here each is sent at its own time, whether those have ended or not"]
        scaled = self.scaled_think and factor != "1x"
        think = f"recorded think time / {factor[:-1]}" if scaled else "recorded think time"
        when = {
            "after": f"at their own time, and not before their parents' end + the {think}",
            "think": f"at their parents' end + the {think}, early or late",
        }[self.turns]
        told = f"  turns: {self.turns}; {self.dependent:,} of {requests:,} requests are sent {when}"
        reply = "    the next prompt holds the reply as long as it was recorded, not as it comes"
        return [told, *([reply] if self.dependent else [])]

    def notes(self) -> list[str]:
        """What a reader of the results has to know."""
        if self.turns == "open":
            return []
        counts = (
            (self.context, "parents are not in this plan: taken as done when they were"),
            (self.links.missing, "parents are not on the tape: taken as done when they were"),
            (self.links.backward, "parents came after their child: not waited for"),
            (self.links.unknown_think, "think times are not known: sent at once"),
        )
        return [f"{count} {what}" for count, what in counts if count]


NO_TURNS = TurnPlan("open", NO_LINKS)


def check_ring(turns: Turns, links: Links, tape: Path, request_id: Callable[[int], bytes]) -> None:
    """UsageError where requests that are to wait for each other do so in a ring."""
    if links.cycle and turns != "open":
        names = " -> ".join(request_id(row).hex() for row in links.cycle[:4])
        more = " -> ..." if len(links.cycle) > 4 else ""
        raise UsageError(
            f"{tape}: requests wait for each other ({names}{more}), so none of them could be sent; "
            "use --turns open, which waits for none"
        )


def make_waits(
    links: Links, schedule: Schedule, turns: Turns, speed: Fraction, *, scaled_think: bool = True
) -> TurnPlan:
    """The turns of a plan; a copy waits for the same copy of its parents.

    `after`: due at the planned time and not before the parents' end and the think time. `think`:
    due at the parents' end and the think time, be that before or after the planned time. A request
    that was offered while its parent ran keeps its distance from the parent's start. `scaled_think`
    divides think times by the speed, as all other recorded times.
    """
    plain = TurnPlan(turns, links, scaled_think)
    if turns == "open" or not len(links) or not len(schedule.due_ns):
        return plain
    child, parent, link = _numbers(links, schedule)
    planned = child != NOT_PLANNED
    live = planned & (parent != NOT_PLANNED)
    outside = planned & ~live
    context = int(np.count_nonzero(outside & (links.parent[link] != NOT_ON_TAPE)))
    if not live.any():
        return replace(plain, context=context)
    floor_ns = schedule.due_ns.copy()
    if turns == "think":
        floor_ns[child[live]] = 0
        early_ns = scale_ns(links.slack_ns[link[outside]], speed)
        np.maximum.at(floor_ns, child[outside], schedule.due_ns[child[outside]] - early_ns)
    wait_ns, parallel = links.wait_ns[link[live]], links.parallel[link[live]]
    scaled_ns = scale_ns(wait_ns, speed)
    wait_ns = scaled_ns if scaled_think else np.where(parallel, scaled_ns, wait_ns)
    order = np.argsort(parent[live], kind="stable")
    waits = Waits(
        parent[live][order].astype(np.int32),
        child[live][order].astype(np.int32),
        wait_ns[order],
        parallel[order],
        floor_ns,
    )
    return replace(plain, waits=waits, context=context)


def _numbers(links: Links, schedule: Schedule) -> tuple[Ints, Ints, Ints]:
    """(number of the child, of the parent, link) of each link in each copy; see NOT_PLANNED."""
    copies = np.unique(schedule.copy_index).astype(np.int64)
    rows = 1 + int(max(schedule.source_index.max(), links.child.max(), links.parent.max()))
    keys = schedule.copy_index * np.int64(rows) + schedule.source_index
    order = np.argsort(keys, kind="stable")
    keys = keys[order]

    def number(row: NDArray[np.int32]) -> Ints:
        wanted = (copies[:, None] * rows + row[None, :]).ravel()
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        found = (keys[place] == wanted) & np.tile(row != NOT_ON_TAPE, len(copies))
        return np.where(found, order[place], NOT_PLANNED)

    link = np.tile(np.arange(len(links), dtype=np.int64), len(copies))
    return number(links.child), number(links.parent), link


@dataclass
class Story:
    """What is known of a request's parents: their ids in the run, and the end of the last one."""

    parents: list[bytes] = field(default_factory=list)
    last_end_ns: int = 0
    all_ended: bool = True  # it waited for each end
    after_failure: bool = False


class Followers:
    """Keeps account of the waits of a run. All times are ns after its start.

    known: a heap of (due, number) of the requests whose due time has become known. left: those
    whose has not.
    """

    def __init__(self, waits: Waits, count: int) -> None:
        ends = np.cumsum(np.bincount(waits.parent, minlength=count))
        self._starts = memoryview(np.r_[0, ends].astype(np.int64))
        self._child = memoryview(waits.child)
        self._wait_ns = memoryview(waits.wait_ns)
        self._parallel = memoryview(waits.parallel.astype(np.int8))
        waiting = np.bincount(waits.child, minlength=count).astype(np.int32)
        self.first = np.flatnonzero(waiting == 0).astype(np.int32)  # they wait for none
        self._open = memoryview(waiting.copy())  # links that say nothing yet
        self._unsent = memoryview(waiting)  # parents that are not sent yet
        self._due_ns = memoryview(waits.floor_ns.copy())
        self._stories: dict[int, Story] = {}
        self.known: list[tuple[int, int]] = []
        self.left = count - len(self.first)

    def is_open(self, number: int) -> bool:
        """Whether a request is still to be sent."""
        return number in self._stories

    def waited_for(self, number: int) -> bool:
        """Whether any request waits for this one."""
        return self._starts[number] < self._starts[number + 1]

    def sent(self, number: int, request_id: bytes, due_ns: int) -> list[int]:
        """A request was sent that was due then: those whose parents have now all been sent."""
        ready = []
        for link in range(self._starts[number], self._starts[number + 1]):
            child = self._child[link]
            story = self._stories.setdefault(child, Story())
            story.parents.append(request_id)
            if self._parallel[link]:
                story.all_ended = False
                self._told(child, due_ns + self._wait_ns[link])
            self._unsent[child] -= 1
            if not self._unsent[child]:
                ready.append(child)
        return ready

    def ended(self, number: int, end_ns: int, *, failed: bool) -> None:
        """A request has ended; those that waited for this end alone are `known` now."""
        for link in range(self._starts[number], self._starts[number + 1]):
            if self._parallel[link]:
                continue
            child = self._child[link]
            story = self._stories[child]
            story.last_end_ns = max(story.last_end_ns, end_ns)
            story.after_failure |= failed
            self._told(child, end_ns + self._wait_ns[link])

    def story(self, number: int) -> Story | None:
        """What its row says of its parents; told once."""
        return self._stories.pop(number, None)

    def _told(self, child: int, earliest_ns: int) -> None:
        self._due_ns[child] = max(self._due_ns[child], earliest_ns)
        self._open[child] -= 1
        if not self._open[child]:
            heappush(self.known, (self._due_ns[child], child))
            self.left -= 1
