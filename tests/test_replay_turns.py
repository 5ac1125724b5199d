"""Turns: who waited for whom on a tape, and that the same wait for the same in a plan and a run."""

import heapq
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay_server import Seen, Step, engine_like, plain, serve, streamed
from rows import make_tape
from tokentape.analysis.session import connect
from tokentape.replay.asked import Asked
from tokentape.replay.links import NO_LINKS, Links, together
from tokentape.replay.options import ReplayOptions
from tokentape.replay.plan import Plan, make_plan
from tokentape.replay.run import Progress, RunSummary, run_plan
from tokentape.replay.schedule import Offered, Schedule, ScheduleOptions, make_schedule
from tokentape.replay.sessions import shard_of
from tokentape.replay.source import Source, read_source
from tokentape.replay.turns import Followers, Turns, Waits, make_waits
from tokentape.traces.errors import UsageError
from tokentape.traces.importers import import_trace
from tokentape.traces.reader import open_tape

WEKA = Path(__file__).parents[2] / "shared/data/weka-agentic"
MS, SECOND = 1_000_000, 1_000_000_000


def row(number: int, at_ms: int, lasted_ms: int | None, **more: Any) -> dict[str, Any]:
    known = {"request_id": number.to_bytes(16), "arrival_ns": at_ms * MS, "outcome": "ok"}
    if lasted_ms is not None:
        known["end_ns"] = (at_ms + lasted_ms) * MS
    if "parents" in more:
        more["parents"] = [parent.to_bytes(16) for parent in more["parents"]]
    return known | {"input_tokens": 20 + number, "output_tokens": 3} | more


AGENT = [  # 0 starts 1 and 2 beside each other; 3 waits for both; 4 begins while 3 still runs
    row(0, 0, 100, session_id="a"),
    row(1, 150, 100, session_id="a/x", parents=[0]),
    row(2, 150, 300, session_id="a/y", parents=[0]),
    row(3, 500, 100, session_id="a", parents=[1, 2]),
    row(4, 530, 50, session_id="a", parents=[3]),
    row(5, 600, 10, session_id="b"),
]


THINKS_NS = [None, 50 * MS, 50 * MS, 50 * MS, -70 * MS, None]
THINKING = [one | {"think_ns": think} for one, think in zip(AGENT, THINKS_NS, strict=True)]


def source_of(path: Path, rows: list[dict[str, Any]]) -> tuple[Source, Offered]:
    return read_source(open_tape(make_tape(path, rows)))


def plan_of(source: Path, **changes: Any) -> Plan:
    options = ReplayOptions(source=source, to="http://127.0.0.1:1", model="m", **changes)
    return make_plan(options, offline=True)


# -- what a tape says ---------------------------------------------------------------------------


def test_think_times_follow_from_the_ends_of_the_parents_and_what_overlapped_is_parallel(
    tmp_path: Path,
) -> None:
    links = source_of(tmp_path / "t", AGENT)[0].links
    assert links.child.tolist() == [1, 2, 3, 3, 4]
    assert links.parent.tolist() == [0, 0, 1, 2, 3]
    assert links.wait_ns.tolist() == [50 * MS, 50 * MS, 50 * MS, 50 * MS, 30 * MS]
    assert links.parallel.tolist() == [False] * 4 + [True]
    assert links.slack_ns.tolist() == [0, 0, 200 * MS, 0, 0]  # 1 ended long before 2 did
    assert (links.missing, links.backward, links.unknown_think, links.cycle) == (0, 0, 0, ())


def test_a_recorded_think_time_outranks_the_ends_and_one_that_nobody_knows_is_counted(
    tmp_path: Path,
) -> None:
    rows = [
        row(0, 0, 100),
        row(1, 150, 10, parents=[0], think_ns=7 * MS),
        row(2, 160, None),
        row(3, 800, 10, parents=[4]),
        row(4, 900, 10, parents=[2]),
        row(5, 950, 10, parents=[2], think_ns=-5),  # negative: it overlapped
        row(6, 990, 10, parents=[77]),
    ]
    links = source_of(tmp_path / "t", rows)[0].links
    assert links.wait_ns.tolist() == [7 * MS, 0, 790 * MS, 0]
    assert links.parallel.tolist() == [False, False, True, False]
    assert links.parent.tolist() == [0, 2, 2, -1]
    assert (links.missing, links.backward, links.unknown_think) == (1, 1, 1)


def test_sessions_that_wait_for_each_other_are_kept_together(tmp_path: Path) -> None:
    source, _ = source_of(tmp_path / "t", [*AGENT, row(6, 900, 5), row(7, 950, 5, parents=[6])])
    groups = source.kept_together.tolist()
    assert len(set(groups[:5])) == 1 and groups[5] != groups[0] and groups[6] == groups[7] >= 0
    assert len(set(source.sessions.tolist())) == 5
    alone = np.array([0, -1], dtype=np.int32)
    assert together(alone, NO_LINKS) is alone


@pytest.mark.parametrize("ring", [{0: [0]}, {0: [2], 1: [0], 2: [1]}])
def test_requests_that_wait_for_each_other_are_one_clear_line(
    tmp_path: Path, ring: dict[int, list[int]]
) -> None:
    rows = [row(n, 10 * n, 5, **({"parents": ring[n]} if n in ring else {})) for n in range(4)]
    source = make_tape(tmp_path / "t", rows)
    with pytest.raises(UsageError, match=r"wait for each other \(0+.* -> .*use --turns open"):
        plan_of(source)
    assert plan_of(source, turns="open").turns.waits is None


# -- plans --------------------------------------------------------------------------------------


@st.composite
def recorded(draw: st.DrawFn) -> tuple[Offered, Links, np.ndarray[Any, Any]]:
    """Requests that waited for earlier ones: (offered, links, durations)."""
    count = draw(st.integers(1, 25))
    arrival: list[int] = []
    duration = draw(st.lists(st.integers(1, 50), min_size=count, max_size=count))
    edges: list[tuple[int, int, int, bool, int]] = []
    for child in range(count):
        before = st.integers(0, max(child - 1, 0))
        parents = draw(st.lists(before, max_size=min(child, 3), unique=True))
        ends = [arrival[p] + duration[p] for p in parents]
        think = draw(st.integers(0, 30))
        at = max(ends) + think if parents else draw(st.integers(0, 100))
        arrival.append(at)
        edges += [
            (child, p, think, False, at - end - think) for p, end in zip(parents, ends, strict=True)
        ]
        if not parents and child and draw(st.booleans()):
            beside = draw(before)
            if arrival[beside] <= at:
                edges.append((child, beside, at - arrival[beside], True, 0))
    child_, parent_, wait, parallel, slack = zip(*edges, strict=True) if edges else ((),) * 5
    links = Links(
        np.array(child_, np.int32),
        np.array(parent_, np.int32),
        np.array(wait, np.int64),
        np.array(parallel, np.bool_),
        np.array(slack, np.int64),
    )
    lasted = np.array(duration, np.int64)
    n = len(lasted)
    offered = Offered(
        np.array(arrival, np.int64), np.ones(n, np.int32), np.ones(n, np.int32), lasted,
        np.zeros(n, np.int8),
    )  # fmt: skip
    return offered, links, lasted


def run_through(waits: Waits, schedule: Schedule, lasting: Sequence[int]) -> list[int]:
    """The due times when each request takes its time from the instant that it is due."""
    count = len(schedule.due_ns)
    followers = Followers(waits, count)
    due: dict[int, int] = {}
    happen = [(int(schedule.due_ns[n]), 1, int(n)) for n in followers.first]
    heapq.heapify(happen)
    while happen:
        at, what, number = heapq.heappop(happen)
        if what == 1:
            assert number not in due
            due[number] = at
            followers.sent(number, bytes(16), at)
            heapq.heappush(happen, (at + lasting[number], 0, number))
        else:
            followers.ended(number, at, failed=False)
        while followers.known:
            known_at, child = heapq.heappop(followers.known)
            heapq.heappush(happen, (known_at, 1, child))
    assert followers.left == 0 and len(due) == count
    return [due[n] for n in range(count)]


@given(recorded(), st.sampled_from(["after", "think"]))
def test_a_candidate_as_fast_as_the_recorded_one_gets_the_recorded_arrivals(
    case: tuple[Offered, Links, np.ndarray[Any, Any]], turns: Turns
) -> None:
    offered, links, lasted = case
    schedule = make_schedule(offered, ScheduleOptions())
    waits = make_waits(links, schedule, turns, Fraction(1)).waits
    if waits is not None:
        lasting = lasted[schedule.source_index].tolist()
        assert run_through(waits, schedule, lasting) == schedule.due_ns.tolist()


@given(recorded(), st.sampled_from(["after", "think"]), st.data())
def test_whatever_the_candidate_takes_each_request_is_due_when_the_last_of_its_waits_is_over(
    case: tuple[Offered, Links, np.ndarray[Any, Any]], turns: Turns, data: st.DataObject
) -> None:
    offered, links, _ = case
    speed = data.draw(st.sampled_from([Fraction(1), Fraction(2), Fraction(1, 3)]))
    scaled = data.draw(st.booleans())
    schedule = make_schedule(offered, ScheduleOptions(speed))
    waits = make_waits(links, schedule, turns, speed, scaled_think=scaled).waits
    if waits is None:
        return
    n = len(schedule.due_ns)
    lasting = data.draw(st.lists(st.integers(0, 200), min_size=n, max_size=n))
    due = run_through(waits, schedule, lasting)
    row_of = schedule.source_index.tolist()
    asked = defaultdict(list)
    for child, parent, wait, parallel in zip(
        links.child.tolist(), links.parent.tolist(), links.wait_ns.tolist(),
        links.parallel.tolist(), strict=True,
    ):  # fmt: skip
        mine, before = row_of.index(child), row_of.index(parent)
        wait_ns = int(wait / speed) if scaled or parallel else wait
        asked[mine].append(due[before] + (0 if parallel else lasting[before]) + wait_ns)
    for number in range(n):
        planned = int(schedule.due_ns[number])
        floor = [planned] if turns == "after" or number not in asked else []
        assert due[number] == max(asked[number] + floor)


@given(recorded(), st.integers(1, 4))
def test_shards_keep_all_dependencies_and_each_gives_the_due_times_of_the_whole(
    case: tuple[Offered, Links, np.ndarray[Any, Any]], count: int
) -> None:
    offered, links, lasted = case
    schedule = make_schedule(offered, ScheduleOptions())
    waits = make_waits(links, schedule, "after", Fraction(1)).waits
    if waits is None:
        return
    slow = (3 * lasted[schedule.source_index]).tolist()
    whole = run_through(waits, schedule, slow)
    groups = together(np.full(len(lasted), -1, np.int32), links)[schedule.source_index]
    shard, kept_waits = shard_of(groups, count), 0
    for index in range(count):
        kept = np.flatnonzero(shard == index).astype(np.int32)
        part = waits.part(kept)
        mine = schedule.part(shard == index, offered.duration_ns)
        if part is not None:
            kept_waits += len(part.child)
            due = run_through(part, mine, [slow[k] for k in kept])
            assert due == [whole[k] for k in kept]
    assert kept_waits == len(waits.child)


def test_a_copy_waits_for_the_same_copy_and_an_agent_is_moved_with_its_subagents(
    tmp_path: Path,
) -> None:
    plan = plan_of(make_tape(tmp_path / "t", AGENT), operators=Asked(multiply=Fraction(3)))
    waits, schedule = plan.turns.waits, plan.schedule
    assert waits is not None and len(waits.child) == 3 * 5
    copies = schedule.copy_index
    assert (copies[waits.child] == copies[waits.parent]).all()
    for copy in range(3):
        mine = (copies == copy) & (schedule.source_index < 5)
        gaps = np.diff(schedule.due_ns[mine])
        assert gaps.tolist() == [150 * MS, 0, 350 * MS, 30 * MS]


def test_parents_outside_the_window_count_as_done_when_they_were(tmp_path: Path) -> None:
    source = make_tape(tmp_path / "t", [*AGENT[:5], row(5, 1000, 5, parents=[4, 99])])
    plan = plan_of(source, turns="think", window=(200 * MS, None))
    assert [int(n) for n in plan.schedule.source_index] == [3, 4, 5]
    waits = plan.turns.waits
    assert waits is not None and plan.turns.context == 2  # 3 waited for 1 and 2, which are outside
    assert waits.floor_ns.tolist() == [0, 0, 500 * MS]  # 99 was never seen: 5 keeps its own time
    notes = plan.warnings()
    assert "2 parents are not in this plan: taken as done when they were" in notes
    assert "1 parents are not on the tape: taken as done when they were" in notes


def test_the_plan_says_how_turns_are_kept(tmp_path: Path) -> None:
    source = make_tape(tmp_path / "t", AGENT)
    after = plan_of(source, speed=Fraction(2))
    assert "turns: after; 4 of 6 requests" in after.text() and "think time / 2" in after.text()
    assert "as long as it was recorded, not as it comes" in after.text()
    figures = after.json()
    assert (figures["turns"], figures["dependent_requests"], figures["dependencies"]) == (
        "after", 4, 5,
    )  # fmt: skip
    kept = plan_of(source, speed=Fraction(2), turns="think", scaled_think=False)
    assert "turns: think" in kept.text() and "think time / 2" not in kept.text()
    assert (
        "turns: open; 4 requests of the tape waited for others"
        in plan_of(source, turns="open").text()
    )
    assert "turns:" not in plan_of(make_tape(tmp_path / "u", [row(0, 0, 5)])).text()


# -- runs ---------------------------------------------------------------------------------------


def slow(seen: Seen) -> Sequence[Step]:
    """Each reply takes 360 ms, more than any that was recorded; request 1 gets an error."""
    if seen.path.endswith("/models"):
        return engine_like(seen)
    if len(seen.json.get("prompt", "")) == 21:
        return plain(500, {"error": "no"})
    return streamed(seen, gap_s=0.12)


def replayed(
    tmp_path: Path, rows: list[dict[str, Any]], script: Any = slow, **changes: Any
) -> tuple[RunSummary, Path]:
    source = make_tape(tmp_path / "source.tape", rows)
    with serve(script) as server:
        options = ReplayOptions(source, server.url, tmp_path / "run.tape", **changes)
        summary = run_plan(make_plan(options))
    return summary, source


KEPT = """
WITH source AS (SELECT * FROM requests WHERE run = '{source}'),
  run AS (SELECT * FROM requests WHERE run = '{run}'),
  link AS (SELECT request_id AS child, unnest(parents) AS parent, think_ns FROM source)
SELECT
  count(*), count(*) FILTER (
    child.send_ns < parent.end_ns + coalesce(greatest(link.think_ns, 0), 0) // {speed}
    AND coalesce(link.think_ns, 0) >= 0
  )
FROM link
JOIN run AS child ON child.source_request_id = link.child
JOIN run AS parent ON parent.source_request_id = link.parent
"""


def links_kept(source: Path, run: Path, speed: int = 1) -> tuple[int, int]:
    """(links, those that were not kept) of a run, by its tape alone."""
    query = KEPT.format(source=source.name, run=run.name, speed=speed)
    with connect([open_tape(source), open_tape(run)]) as session:
        found: tuple[int, int] = session.sql(query).fetchall()[0]
    return found


def test_turns_wait_for_slow_replies_and_the_rows_say_what_moved_them(tmp_path: Path) -> None:
    summary, source = replayed(tmp_path, THINKING)
    assert links_kept(source, summary.tape) == (5, 0)
    names = ["source_request_id", "request_id", "parents", "think_ns", "scheduled_ns", "arrival_ns",
             "send_ns", "send_end_ns", "end_ns", "late_cause", "http_status"]  # fmt: skip
    table = open_tape(summary.tape).read(names).to_pylist()
    by = {int.from_bytes(r["source_request_id"].bytes): r for r in table}
    zero = by[0]["arrival_ns"]
    assert [by[n]["scheduled_ns"] - zero for n in range(6)] == [
        at * MS for at in (0, 150, 150, 500, 530, 600)
    ]
    assert by[3]["parents"] == [by[1]["request_id"], by[2]["request_id"]]
    last = max(by[n]["end_ns"] for n in (1, 2))
    assert by[3]["arrival_ns"] == last + 50 * MS and by[3]["think_ns"] == 50 * MS
    assert by[4]["arrival_ns"] == by[3]["arrival_ns"] + 30 * MS  # beside its parent, as recorded
    assert by[1]["http_status"] == 500  # and 3 was sent all the same
    figures = summary.verdict.figures
    assert figures["after_failure"] == 1 and figures["moved_by_predecessor"] >= 3
    for one in (by[n] for n in (2, 3, 4)):  # a lateness of our own is named first
        own = one["send_end_ns"] - one["arrival_ns"] > MS
        assert (one["late_cause"] == "predecessor") != own
    assert figures["session_delay_ns"]["max"] >= by[3]["send_ns"] - by[3]["scheduled_ns"]
    assert "after their planned time, as those before them ended late" in summary.verdict.text()


@pytest.mark.parametrize("status", [429, 503])
def test_a_turn_whose_parent_is_refused_goes_out_a_think_time_after_the_refusal(
    tmp_path: Path, status: int
) -> None:
    """It refuses 0 at once with Retry-After: nothing is tried again, its turn follows."""
    head = f"HTTP/1.1 {status} X\r\nRetry-After: 9\r\nContent-Length: 2\r\n\r\n{{}}".encode()

    def full(seen: Seen) -> Sequence[Step]:
        first = seen.path.endswith("completions") and len(seen.json["prompt"]) == 20
        return [head] if first else engine_like(seen)

    rows = [row(0, 0, 100), row(1, 130, 20, parents=[0], think_ns=30 * MS)]
    summary, source = replayed(tmp_path, rows, full, turns="think")
    assert links_kept(source, summary.tape) == (1, 0)
    parent, child = open_tape(summary.tape).read().to_pylist()
    assert (parent["outcome"], parent["http_status"]) == ("http_error", status)
    assert child["outcome"] == "ok" and child["parents"] == [parent["request_id"]]
    assert child["arrival_ns"] == parent["end_ns"] + 30 * MS
    assert summary.verdict.figures["after_failure"] == 1
    assert "1 sent after one that failed, as if it had not" in summary.verdict.text()


def test_think_sends_before_the_planned_time_where_the_candidate_is_faster(tmp_path: Path) -> None:
    summary, source = replayed(tmp_path, THINKING, engine_like, turns="think")
    assert links_kept(source, summary.tape) == (5, 0)
    moved = open_tape(summary.tape).read(["source_request_id", "scheduled_ns", "arrival_ns"])
    early = {
        int.from_bytes(r["source_request_id"].bytes): r["scheduled_ns"] - r["arrival_ns"]
        for r in moved.to_pylist()
    }
    assert early[0] == early[5] == 0 and early[3] > 100 * MS
    assert summary.verdict.figures["before_planned"] >= 2


def test_a_run_with_turns_can_be_replayed_with_its_turns(tmp_path: Path) -> None:
    summary, _ = replayed(tmp_path, AGENT, engine_like)
    links = read_source(open_tape(summary.tape))[0].links
    assert len(links) == 5 and not links.missing and not links.cycle


def test_a_run_that_is_stopped_counts_those_that_still_wait_as_not_sent(tmp_path: Path) -> None:
    rows = [
        row(0, 0, 5),
        row(1, 10, 5),
        row(2, 3_600_000, 5, parents=[0]),
        row(3, 30, 5, parents=[1]),
    ]

    def endless(seen: Seen) -> Sequence[Step]:
        """Request 0 is answered, 1 never ends: 2 waits for its time, 3 for an end."""
        asked = seen.path.endswith("completions") and seen.json["max_tokens"] > 1
        ends = not asked or len(seen.json["prompt"]) == 20
        return engine_like(seen) if ends else [*streamed(seen)[:2], 60.0]

    def interrupt(_: Progress) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    source = make_tape(tmp_path / "source.tape", rows)
    with serve(endless) as server:
        options = ReplayOptions(source, server.url, tmp_path / "run.tape")
        summary = run_plan(make_plan(options), interrupt)
    signal.signal(signal.SIGINT, before)
    assert (summary.stopped, summary.sent, summary.not_sent) == (True, 2, 2)
    assert summary.outcomes == {"ok": 1, "cut": 1}


@pytest.mark.slow
@pytest.mark.parametrize("turns", ["open", "after"])
def test_four_workers_send_what_one_sends_and_keep_every_dependency(
    tmp_path: Path, turns: Turns
) -> None:
    rows = [
        one
        | {"request_id": (100 * k + n).to_bytes(16), "session_id": f"{one['session_id']}{k}"}
        | {"arrival_ns": one["arrival_ns"] + 37 * MS * k, "end_ns": one["end_ns"] + 37 * MS * k}
        | ({"parents": [(100 * k + int.from_bytes(p)).to_bytes(16) for p in one["parents"]]}
           if "parents" in one else {})
        for k in range(8)
        for n, one in enumerate(THINKING)
    ]  # fmt: skip
    seen = []
    for workers in (1, 4):
        folder = tmp_path / str(workers)
        folder.mkdir()
        summary, source = replayed(folder, rows, engine_like, turns=turns, workers=workers)
        names = ["source_request_id", "scheduled_ns", "arrival_ns", "planned_input_tokens"]
        table = open_tape(summary.tape).read(names).to_pylist()
        zero = min(r["arrival_ns"] for r in table)
        seen.append(
            sorted(
                (r["source_request_id"].bytes, r["planned_input_tokens"], r["scheduled_ns"] - zero)
                for r in table
            )
        )
        if turns == "after":
            assert links_kept(source, summary.tape) == (40, 0)
        else:
            assert all(r["arrival_ns"] == r["scheduled_ns"] for r in table)
    assert seen[0] == seen[1] and len(seen[0]) == 48


PROFILE = """
max_model_tokens = 262144
kv_tokens = 4000000
frontend_ms = 1.0
prefill_tokens_per_s = 4000000.0
step_ms = 0.5
step_ms_per_sequence = 0.0
step_ns_per_kv_token = 0.0
"""


@pytest.mark.slow
@pytest.mark.skipif(not WEKA.exists(), reason=f"{WEKA} is not here")
def test_every_dependency_of_two_real_agents_with_subagents_holds_in_the_run(
    tmp_path: Path,
) -> None:
    files = [WEKA / "trace_0282.json", WEKA / "trace_0047.json"]
    import_trace("weka", files, tmp_path / "weka.tape")
    (tmp_path / "profile.toml").write_text(PROFILE)
    command = [sys.executable, "-m", "tokentape", "engine", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(
        [*command, "--profile", str(tmp_path / "profile.toml")], stderr=subprocess.PIPE, text=True
    ) as engine:
        assert engine.stderr is not None
        url = "http://" + engine.stderr.readline().split("http://", 1)[1].split(";")[0].strip()
        options = ReplayOptions(tmp_path / "weka.tape", url, tmp_path / "run", speed=Fraction(800))
        summary = run_plan(make_plan(options))
        engine.terminate()
    assert summary.outcomes == {"ok": 128}
    assert links_kept(tmp_path / "weka.tape", tmp_path / "run", 800) == (129, 0)
