"""A common start: one instant of the wall clock, met or refused, and said."""

import asyncio
from time import monotonic_ns

import pytest

from tokentape.replay import start as module
from tokentape.replay.start import AFTER_NS, StartAt, check_start
from tokentape.traces.clock import Anchor, take_anchor, wall_unix_ns
from tokentape.traces.errors import TokentapeError, UsageError

MS = 1_000_000
SECOND = 1000 * MS


def test_without_a_common_instant_the_start_is_soon_after_all_is_ready() -> None:
    start = StartAt()
    asyncio.run(start.prepared())
    now = monotonic_ns()
    t0_ns = asyncio.run(start.instant(7 * MS))
    assert AFTER_NS + 7 * MS <= t0_ns - now < AFTER_NS + 7 * MS + SECOND
    facts = start.facts()
    assert facts["start_at_unix_ns"] is None
    assert abs(facts["t0_unix_ns"] - wall_unix_ns()) < 10 * SECOND


def test_a_common_instant_is_met_on_the_monotonic_clock() -> None:
    at = wall_unix_ns() + 5 * SECOND
    start = StartAt(at)
    t0_ns = asyncio.run(start.instant(15 * MS))
    anchor = take_anchor()
    assert abs(t0_ns - anchor.monotonic_ns - (at - anchor.wall_unix_ns)) < MS
    assert start.facts()["t0_unix_ns"] == start.facts()["start_at_unix_ns"] == at


def test_connections_are_opened_shortly_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WARM_BEFORE_NS", 300 * MS)
    start = StartAt(wall_unix_ns() + 600 * MS)
    began = monotonic_ns()
    asyncio.run(start.prepared())
    assert 250 * MS < monotonic_ns() - began < 600 * MS


def test_a_wall_clock_that_is_set_meanwhile_moves_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = StartAt(wall_unix_ns() + 100 * SECOND)
    before = asyncio.run(start.instant(0))
    true = take_anchor()
    stepped = Anchor(true.wall_unix_ns + 40 * SECOND, true.monotonic_ns, true.uncertainty_ns)
    monkeypatch.setattr(module, "take_anchor", lambda: stepped)
    assert abs(before - asyncio.run(start.instant(0)) - 40 * SECOND) < MS


def test_a_start_that_is_missed_is_refused_by_how_much() -> None:
    start = StartAt(wall_unix_ns() - 2500 * MS)
    with pytest.raises(TokentapeError, match=r"ready 2\.[56] s too late, and sent nothing"):
        asyncio.run(start.instant(0))
    soon = StartAt(wall_unix_ns() + 100 * MS)
    with pytest.raises(TokentapeError, match="too late"):
        asyncio.run(soon.instant(2 * SECOND))  # a burst takes so long to arm


def test_a_past_instant_is_a_wrong_argument_and_a_far_one_is_said() -> None:
    with pytest.raises(UsageError, match=r"was (9|10) s ago by this host's clock"):
        check_start(wall_unix_ns() - 10 * SECOND)
    assert check_start(1_000 * SECOND + wall_unix_ns()).endswith("in 1000 s")
    assert check_start(4_000 * SECOND + wall_unix_ns()).endswith("more than an hour away")
