"""The tail of a latency: who is in it, what it shares, and what is said beside it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rows import MS, make_tape, streamed_row
from tokentape.analysis.session import connect
from tokentape.analysis.tails import METRICS, Tails, tails
from tokentape.traces.errors import UsageError


def rows(n: int = 400, **columns: Any) -> list[dict[str, Any]]:
    """Requests 1 s apart, TTFT 1 ms and a little; each 40th is slow, and missed the cache."""
    rng = np.random.default_rng(3)
    found = []
    for i in range(n):
        slow = i % 40 == 7
        row = streamed_row(
            i * 1000,
            3,
            cached_tokens=0 if slow or i % 20 == 0 else 8,
            model="small" if rng.random() < 0.5 else "large",
            response_id=f"r{i}",
        )
        row["first_content_ns"] += int(rng.integers(0, MS // 2)) + (100 * MS if slow else 0)
        found.append(row | columns)
    return found


def found_in(tape: Path, metric: str = "ttft", above: str = "p98") -> Tails:
    with connect([tape]) as session:
        [found] = tails(session, metric, above)
    return found


def test_the_tail_is_what_lies_above_the_exact_quantile(tmp_path: Path) -> None:
    made = rows()
    values = sorted(r["first_content_ns"] - r["send_end_ns"] for r in made)
    found = found_in(make_tape(tmp_path / "t", made))
    assert found.threshold_ns == values[math.ceil(0.98 * 400) - 1]
    assert (found.n, found.in_tail) == (400, 8)
    assert [w["value_ns"] for w in found.worst] == values[:-9:-1]
    assert {w["response_id"] for w in found.worst} <= {f"r{i}" for i in range(7, 400, 40)}


def test_what_the_tail_shares_comes_with_its_lift_and_counts(tmp_path: Path) -> None:
    [group] = found_in(make_tape(tmp_path / "t", rows())).groups  # the model is chance
    assert (group["property"], group["value"]) == ("cache", "miss")
    assert (group["in_tail"], group["requests"]) == (8, 30)
    assert group["lift"] == pytest.approx(1 / (30 / 400))
    seen = np.array([8, 22, 0, 370])
    expected = np.array([30 * 8, 30 * 392, 370 * 8, 370 * 392]) / 400
    g = 2 * sum(s * math.log(s / e) for s, e in zip(seen, expected, strict=True) if s)
    assert group["evidence"] == pytest.approx(g)


def test_what_is_rarer_in_the_tail_has_negative_evidence(tmp_path: Path) -> None:
    query = "SELECT value, lift, evidence FROM tails_groups('ttft', 0.98) WHERE property = 'cache'"
    with connect([make_tape(tmp_path / "t", rows())]) as session:
        found = {value: rest for value, *rest in session.sql(query).fetchall()}
    assert found["hit"][0] == 0 and found["hit"][1] < -10.8


def test_requests_in_flight_and_first_tokens_awaited_are_counted_at_the_send(
    tmp_path: Path,
) -> None:
    made = [
        streamed_row(0, 3, first_content_ns=5 * MS, end_ns=30 * MS),  # sent at 1 ms
        streamed_row(3, 3, first_content_ns=6 * MS, end_ns=30 * MS),
        streamed_row(9, 3),
    ]
    query = "SELECT in_flight, waiting FROM tails_of('ttft', 0.5) ORDER BY request_id"
    with connect([make_tape(tmp_path / "t", made)]) as session:
        assert session.sql(query).fetchall() == [("1", "1"), ("2", "2"), ("4", "1")]


def test_too_few_requests_have_no_tail_and_what_is_missing_is_said(tmp_path: Path) -> None:
    made = [*rows(50), streamed_row(99_000, 0, outcome="http_error")]
    tape = make_tape(tmp_path / "t", made, losses={"w0": {"disk full": 51}})
    found = found_in(tape, above="p99")
    assert found.threshold_ns is None and not found.groups and not found.worst
    text = found.text()
    assert "too few (n=50) to have a p99" in text
    assert "! the tape holds 50.00 % of what was seen" in text
    assert "! 1 requests without outcome ok have no latency here" in text


def test_the_printed_sql_says_the_same(tmp_path: Path) -> None:
    tape = make_tape(tmp_path / "it's a tape", rows())
    found = found_in(tape)
    assert f"the groups: {found.sql['the groups']}" in found.text()
    with connect([tape]) as session:
        assert session.table(found.sql["the groups"]).to_pylist() == found.groups
        assert session.table(found.sql["the requests"]).to_pylist() == found.worst


def test_every_metric_has_a_tail_and_nothing_else_has(tmp_path: Path) -> None:
    with connect([make_tape(tmp_path / "t", rows(20))]) as session:
        for metric in METRICS:
            found = session.sql(f"SELECT count(*) FROM _tail_values WHERE metric = '{metric}'")
            assert found.fetchall() == [(20,)], metric
        for metric, above in (("icl", "p99"), ("ttft", "99"), ("ttft", "p100"), ("ttft", "p0")):
            with pytest.raises(UsageError, match=r"--(metric|above)"):
                tails(session, metric, above)
