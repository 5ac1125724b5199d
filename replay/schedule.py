"""Plans a replay: which recorded requests are sent, and when. Pure: no clock, no I/O, no chance.

A plan follows from the tape and the options alone, so it is the same for every candidate and on
every host. Times are integers all the way: `--speed 2x` halves each gap to the nanosecond.
Start with `make_schedule`.
"""

from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from tokentape.replay.operators import Kin, Operator, Selected, Watch, operate

Ints = NDArray[np.int64]

NS_PER_S = 1_000_000_000
PART = 1 << 18  # entries of an array that are worked on at a time
OUTSIDE_WINDOW = "outside the window"
MAX_REQUESTS = "past --max-requests"
MAX_TOKENS = "past --max-tokens"


@dataclass(frozen=True)
class Offered:
    """What a tape offers to a plan; one entry per request, in any order.

    `reason` numbers an entry of `reasons`: 0 is to be replayed, anything else is left out.
    `duration_ns` (recorded or guessed) only sizes the connection pool. `kin`: who stays together
    when operators choose; None: each request is by itself.
    """

    arrival_ns: Ints
    input_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    duration_ns: Ints
    reason: NDArray[np.int8]
    reasons: tuple[str, ...] = ("",)
    kin: Kin | None = None


@dataclass(frozen=True)
class ScheduleOptions:
    """`window` is (from, to) in ns after the tape's first arrival; `to` itself is outside.

    Operators work on the recorded times of what is in the window; the speed comes after them.
    """

    speed: Fraction = Fraction(1)
    window: tuple[int | None, int | None] = (None, None)
    max_requests: int | None = None
    max_tokens: int | None = None
    operators: tuple[Operator, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """Due times and what they replay.

    due_ns: int64[n], ns after the start of the run, sorted; the first of a whole plan is 0.
    source_index: int32[n], the row of the tape that each due time replays.
    copy_index: int16[n], which copy of that row it is: 0 is the recorded request itself, another
    is one like it that shares no prefix and no session with it.
    left_out: what is not replayed, by reason.
    """

    due_ns: Ints
    source_index: NDArray[np.int32]
    copy_index: NDArray[np.int16]
    recorded_span_ns: int
    peak_per_s: int
    peak_in_flight: int
    left_out: dict[str, NDArray[np.int32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.due_ns) == len(self.source_index) == len(self.copy_index)

    @property
    def span_ns(self) -> int:
        """From the start of the run to the last due request."""
        return int(self.due_ns[-1]) if len(self.due_ns) else 0

    @property
    def mean_per_s(self) -> float:
        """Requests per second over the span; 0 where a single instant has no rate."""
        gaps = len(self.due_ns) - 1
        lasting_ns = int(self.due_ns[-1] - self.due_ns[0]) if gaps > 0 else 0
        return gaps * NS_PER_S / lasting_ns if lasting_ns else 0.0

    def part(self, kept: NDArray[np.bool_], duration_ns: Ints) -> "Schedule":
        """Some of its requests, at their times; `duration_ns` by row of the tape."""
        due, index = self.due_ns[kept], self.source_index[kept]
        return replace(
            self,
            due_ns=due,
            source_index=index,
            copy_index=self.copy_index[kept],
            peak_per_s=most_within(due, NS_PER_S),
            peak_in_flight=most_in_flight(due, duration_ns[index]),
        )


def scale_ns(gap_ns: Ints, speed: Fraction) -> Ints:
    """floor(gap / speed) in exact integer arithmetic, without leaving 64 bits on the way.

    Raises ValueError for a speed that is not positive or has more digits than 64 bits can carry.
    """
    up, down = speed.denominator, speed.numerator
    if down <= 0 or up * down >= 1 << 62:
        raise ValueError(f"speed {speed} cannot be used: give a positive number such as 2 or 1.5")
    if len(gap_ns) and int(np.max(gap_ns)) * up // down >= 1 << 62:
        raise ValueError(f"speed {speed} cannot be used: the replay would last over a century")
    if up == down:
        return gap_ns
    scaled = np.empty(len(gap_ns), dtype=np.int64)
    for part in _parts(len(gap_ns)):
        whole, rest = np.divmod(gap_ns[part], np.int64(down))
        scaled[part] = whole * np.int64(up) + rest * np.int64(up) // np.int64(down)
    return scaled


def _parts(count: int) -> list[slice]:
    """Slices of a long array, so that what is computed on the way stays small."""
    return [slice(at, min(at + PART, count)) for at in range(0, count, PART)]


def make_schedule(
    offered: Offered, options: ScheduleOptions, watch: Watch | None = None
) -> Schedule:
    """The plan of a replay.

    Requests with one arrival keep the tape's order. The limits cut the end of the plan off, so a
    limited plan is the beginning of the full one. `watch` is told the load before and after each
    operator. Raises UsageError for an operator that cannot be applied to this tape.
    """
    left_out: dict[str, NDArray[np.int32]] = {}
    order, arrival = _in_order(offered.arrival_ns)
    copy = np.zeros(len(order), dtype=np.int16)

    def keep_only(kept: NDArray[np.bool_], reason: str) -> None:
        nonlocal order, arrival, copy
        if not kept.all():
            left_out[reason] = order[~kept]
            order, arrival, copy = order[kept], arrival[kept], copy[kept]

    keep_only(_inside(arrival, options.window), OUTSIDE_WINDOW)
    for number, reason in enumerate(offered.reasons[1:], 1):
        keep_only(offered.reason[order] != number, reason)
    recorded_span_ns = int(arrival[-1] - arrival[0]) if len(arrival) else 0
    if options.operators or watch:
        chosen = Selected(arrival, order, copy)
        kin = offered.kin or Kin.nobody(len(offered.arrival_ns))
        chosen, gone = operate(chosen, options.operators, kin, watch or (lambda *_: None))
        order, arrival, copy = chosen.row, chosen.time_ns, chosen.copy
        left_out |= gone
    if options.max_requests is not None:
        keep_only(np.arange(len(order)) < options.max_requests, MAX_REQUESTS)
    if options.max_tokens is not None:
        tokens = np.cumsum(offered.input_tokens[order], dtype=np.int64)
        tokens += np.cumsum(offered.output_tokens[order], dtype=np.int64)
        keep_only(tokens <= options.max_tokens, MAX_TOKENS)
    since_first = arrival - arrival[0] if len(arrival) else arrival
    due = scale_ns(since_first, options.speed)
    return Schedule(
        due_ns=due,
        source_index=order,
        copy_index=copy,
        recorded_span_ns=recorded_span_ns,
        peak_per_s=most_within(due, NS_PER_S),
        peak_in_flight=most_in_flight(due, offered.duration_ns[order]),
        left_out=left_out,
    )


def _in_order(arrival_ns: Ints) -> tuple[NDArray[np.int32], Ints]:
    """(rows in order of arrival, their arrivals); nothing is copied where they are in order."""
    pairs = (arrival_ns[part.start : part.stop + 1] for part in _parts(len(arrival_ns)))
    if all(bool(np.all(some[1:] >= some[:-1])) for some in pairs):
        return np.arange(len(arrival_ns), dtype=np.int32), arrival_ns
    order = np.argsort(arrival_ns, kind="stable").astype(np.int32)
    return order, arrival_ns[order]


def _inside(arrival: Ints, window: tuple[int | None, int | None]) -> NDArray[np.bool_]:
    since_first = arrival - arrival[0] if len(arrival) else arrival
    start, end = window
    inside = np.ones(len(arrival), dtype=np.bool_)
    if start is not None:
        inside &= since_first >= start
    if end is not None:
        inside &= since_first < end
    return inside


def most_within(due_ns: Ints, width_ns: int) -> int:
    """The most requests that any half-open interval of a width holds."""
    most = 0
    for part in _parts(len(due_ns)):
        after = np.searchsorted(due_ns, due_ns[part] + width_ns, side="left")
        most = max(most, int((after - np.arange(part.start, part.stop)).max()))
    return most


def most_in_flight(due_ns: Ints, duration_ns: Ints) -> int:
    """The most requests open at one instant if each takes its duration from its due time."""
    ends = due_ns + duration_ns
    ends.sort()
    most = 0
    for part in _parts(len(due_ns)):
        ended = np.searchsorted(ends, due_ns[part], side="right")
        before = np.arange(part.start, part.stop)
        most = max(most, int((before + 1 - np.minimum(ended, before)).max()))
    return most
