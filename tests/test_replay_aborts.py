"""Aborts: a reply is left where its recorded client left it, to the event, and is no failure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from replay_server import Seen, Server, Step, engine_like, serve, streamed
from rows import MS, make_tape, streamed_row
from tokentape.replay.aborts import MORE_TOKENS, Leaving
from tokentape.replay.options import ReplayOptions
from tokentape.replay.plan import Plan, make_plan
from tokentape.replay.run import RunSummary, run_plan
from tokentape.replay.source import read_source
from tokentape.traces.reader import open_tape

COLUMNS = ["source_request_id", "outcome", "error_type", "off_us", "output_tokens", "send_ns",
           "end_ns", "max_tokens", "planned_output_tokens"]  # fmt: skip


def row(number: int, events: int, **more: Any) -> dict[str, Any]:
    return streamed_row(number, events, request_id=number.to_bytes(16), **more)


RECORDED = [
    row(0, 4),
    row(1, 5, outcome="client_abort", max_tokens=40),
    row(2, 3, outcome="client_abort", operation="text_completion"),
    row(3, 0, outcome="client_abort", end_ns=(4 + 60) * MS, max_tokens=30),
    row(4, 0, outcome="client_abort", end_ns=None),
    row(5, 2, outcome="client_abort", stream=False, off_us=None, end_ns=(6 + 70) * MS),
]


def test_a_client_that_left_is_known_by_its_events_or_by_how_long_it_waited(
    tmp_path: Path,
) -> None:
    source, _ = read_source(open_tape(make_tape(tmp_path / "t", RECORDED)))
    assert source.aborts.by_row == {
        1: Leaving(5, 6 * MS, 40),
        2: Leaving(3, 4 * MS, 0),
        3: Leaving(0, 60 * MS, 30),
        5: Leaving(0, 70 * MS, 0),
    }  # row 4 says neither: it ends by itself
    assert read_source(open_tape(tmp_path / "t"), with_aborts=False)[0].aborts.by_row == {}


def test_there_is_always_a_token_more_than_the_client_had() -> None:
    assert Leaving(5, 0, 40).asked(5, 100, None) == 40
    assert Leaving(5, 0, 5).asked(5, 100, None) == 5 + MORE_TOKENS
    assert Leaving(5, 0, 4000).asked(5, 100, 1000) == 900
    assert Leaving(5, 0, 4000).asked(5, 998, 1000) == 6


def patient(seen: Seen) -> Sequence[Step]:
    """As many tokens as are asked for, one in 20 ms."""
    return engine_like(seen) if seen.path.endswith("/models") else streamed(seen, gap_s=0.02)


def replayed(tmp_path: Path, **changes: Any) -> tuple[RunSummary, Plan, Server]:
    source = make_tape(tmp_path / "source.tape", RECORDED)
    with serve(patient) as server:
        plan = make_plan(ReplayOptions(source, server.url, tmp_path / "run.tape", **changes))
        summary = run_plan(plan)
    return summary, plan, server


def rows_of(summary: RunSummary) -> list[dict[str, Any]]:
    rows = open_tape(summary.tape).read(COLUMNS).to_pylist()
    return sorted(rows, key=lambda r: r["source_request_id"])


def test_replies_are_left_at_the_recorded_event_or_time_and_are_no_failures(
    tmp_path: Path,
) -> None:
    summary, plan, server = replayed(tmp_path)
    rows = rows_of(summary)
    assert [r["outcome"] for r in rows] == ["ok", *["client_abort"] * 3, "ok", "client_abort"]
    assert [r["error_type"] for r in rows[1:4]] == ["planned_abort"] * 3
    assert [len(r["off_us"]) for r in rows[:3]] == [4, 5, 3]  # to the event
    assert [r["max_tokens"] for r in rows[1:4]] == [40, 3 + MORE_TOKENS, 30]
    assert [r["planned_output_tokens"] for r in rows[1:3]] == [5, 3]
    for number, waited_ms in ((3, 60), (5, 70)):
        lasted_ms = (rows[number]["end_ns"] - rows[number]["send_ns"]) / MS
        assert waited_ms - 2 <= lasted_ms < waited_ms + 500
    asked = sum(seen.json.get("max_tokens", 0) for seen in server.generations)
    assert asked > 300 and len(server.sent_ns) < 100  # the server was not listened to till the end
    assert "aborts: 4 replies are left as their clients left them: 2 after as" in plan.text()
    assert "aborts: 4 of 4 replies were left" in summary.verdict.text()
    assert not [reason for reason in summary.verdict.reasons if "failed" in reason]


def test_aborts_can_be_ignored_and_then_replies_end_where_they_were_left(tmp_path: Path) -> None:
    summary, plan, _ = replayed(tmp_path, replay_aborts=False)
    rows = rows_of(summary)
    assert {r["outcome"] for r in rows} == {"ok"}
    assert [r["output_tokens"] for r in rows[:3]] == [4, 5, 3]
    assert "aborts:" not in plan.text() + summary.verdict.text()


@pytest.mark.parametrize("workers", [2])
def test_a_worker_gets_the_aborts_of_its_own_requests(tmp_path: Path, workers: int) -> None:
    source = make_tape(tmp_path / "source.tape", RECORDED)
    options = ReplayOptions(source, "http://127.0.0.1:1", model="m", workers=workers)
    plan = make_plan(options, offline=True)
    found: list[tuple[int, int | None]] = []
    for worker in range(workers):
        kept = (plan.worker_of_each == worker).nonzero()[0].astype("int32")
        share = plan.whole.part(kept, 1)
        assert set(share.aborts.by_row) <= set(share.positions.tolist())
        made = [share.outgoing(n) for n in range(len(share))]
        found += [(m.leave_events, m.leave_after_ns) for m in made]
    assert sorted(found, key=str) == sorted(
        [(0, None), (5, None), (3, None), (0, 60 * MS), (0, None), (0, 70 * MS)], key=str
    )
