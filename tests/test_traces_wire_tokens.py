"""How tokens are shared out over events."""

from heapq import heapify, heapreplace

from hypothesis import given
from hypothesis import strategies as st

from tokentape.traces.wire import tokens
from tokentape.traces.wire.tokens import Candidate


def one_by_one(total: int, text_bytes: list[int]) -> list[int]:
    """The rule as it is said: 1 each, then each token to the most bytes per token so far."""
    ntok = [1] * len(text_bytes)
    heap = [(-b / 1, 1, i) for i, b in enumerate(text_bytes)]
    heapify(heap)
    for _ in range(total - len(ntok)):
        _, k, i = heap[0]
        ntok[i] = k + 1
        heapreplace(heap, (-text_bytes[i] / (k + 1), k + 1, i))
    return ntok


@given(st.lists(st.integers(0, 60), min_size=1, max_size=30), st.integers(0, 400))
def test_a_total_is_shared_out_as_if_one_by_one(text_bytes: list[int], excess: int) -> None:
    total = len(text_bytes) + excess
    assert tokens.spread(total, text_bytes) == one_by_one(total, text_bytes)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=30), st.integers(0, 2**31 - 1))
def test_the_sum_is_the_total_whatever_it_is(text_bytes: list[int], total: int) -> None:
    ntok = tokens.spread(total, text_bytes)
    assert sum(ntok) == total
    assert min(ntok) >= (0 if total < len(text_bytes) else 1)


def test_the_excess_goes_to_the_longest_text() -> None:
    assert tokens.spread(5, [6, 18, 5]) == [1, 3, 1]


def test_a_shortage_empties_the_shortest_texts_late_ones_first() -> None:
    assert tokens.spread(2, [3, 1, 4, 1]) == [1, 0, 1, 0]
    assert tokens.spread(3, [3, 1, 4, 1]) == [1, 1, 1, 0]


def test_events_without_any_text_share_evenly() -> None:
    assert tokens.spread(5, [0, 0, 0]) == [2, 2, 1]
    assert tokens.spread(5, []) == []


def test_a_count_over_all_choices_and_a_count_for_each_are_told_apart() -> None:
    choices = [0, 1, 0, 1]
    assert tokens.from_cumulative([1, 3, 4, 6], choices, 6) == [1, 2, 1, 2]
    assert tokens.from_cumulative([1, 1, 2, 2], choices, 4) == [1, 1, 1, 1]
    assert tokens.from_cumulative([1, 1, 2, 2], choices, None) == [1, 1, 1, 1]
    assert tokens.from_cumulative([1, 2, 3, 4], choices, None) == [1, 1, 1, 1]
    assert tokens.from_cumulative([3, 1], [0, 1], None) == [3, 1]


def test_a_count_that_runs_backwards_is_not_used() -> None:
    assert tokens.from_cumulative([1, 3, 2], [0, 0, 0], 3) is None


def test_the_source_says_when_the_events_miss_the_total() -> None:
    assert tokens.source("usage_spread", [1, 2], 3) == "usage_spread"
    assert tokens.source("usage_spread", [1, 2], 4) == "usage_spread_short"
    assert tokens.source("token_ids", [1, 2], 2) == "token_ids_over"
    assert tokens.source("one_per_event", [1, 2], None) == "one_per_event"


def test_interior_candidates_come_first_and_hidden_tokens_need_no_finish() -> None:
    finish = Candidate(5, 1, 50, 5, 0, finish=True)
    first = Candidate(2, 0, 20, 2, 0, finish=False)
    third = Candidate(6, 2, 60, 6, 0, finish=False)
    candidates = [first, finish, third]
    assert tokens.promoted(candidates, 0, 0) == []
    assert tokens.promoted(candidates, 1, 0) == [first]
    assert tokens.promoted(candidates, 2, 0) == [first, third]
    assert tokens.promoted(candidates, 9, 0) == candidates
    assert tokens.promoted(candidates, 9, 9) == [first, third]
    assert tokens.promoted(candidates, -3, 0) == []
