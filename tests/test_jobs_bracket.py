"""The search for a capacity ends at it, whatever it is, and says what it could not tell."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokentape.jobs.bracket import MOST_PROBES, Bracket, Judged, search

ATTAIN = 0.99


def judged(speed: Fraction, capacity: float, spread: float = 0.0) -> Judged:
    """A candidate that meets the SLO up to a speed; `spread` blurs what is near it."""
    share = 1.0 if speed <= capacity else 0.5
    near = abs(float(speed) / capacity - 1) < spread
    lo, hi = (0.9, 1.0) if near else (share, share)
    return Judged(speed, share, lo, hi, ATTAIN)


def run(capacity: float, spread: float = 0.0, **changed: float) -> Bracket:
    given_ends = {"first": 1, "least": 0.01, "most": 1000} | changed
    ends = {name: Fraction(value) for name, value in given_ends.items()}
    bracket = Bracket()
    search(lambda s: judged(s, capacity, spread), bracket, tolerance=0.05, **ends)
    return bracket


@given(st.floats(0.02, 900))
def test_the_capacity_lies_in_the_bracket_and_the_bracket_is_tight(capacity: float) -> None:
    bracket = run(capacity)
    assert bracket.met is not None and bracket.missed is not None
    assert bracket.met.speed <= capacity < bracket.missed.speed
    assert bracket.why == "tight" and bracket.ratio <= 1.05 * 1.01
    assert len(bracket.tried) == len({j.speed for j in bracket.tried}) < MOST_PROBES
    assert bracket.interval() == (bracket.met.speed, bracket.missed.speed)


@given(st.floats(0.02, 900), st.floats(0.0, 0.5))
def test_nothing_above_a_speed_that_was_missed_is_tried(capacity: float, spread: float) -> None:
    tried = run(capacity, spread).tried
    for i, one in enumerate(tried):
        assert all(one.speed < before.speed for before in tried[:i] if not before.met)


def test_ends_that_cannot_be_told_from_the_limit_end_the_search_early() -> None:
    bracket = run(3.1, spread=0.5)
    assert bracket.why == "told apart no further"
    low, high = bracket.interval()
    assert low is not None and low <= 3.1 and (high is None or high > 3.1)
    assert len(bracket.tried) < len(run(3.1).tried)


def test_a_limit_that_no_speed_or_every_speed_meets_is_said() -> None:
    assert (run(0.001).why, run(0.001).met) == ("never met", None)
    always = run(5000)
    assert (always.why, always.missed) == ("always met", None)
    assert always.met is not None and always.met.speed == 1000


@pytest.mark.parametrize(("least", "most"), [(2, 8), (2, 2)])
def test_no_speed_outside_the_span_is_tried(least: int, most: int) -> None:
    speeds = [j.speed for j in run(4, least=least, most=most).tried]
    assert all(least <= speed <= most for speed in speeds) and speeds


def test_what_was_measured_before_a_stop_is_kept() -> None:
    bracket, calls = Bracket(), [0]

    def measure(speed: Fraction) -> Judged:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return judged(speed, 3.0)

    ends = {"first": Fraction(1), "least": Fraction(1, 10), "most": Fraction(100)}
    with pytest.raises(KeyboardInterrupt):
        search(measure, bracket, tolerance=0.05, **ends)
    assert bracket.text() == "between 2x (met) and 4x (missed)"
