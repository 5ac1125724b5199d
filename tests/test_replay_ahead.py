"""What is made ready ahead: bounded in bytes, in order, and early enough."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from tokentape.replay.ahead import (
    ARM_AHEAD_NS,
    ARM_COST_NS,
    CHUNK,
    MOST_AHEAD_NS,
    Ahead,
    ArmTimes,
    Outgoing,
)


def request(number: int) -> Outgoing:
    return Outgoing(URL("http://h/"), {}, b"x" * 100, {"n": number})


def test_requests_are_built_ahead_until_their_bytes_reach_the_limit_and_taken_in_order() -> None:
    built: list[int] = []

    def prepare(number: int) -> Outgoing:
        built.append(number)
        return request(number)

    ahead = Ahead(prepare, 10, limit_bytes=3 * request(0).size + 1)
    while not ahead.full:
        ahead.build()
    assert built == [0, 1, 2, 3]
    assert [ahead.take().row["n"] for _ in range(10)] == list(range(10))
    assert ahead.full and built == list(range(10))


def test_a_request_counts_with_its_row_and_not_with_its_body_alone() -> None:
    plain, long = request(0), Outgoing(URL("http://h/"), {}, b"", {"block_hashes": [1] * 1000})
    assert plain.size > 1000  # ten thousand short prompts must not pass for one megabyte
    assert long.size > 10 * plain.size


def all_at_once(due: list[int]) -> list[int]:
    """The rule itself, request by request."""
    times = []
    for number, mine in enumerate(due):
        behind = (t - ARM_COST_NS * (k - number) for k, t in enumerate(due) if k >= number)
        times.append(max(min(behind) - ARM_AHEAD_NS, mine - MOST_AHEAD_NS))
    return times


@given(st.lists(st.integers(0, 5_000_000_000), max_size=60))
def test_arm_times_follow_the_rule(due: list[int]) -> None:
    due.sort()
    times = ArmTimes(np.array(due, dtype=np.int64))
    assert [times[n] for n in range(len(due))] == all_at_once(due)


def test_a_burst_is_armed_early_across_the_borders_of_chunks() -> None:
    due = np.arange(2 * CHUNK + 10, dtype=np.int64) * 10 * ARM_COST_NS
    due[CHUNK - 100 :] = due[CHUNK - 100]  # over a whole chunk is due at one instant
    times = ArmTimes(due)
    lead = [int(due[n]) - times[n] for n in range(len(due))]
    assert lead[CHUNK - 100] == MOST_AHEAD_NS
    assert lead[-2:] == [ARM_AHEAD_NS + ARM_COST_NS, ARM_AHEAD_NS]
    assert lead[0] == ARM_AHEAD_NS + max(0, (len(due) - 1) * ARM_COST_NS - int(due[-1]))
