"""Prefix reuse asked for and got, on prompts whose blocks are known."""

from pathlib import Path
from typing import Any

import pytest

from rows import make_tape, streamed_row
from tokentape.analysis.session import connect


def prompt(n: int, hashes: list[int], tokens: int, **columns: Any) -> dict[str, Any]:
    """A request n ms after the epoch whose prompt has these chained blocks of 16 tokens."""
    blocks: dict[str, Any] = {
        "block_hashes": hashes,
        "block_tokens": 16,
        "block_unit": "token",
        "block_scope": "tape",
        "prefix_partial": tokens - 16 * len(hashes),
        "input_tokens": tokens,
    }
    return streamed_row(n) | blocks | columns


def asked(tape: Path) -> list[float | None]:
    query = "SELECT asked_tokens FROM prefix_requests ORDER BY arrival_ns"
    with connect([tape]) as session:
        return [value for (value,) in session.sql(query).fetchall()]


def test_asked_is_what_an_earlier_request_had(tmp_path: Path) -> None:
    rows = [
        prompt(0, [1, 2, 3], 50),
        prompt(5, [1, 2, 9], 50),  # two blocks of the first
        prompt(9, [1, 2, 9, 10], 64),  # three of the second
        prompt(9, [7], 20),
    ]
    assert sorted(asked(make_tape(tmp_path / "t", rows))) == [0, 0, 32, 48]  # type: ignore[type-var]


def test_what_never_reached_an_engine_fills_no_cache(tmp_path: Path) -> None:
    rows = [prompt(0, [1], 20, outcome="http_error"), prompt(1, [1], 20), prompt(2, [1], 20)]
    assert asked(make_tape(tmp_path / "t", rows)) == [0, 16]


def test_equal_hashes_of_two_sessions_are_no_reuse_where_the_scope_is_the_session(
    tmp_path: Path,
) -> None:
    rows = [
        prompt(i, [1], 20, block_scope="session", session_id=session)
        for i, session in enumerate("aab")
    ]
    assert asked(make_tape(tmp_path / "t", rows)) == [0, 16, 0]


def test_blocks_of_bytes_count_in_proportion_and_are_not_exact(tmp_path: Path) -> None:
    bytes_ = {"block_unit": "byte", "prefix_partial": 8, "input_tokens": 10}
    rows = [prompt(i, [1, 2], 10, **bytes_) for i in range(2)]
    tape = make_tape(tmp_path / "t", rows)
    assert asked(tape) == [0, pytest.approx(10 * 32 / 40)]
    with connect([tape]) as session:
        assert session.sql("SELECT exact FROM prefix_reuse").fetchall() == [(False,)]


def test_got_is_what_the_server_says_over_what_was_asked(tmp_path: Path) -> None:
    rows = [
        prompt(0, [1, 2], 40, cached_tokens=0),
        prompt(1, [1, 2], 40, cached_tokens=16),
        prompt(2, [1, 2], 40),  # the server did not say
        streamed_row(3, input_tokens=20, cached_tokens=4),  # no hashes
    ]
    with connect([make_tape(tmp_path / "t", rows), make_tape(tmp_path / "e", [])]) as session:
        found = {r["run"]: r for r in session.table("FROM prefix_reuse").to_pylist()}
        long = session.sql("SELECT value, n FROM metrics_long WHERE metric = 'prefix_got'")
        assert set(long.fetchall()) == {(0.2, 3), (None, 0)}
    row = found["t"]
    assert (row["requests"], row["asked_tokens"], row["asked_share"]) == (3, 64, 64 / 120)
    assert (row["got_known"], row["got_tokens"], row["got_share"]) == (3, 20, 0.2)
    assert row["got_of_asked"] == 16 / 32
    assert (found["e"]["requests"], found["e"]["got_share"]) == (0, None)
