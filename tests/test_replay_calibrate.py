"""The noise floor: what is left when the instants that a server knows are taken from ours."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tokentape.replay.asked import Asked
from tokentape.replay.calibrate import (
    Floor,
    busiest,
    calibrate,
    floor_of,
    keep_floor,
    null_server,
    plain_plan,
)
from tokentape.replay.null_server import Truth, read_log
from tokentape.replay.run import RunSummary, make_plan, run_plan
from tokentape.replay.schedule import NS_PER_S
from tokentape.replay.sessions import Shard
from tokentape.traces.reader import open_tape

MS = 1_000_000
SPAN_NS = NS_PER_S


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunSummary, Truth]:
    """Forty requests of twenty tokens within a second, and what the server knows of them."""
    folder = tmp_path_factory.mktemp("floor")
    plan = plain_plan(folder, 40, 20, SPAN_NS)
    with null_server(folder / "log", SPAN_NS) as url:
        summary = run_plan(busiest(plan, url, folder / "run.tape", SPAN_NS))
    return summary, read_log(folder / "log")


def floor(run: tuple[RunSummary, Truth], truth: Truth) -> Floor:
    return floor_of(open_tape(run[0].tape), truth, run[0].verdict.figures)


def test_every_event_of_the_server_is_found_and_none_is_seen_before_it_was_sent(
    run: tuple[RunSummary, Truth],
) -> None:
    summary, truth = run
    found = floor(run, truth)
    assert summary.outcomes == {"ok": 40}
    assert (found.requests, found.events, found.missing_events) == (40, 800, 0)
    assert truth.counts.tolist() == [20] * 40
    arrival, schedule = found.arrival_error_ns, found.schedule_error_ns
    assert arrival["p50"] is not None and 0 <= arrival["p50"] < 500 * MS
    assert schedule["p50"] is not None and 0 < schedule["p50"] < 500 * MS


def test_the_floor_is_a_subtraction(run: tuple[RunSummary, Truth]) -> None:
    """A server that says it sent everything 7 ms earlier makes us 7 ms later, gaps as they were."""
    _, truth = run
    before, earlier = floor(run, truth), replace(truth, sent_ns=truth.sent_ns - 7 * MS)
    after = floor(run, earlier)
    for name in ("p50", "p99", "max"):
        moved = (after.arrival_error_ns[name] or 0) - (before.arrival_error_ns[name] or 0)
        assert moved == 7 * MS
    assert after.gap_error_ns == before.gap_error_ns
    assert (after.ttft_error_ns["p50"] or 0) - (before.ttft_error_ns["p50"] or 0) == 7 * MS
    assert after.schedule_error_ns == before.schedule_error_ns


def test_a_stream_that_the_tape_lacks_is_counted_as_missing(run: tuple[RunSummary, Truth]) -> None:
    _, truth = run
    more = Truth(
        np.r_[truth.full_ns, truth.full_ns[-1]],
        np.r_[truth.counts, 3],
        np.r_[truth.sent_ns, truth.sent_ns[-3:]],
    )
    assert floor(run, more).missing_events == 3


def test_a_span_of_a_minute_is_cut_like_one_of_a_second(tmp_path: Path) -> None:
    plan = plain_plan(tmp_path, 0.5, 900, 60 * NS_PER_S)
    part = busiest(plan, "http://127.0.0.1:1", tmp_path / "t", 20 * NS_PER_S)
    assert 9 <= len(part) <= 11


def test_the_busiest_part_of_a_plan_is_what_is_sent(tmp_path: Path) -> None:
    plan = plain_plan(tmp_path, 10, 5, 4 * NS_PER_S)
    tokens = plan.source.output_tokens
    tokens[23:30] = 900  # due from 2.3 s to 2.9 s
    part = busiest(plan, "http://127.0.0.1:1", tmp_path / "t", NS_PER_S)
    first, last = part.schedule.source_index[0], part.schedule.source_index[-1]
    assert len(part) == 10 and first <= 23 and last >= 29
    assert part.schedule.due_ns[0] == 0 and part.schedule.due_ns[-1] == 900 * MS
    assert part.options.headers == {} and part.options.key_env is None


def test_the_busiest_part_of_a_multiplied_plan_has_its_copies(tmp_path: Path) -> None:
    plain = plain_plan(tmp_path, 10, 5, 4 * NS_PER_S)
    twice = Asked(multiply=Fraction(2))
    plan = make_plan(replace(plain.options, operators=twice), offline=True)
    part = busiest(plan, "http://127.0.0.1:1", tmp_path / "t", NS_PER_S)
    sent = [part.outgoing(n) for n in range(len(part))]
    assert part.figures["requests"] == len(sent) >= 20
    assert {s.row["copy_index"] for s in sent} == {0, 1}
    assert len({s.body for s in sent}) == len(sent)


@pytest.mark.slow
def test_a_shard_with_workers_is_calibrated_with_them_now_and_not_at_its_start(
    tmp_path: Path,
) -> None:
    plan = plain_plan(tmp_path, 20, 4, SPAN_NS // 2)
    plan.options.workers = 2
    plan.options.shard, plan.options.start_at_unix_ns = Shard(1, 4), 1
    measured = calibrate(plan, SPAN_NS // 2)
    assert (measured.requests, measured.events, measured.missing_events) == (10, 40, 0)
    assert 0 <= (measured.arrival_error_ns["p50"] or -1) < 50 * MS
    assert plan.options.start_at_unix_ns == 1


def test_a_floor_stands_beside_the_verdict_of_a_run(run: tuple[RunSummary, Truth]) -> None:
    summary, truth = run
    measured = floor(run, truth)
    keep_floor(summary.tape, measured)
    facts = open_tape(summary.tape).facts
    assert facts["noise_floor"] == measured.as_dict()
    assert facts["verdict"]["requests"] == 40


def test_calibrate_leaves_nothing_behind_and_says_its_figures(tmp_path: Path) -> None:
    plan = plain_plan(tmp_path, 20, 4, SPAN_NS // 2)
    before = sorted(tmp_path.rglob("*"))
    text = calibrate(plan, SPAN_NS // 2).text()
    assert text.startswith("noise floor: 10 requests, 40 events")
    assert "arrival error: p50" in text and "schedule error: p50" in text
    assert sorted(tmp_path.rglob("*")) == before


def test_streams_longer_than_the_span_are_paced_to_end_in_it(tmp_path: Path) -> None:
    plan = plain_plan(tmp_path, 4, 500, SPAN_NS)  # ten seconds at 20 ms each
    with null_server(tmp_path / "log", SPAN_NS) as url:
        run_plan(busiest(plan, url, tmp_path / "run.tape", SPAN_NS))
    truth = read_log(tmp_path / "log")
    lasted = truth.sent_ns[truth.first + truth.counts - 1] - truth.full_ns
    assert truth.counts.tolist() == [500] * 4
    assert (lasted < 3 * SPAN_NS).all()
