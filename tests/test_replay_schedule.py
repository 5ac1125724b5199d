"""The plan: exact times, windows, limits, and nothing left out without a reason."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokentape.replay.schedule import (
    MAX_REQUESTS,
    MAX_TOKENS,
    OUTSIDE_WINDOW,
    Offered,
    ScheduleOptions,
    make_schedule,
    most_in_flight,
    most_within,
    scale_ns,
)

DAY_NS = 86_400_000_000_000
arrivals = st.lists(st.integers(-DAY_NS, 30 * DAY_NS), max_size=60)
speeds = st.fractions(min_value=Fraction(1, 1000), max_value=1000, max_denominator=1000)


def offered(
    arrival_ns: list[int],
    tokens: list[int] | None = None,
    reason: list[int] | None = None,
    reasons: tuple[str, ...] = ("",),
) -> Offered:
    n = len(arrival_ns)
    return Offered(
        arrival_ns=np.array(arrival_ns, dtype=np.int64),
        input_tokens=np.array(tokens or [1] * n, dtype=np.int64),
        output_tokens=np.zeros(n, dtype=np.int64),
        duration_ns=np.full(n, 1000, dtype=np.int64),
        reason=np.array(reason or [0] * n, dtype=np.int8),
        reasons=reasons,
    )


@given(arrivals, speeds)
def test_each_due_time_is_the_recorded_time_over_the_speed_to_the_nanosecond(
    arrival_ns: list[int], speed: Fraction
) -> None:
    plan = make_schedule(offered(arrival_ns), ScheduleOptions(speed))
    exact = [(a - min(arrival_ns)) / speed for a in sorted(arrival_ns)]
    assert plan.due_ns.tolist() == [int(x) for x in exact]


@given(arrivals)
def test_replay_at_2x_halves_every_gap(arrival_ns: list[int]) -> None:
    plan = make_schedule(offered(arrival_ns), ScheduleOptions(Fraction(2)))
    gaps, halved = np.diff(sorted(arrival_ns)), np.diff(plan.due_ns)
    assert (np.abs(gaps - 2 * halved) <= 2).all()


@given(arrivals)
def test_a_plan_at_speed_1_is_the_tape_itself_in_order(arrival_ns: list[int]) -> None:
    plan = make_schedule(offered(arrival_ns), ScheduleOptions())
    times = [arrival_ns[i] for i in plan.source_index]
    assert times == sorted(arrival_ns)
    assert sorted(plan.source_index.tolist()) == list(range(len(arrival_ns)))
    assert plan.due_ns.dtype == np.int64 and plan.source_index.dtype == np.int32
    assert plan.recorded_span_ns == plan.span_ns


def test_requests_with_one_arrival_keep_the_order_of_the_tape() -> None:
    plan = make_schedule(offered([7, 3, 7, 3, 7]), ScheduleOptions())
    assert plan.source_index.tolist() == [1, 3, 0, 2, 4]


@given(arrivals, st.integers(0, 2 * DAY_NS), st.integers(0, 2 * DAY_NS))
def test_windows_that_meet_share_no_request_and_lose_none(
    arrival_ns: list[int], first: int, width: int
) -> None:
    windows = [(None, first), (first, first + width), (first + width, None)]
    plans = [make_schedule(offered(arrival_ns), ScheduleOptions(window=w)) for w in windows]
    seen = [i for p in plans for i in p.source_index.tolist()]
    assert sorted(seen) == list(range(len(arrival_ns)))
    for plan in plans:
        assert plan.due_ns[:1].tolist() in ([], [0])


def test_a_window_counts_from_the_first_arrival_of_the_tape_even_one_left_out() -> None:
    tape = offered([1000, 1010, 1020, 1030], reason=[1, 0, 0, 0], reasons=("", "connect_error"))
    plan = make_schedule(tape, ScheduleOptions(window=(0, 20)))
    assert plan.source_index.tolist() == [1]
    assert {k: v.tolist() for k, v in plan.left_out.items()} == {
        OUTSIDE_WINDOW: [2, 3],
        "connect_error": [0],
    }


@given(arrivals, st.integers(0, 70), st.integers(0, 400), st.data())
def test_limits_cut_the_end_off_and_every_request_is_kept_or_has_one_reason(
    arrival_ns: list[int], most: int, tokens: int, data: st.DataObject
) -> None:
    n = len(arrival_ns)
    counts = data.draw(st.lists(st.integers(0, 30), min_size=n, max_size=n))
    reason = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    tape = offered(arrival_ns, counts, reason, ("", "429", "connect_error"))
    full = make_schedule(tape, ScheduleOptions())
    cut = make_schedule(tape, ScheduleOptions(max_requests=most, max_tokens=tokens))
    kept = len(cut.source_index)
    assert cut.source_index.tolist() == full.source_index[:kept].tolist()
    assert cut.due_ns.tolist() == full.due_ns[:kept].tolist()
    assert kept <= most
    assert sum(counts[i] for i in cut.source_index) <= tokens
    everything = [*cut.source_index, *(i for v in cut.left_out.values() for i in v)]
    assert sorted(int(i) for i in everything) == list(range(n))
    assert set(cut.left_out) <= {MAX_REQUESTS, MAX_TOKENS, "429", "connect_error"}


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 20))
def test_the_peak_is_what_counting_every_window_finds(due: list[int], width: int) -> None:
    times = sorted(due)
    brute = max((sum(a <= t < a + width for t in times) for a in range(51)), default=0)
    assert most_within(np.array(times, dtype=np.int64), width) == brute


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=40))
def test_the_most_in_flight_is_what_counting_every_instant_finds(
    requests: list[tuple[int, int]],
) -> None:
    requests.sort()
    brute = max((sum(a <= t < a + d for a, d in requests) for t in range(80)), default=0)
    due = np.array([a for a, _ in requests], dtype=np.int64)
    lasts = np.array([d for _, d in requests], dtype=np.int64)
    assert most_in_flight(due, lasts) == brute


def test_the_mean_rate_counts_gaps_and_one_instant_has_none() -> None:
    second = 1_000_000_000
    assert make_schedule(offered([0, second, 2 * second]), ScheduleOptions()).mean_per_s == 1.0
    assert make_schedule(offered([5, 5, 5]), ScheduleOptions()).mean_per_s == 0.0
    assert make_schedule(offered([]), ScheduleOptions()).span_ns == 0


@pytest.mark.parametrize("speed", [Fraction(0), Fraction(-1), Fraction(1, 1 << 62)])
def test_a_speed_that_cannot_be_used_is_refused(speed: Fraction) -> None:
    with pytest.raises(ValueError, match="speed"):
        scale_ns(np.array([1], dtype=np.int64), speed)
