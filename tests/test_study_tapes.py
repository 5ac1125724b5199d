"""Loads captured before, and replayed to, a real vLLM: the tapes of docs/study-h100.md."""

from pathlib import Path

import pytest

import tokentape
from tokentape.traces.check import check
from tokentape.traces.reader import open_tape

FOLDER = Path(__file__).parent / "data" / "study"
CAPTURE, RUN = FOLDER / "capture-turns.tape", FOLDER / "run-turns-1.tape"
ONE_GPU, TWO_GPUS = FOLDER / "run-step-1.tape", FOLDER / "run-step-tp2.tape"


@pytest.mark.parametrize("path", [CAPTURE, RUN, ONE_GPU, TWO_GPUS], ids=lambda path: path.stem)
def test_the_tapes_are_sound(path: Path) -> None:
    assert check(open_tape(path)) == []


def test_the_tape_of_the_replay_counts_what_the_engine_counted() -> None:
    counted = dict(
        tokentape.open(RUN)
        .sql("select name, sum(increase)::BIGINT from counters group by name")
        .fetchall()
    )
    rows = open_tape(RUN).read(["input_tokens", "output_tokens"]).to_pylist()
    assert counted["vllm:request_success_total"] == len(rows) == 224
    assert counted["vllm:prompt_tokens_total"] == sum(r["input_tokens"] for r in rows)
    assert counted["vllm:generation_tokens_total"] == sum(r["output_tokens"] for r in rows)


@pytest.mark.parametrize("path", [ONE_GPU, TWO_GPUS], ids=lambda path: path.stem)
def test_queue_and_prefill_together_are_the_engines_where_requests_wait_for_a_seat(
    path: Path,
) -> None:
    """What is queue and what prefill is not told apart there (docs/study-h100.md)."""
    rows = tokentape.open(path).sql("select phase, tape_s, server_s from calibration_phases")
    tape_s, server_s = ({phase: row[n] for phase, *row in rows.fetchall()} for n in (0, 1))
    assert tape_s["decode"] == pytest.approx(server_s["decode"], rel=0.01)
    before = [seconds["queue"] + seconds["prefill"] for seconds in (tape_s, server_s)]
    assert before[0] == pytest.approx(before[1], rel=0.2)


def test_sessions_were_found_in_the_capture_and_every_turn_waited_in_the_replay() -> None:
    captured = open_tape(CAPTURE).read(["session_id", "session_source", "parents"]).to_pylist()
    told = [row for row in captured if row["session_id"]]
    assert len({row["session_id"] for row in told}) == 69
    assert {row["session_source"] for row in told} == {"header"}
    columns = ["request_id", "source_request_id", "parents", "arrival_ns", "end_ns", "think_ns"]
    rows = {row["request_id"]: row for row in open_tape(RUN).read(columns).to_pylist()}
    waiting = [row for row in rows.values() if row["parents"]]
    assert len(waiting) == sum(bool(row["parents"]) for row in captured) == 153
    for row in waiting:
        ends = [rows[parent]["end_ns"] for parent in row["parents"]]
        assert row["think_ns"] == row["arrival_ns"] - max(ends) > 0


@pytest.mark.parametrize("tape", [CAPTURE, RUN], ids=["capture", "run"])
def test_the_phases_are_the_engines_though_it_does_not_tell_what_it_had_cached(tape: Path) -> None:
    rows = tokentape.open(tape).sql(
        "select phase, tape_s, tape_lo_s, tape_hi_s, server_s from calibration_phases"
    )
    found = {phase: values for phase, *values in rows.fetchall()}
    tape_s, _, _, server_s = found["decode"]
    assert tape_s == pytest.approx(server_s, rel=0.01)
    tape_s, _, _, server_s = found["prefill"]
    assert tape_s == pytest.approx(server_s, rel=0.2)
    _, lo_s, hi_s, server_s = found["queue"]
    assert lo_s <= server_s <= hi_s


def test_the_replay_reproduces_the_captured_latency() -> None:
    medians = [
        tokentape.open(path).sql("select median(tpot_ns) from tpot").fetchall()[0][0]
        for path in (CAPTURE, RUN)
    ]
    assert medians[1] == pytest.approx(medians[0], rel=0.02)
