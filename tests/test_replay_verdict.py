"""The verdict: each way in which a run can mislead is found, with its figure."""

import json
from pathlib import Path
from typing import Any

import pytest

from tokentape.replay import measures
from tokentape.replay.health import Health
from tokentape.replay.sender import Sent
from tokentape.replay.verdict import Verdict, judge_run
from tokentape.traces.reader import open_tape
from tokentape.traces.writer import TapeWriter

MS = 1_000_000
ROWS = 400


def health(**changes: Any) -> Health:
    good = {
        "ticks": 400,
        "late_p50_ns": 100_000,
        "late_p99_ns": MS,
        "late_max_ns": 9 * MS,
        "missed_ticks": 0,
        "cpu_share": 0.2,
        "steal_share": 0.0,
    }
    return Health(**(good | changes))


def judged(
    path: Path,
    change: Any = lambda _, row: row,
    *,
    own: Health | None = None,
    stopped: bool = False,
    losses: dict[str, int] | None = None,
    shortest: int = 0,
) -> Verdict:
    """The verdict on a run of 400 requests, one each 10 ms, with TTFT 50 ms."""
    writer = TapeWriter.create(path, role="replay", command=[], options={}, facts={})
    for n in range(ROWS):
        due = n * 10 * MS
        row = {
            "request_id": n.to_bytes(16),
            "scheduled_ns": due,
            "arrival_ns": due,
            "send_ns": due + 100_000,
            "send_end_ns": due + 150_000,
            "first_content_ns": due + 50 * MS,
            "outcome": "ok",
            "stream": True,
            "event_clock": "callback",
            "input_tokens": 100,
            "planned_input_tokens": 100,
            "output_tokens": 10,
            "planned_output_tokens": 10,
            "coalesced_reads": 0,
            "off_us": [50_000 + i for i in range(10)],
        }
        if (changed := change(n, row)) is not None:
            writer.append(changed)
    writer.close()
    sent = Sent(0, ROWS, 100 if stopped else 0, stopped, 8, own or health())
    return judge_run(open_tape(path), sent, shortest_input_tokens=shortest, losses=losses)


def test_a_good_run_is_valid_and_says_its_figures(tmp_path: Path) -> None:
    verdict = judged(tmp_path / "t")
    assert (verdict.level, verdict.reasons) == ("valid", [])
    figures = json.loads(json.dumps(verdict.as_dict()))
    assert figures["schedule_lag_ns"] == {"p50": 100_000, "p99": 100_000, "max": 100_000}
    assert figures["rate"]["achieved_over_offered"] == 1.0
    assert figures["rate"]["offered_per_s"] == 100.0
    assert figures["ttft_from_send_p50_ns"] == 50 * MS - 150_000
    assert figures["outcomes"] == {"ok": ROWS}
    assert figures["output_match"]["matched"] == ROWS
    text = verdict.text()
    assert text.startswith("verdict: valid\n") and "p99 0.10 ms" in text


def late(by_ns: int, since: int = ROWS - 20) -> Any:
    def change(n: int, row: dict[str, Any]) -> dict[str, Any]:
        if n < since:
            return row
        sent = row["send_ns"] + by_ns
        more = {"send_ns": sent, "send_end_ns": sent, "late_cause": "scheduler"}
        return row | more | {"first_content_ns": row["first_content_ns"] + by_ns}

    return change


@pytest.mark.parametrize(
    ("by_ns", "level"), [(3 * MS, "valid"), (9 * MS, "suspect"), (40 * MS, "invalid")]
)
def test_late_sends_are_judged_against_the_ttft_that_they_would_hide_in(
    tmp_path: Path, by_ns: int, level: str
) -> None:
    verdict = judged(tmp_path / "t", late(by_ns))
    assert verdict.level == level
    assert verdict.figures["late_causes"] == {"scheduler": 20}
    if level != "valid":
        assert "schedule lag p99" in verdict.reasons[0]


@pytest.mark.parametrize(
    ("factor", "level"), [(1.005, "valid"), (1.03, "suspect"), (1.2, "invalid")]
)
def test_a_rate_that_was_not_reached_is_said(tmp_path: Path, factor: float, level: str) -> None:
    def slower(_: int, row: dict[str, Any]) -> dict[str, Any]:
        sent = int(row["arrival_ns"] * factor)
        return row | {"send_ns": sent, "send_end_ns": sent, "first_content_ns": sent + 9_000 * MS}

    verdict = judged(tmp_path / "t", slower)
    assert verdict.level == level
    ratio = verdict.figures["rate"]["achieved_over_offered"]
    assert ratio == pytest.approx(1 / factor, abs=1e-4)


def failing(count: int, **columns: Any) -> Any:
    return lambda n, row: row | columns if n < count else row


@pytest.mark.parametrize(
    ("change", "level", "said"),
    [
        (failing(4, outcome="http_error"), "valid", ""),
        (failing(8, outcome="http_error"), "suspect", "2.0 % of the requests failed: 8 http_error"),
        (failing(300, outcome="timeout"), "invalid", "75.0 % of the requests failed: 300 timeout"),
        (failing(40, outcome="cut"), "valid", ""),
        (failing(3, output_tokens=9), "valid", ""),
        (failing(8, output_tokens=9), "suspect", "output tokens: 8 of 400"),
        (failing(80, input_tokens=99), "invalid", "input tokens: 80 of 400"),
        (failing(ROWS, input_tokens=None), "suspect", "input tokens: the candidate counts none"),
        (
            failing(100, coalesced_reads=5),
            "suspect",
            "at least 25.0 % of the events shared a socket read",
        ),
        (failing(1, events_dropped=3), "suspect", "3 pieces of replies were dropped"),
    ],
)
def test_each_fault_in_the_rows_is_named_with_its_figure(
    tmp_path: Path, change: Any, level: str, said: str
) -> None:
    verdict = judged(tmp_path / "t", change)
    assert verdict.level == level, verdict.reasons
    assert said in " ".join(verdict.reasons)


def test_prompts_shorter_than_the_template_are_exceptions_not_misses(tmp_path: Path) -> None:
    short = failing(72, planned_input_tokens=5, input_tokens=12)
    verdict = judged(tmp_path / "t", short, shortest=12)
    assert verdict.level == "valid"
    match = verdict.figures["input_match"]
    assert (match["matched"], match["counted"], match["exceptions"]) == (328, 328, 72)
    assert "72 exceptions" in verdict.text()


@pytest.mark.parametrize(
    ("own", "level", "said"),
    [
        (health(late_p99_ns=6 * MS), "suspect", "event loop was late by 6.00 ms"),
        (health(late_p99_ns=60 * MS), "invalid", "event loop was late by 60.00 ms"),
        (health(steal_share=0.02), "suspect", "hypervisor stole 2.0 %"),
        (health(steal_share=None), "valid", ""),
        (health(ticks=0), "suspect", "the event loop was not watched"),
        (health(cpu_share=0.95), "suspect", "95 % of a core"),
        (health(gc_runs=3, gc_ns=9 * MS), "suspect", "3 garbage collections took 9.00 ms"),
        (health(windows_closed=4), "valid", ""),
        (health(windows_closed=40), "suspect", "full 40 times"),
    ],
)
def test_a_process_that_suffered_is_not_believed(
    tmp_path: Path, own: Health, level: str, said: str
) -> None:
    verdict = judged(tmp_path / "t", own=own)
    assert verdict.level == level
    assert said in " ".join(verdict.reasons)


def test_a_stopped_run_and_lost_rows_are_said(tmp_path: Path) -> None:
    stopped = judged(tmp_path / "a", stopped=True)
    assert stopped.level == "suspect" and "400 of 500 requests were sent" in stopped.reasons[0]
    lost = judged(tmp_path / "b", losses={"rows_dropped": 3})
    assert lost.level == "invalid" and "3 requests are missing" in lost.reasons[0]


def test_a_run_in_which_nothing_was_sent_is_invalid(tmp_path: Path) -> None:
    verdict = judged(tmp_path / "t", lambda *_: None)
    assert verdict.level == "invalid" and "no request was sent" in verdict.reasons[0]
    assert verdict.text().startswith("verdict: invalid")


def test_kernel_stamps_are_believed_when_the_loop_stalled_and_callback_stamps_are_not(
    tmp_path: Path,
) -> None:
    stalled = health(late_p99_ns=15 * MS, stalls=12)
    by_callback = judged(tmp_path / "a", own=stalled)
    assert by_callback.level == "suspect" and "stamps may be as late" in by_callback.reasons[0]
    kernel = failing(ROWS, event_clock="kernel", lag_max_us=900)
    believed = judged(tmp_path / "b", kernel, own=stalled)
    assert believed.level == "valid" and "12 stalls" in believed.text()
    one_missing = failing(ROWS - 1, event_clock="kernel")
    assert judged(tmp_path / "c", one_missing, own=stalled).level == "suspect"
    gone = judged(tmp_path / "d", kernel, own=health(late_p99_ns=60 * MS))
    assert gone.level == "suspect"


@pytest.mark.parametrize(
    ("lag_us", "clock", "shared", "level"),
    [
        (4_000, "callback", 0, "valid"),
        (6_000, "callback", 0, "suspect"),
        (6_000, "kernel", 0, "valid"),  # each event has a read, and so a stamp, of its own
        (6_000, "kernel", 1, "suspect"),
    ],
)
def test_reads_that_waited_half_a_gap_are_suspect_where_stamps_can_be_shared(
    tmp_path: Path, lag_us: int, clock: str, shared: int, level: str
) -> None:
    def streaming(n: int, row: dict[str, Any]) -> dict[str, Any]:
        off_us = [50_000 + 10_000 * i for i in range(10)]
        last = row["first_content_ns"] + 90 * MS
        more = {"off_us": off_us, "last_content_ns": last, "lag_max_us": lag_us}
        return row | more | {"event_clock": clock, "coalesced_reads": shared * (n % 100 == 0)}

    verdict = judged(tmp_path / "t", streaming)
    assert verdict.figures["event_gap_p50_ns"] == 10 * MS
    assert verdict.figures["arrival_lag_ns"]["p99"] == lag_us * 1000
    assert verdict.level == level
    assert f"worst read of each request p50 {lag_us / 1000:.2f} ms" in verdict.text()


def test_a_second_that_fell_behind_does_not_average_out(tmp_path: Path) -> None:
    """A fifth of one second's requests leaves in the next one: 98.7 ms late each at most."""

    def one_slow_second(n: int, row: dict[str, Any]) -> dict[str, Any]:
        if not 180 <= n < 200:
            return row
        sent = 2_000 * MS + (n - 179) * 1000
        return row | {"send_ns": sent, "send_end_ns": sent, "first_content_ns": sent + 9_000 * MS}

    verdict = judged(tmp_path / "t", one_slow_second)
    over = verdict.figures["rate_over_time"]
    assert over["slice_ns"] == 1000 * MS
    assert over["offered"] == [100] * 3 and over["achieved"] == [100, 80, 120]
    assert over["worst"] == {"slice": 1, "ratio": 0.8}
    assert over["most_behind"] == 21  # the twenty, and the one due at that instant
    assert "at 1 s the rate was 80.0 % of the offered one" in " ".join(verdict.reasons)
    assert verdict.figures["rate"]["achieved_over_offered"] == pytest.approx(1, abs=1e-3)


def test_each_cause_of_lateness_has_its_own_spread(tmp_path: Path) -> None:
    def two_causes(n: int, row: dict[str, Any]) -> dict[str, Any]:
        if n >= 3:
            return row
        sent = row["send_ns"] + (n + 2) * MS
        cause = "connection" if n else "scheduler"
        return row | {"send_ns": sent, "send_end_ns": sent + 10, "late_cause": cause}

    figures = judged(tmp_path / "t", two_causes).figures
    assert figures["late_causes"] == {"connection": 2, "scheduler": 1}
    assert figures["lag_by_cause_ns"]["connection"]["max"] == 4 * MS + 100_000
    assert figures["lag_by_cause_ns"]["scheduler"]["max"] == 2 * MS + 100_000


def test_requests_that_waited_for_room_in_their_socket_are_counted(tmp_path: Path) -> None:
    paused = failing(8, send_end_ns=10_000 * MS)
    verdict = judged(tmp_path / "t", paused)
    assert verdict.figures["paused_writes"] == 8
    assert "8 requests waited for room to write" in " ".join(verdict.reasons)


def test_a_wall_clock_that_was_set_is_told_from_one_that_drifts() -> None:
    def anchors(moved_ns: int) -> list[dict[str, int]]:
        later = {"monotonic_ns": 60_000 * MS, "wall_unix_ns": 60_000 * MS + moved_ns}
        return [{"monotonic_ns": 0, "wall_unix_ns": 0}, later]

    assert measures.wall_clock(anchors(20 * MS)) == {"wall_moved_ns": 20 * MS, "wall_stepped_ns": 0}
    stepped = measures.wall_clock(anchors(-100 * MS))
    assert stepped == {"wall_moved_ns": -100 * MS, "wall_stepped_ns": 69 * MS}
    assert measures.wall_clock([]) == {"wall_moved_ns": 0, "wall_stepped_ns": 0}


def test_what_is_judged_of_a_tape_holds_the_number_of_events_and_not_the_events(
    tmp_path: Path,
) -> None:
    writer = TapeWriter.create(tmp_path / "t", role="replay", command=[], options={}, facts={})
    for number, events in enumerate(([], [1, 2, 3], None)):
        writer.append({"request_id": number.to_bytes(16), "arrival_ns": 0, "off_us": events})
        writer.seal()
    writer.close()
    table = measures.read(open_tape(tmp_path / "t"))
    assert "off_us" not in table.column_names
    assert sorted(table["events"].to_pylist(), key=str) == [0, 3, None]
