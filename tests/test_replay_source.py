"""A tape as a source: nothing left out without a reason, nothing guessed without a count."""

from pathlib import Path
from typing import Any

import pytest

from tokentape.replay.schedule import ScheduleOptions, make_schedule
from tokentape.replay.source import read_source
from tokentape.traces.errors import TapeError
from tokentape.traces.reader import open_tape
from tokentape.traces.writer import TapeWriter

SECOND = 1_000_000_000


def tape(path: Path, rows: list[dict[str, Any]]) -> Path:
    writer = TapeWriter.create(path, role="capture", command=[], options={}, facts={})
    for number, row in enumerate(rows):
        known = {"request_id": number.to_bytes(16), "arrival_ns": number * SECOND, "outcome": "ok"}
        writer.append(known | {"input_tokens": 10, "output_tokens": 5} | row)
    writer.close()
    return path


def left_out(path: Path, *, include_failed: bool = False) -> dict[str, list[int]]:
    _, offered = read_source(open_tape(path), include_failed=include_failed)
    plan = make_schedule(offered, ScheduleOptions())
    return {reason: rows.tolist() for reason, rows in plan.left_out.items()}


def test_what_never_reached_an_engine_is_left_out_with_its_reason(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {},
        {"outcome": "http_error", "http_status": 429, "output_tokens": None},
        {"outcome": "http_error", "http_status": 503, "output_tokens": 0},
        {"outcome": "http_error", "http_status": 500, "output_tokens": 3},
        {"outcome": "connect_error", "output_tokens": None},
        {"outcome": "client_abort", "output_tokens": 2},
        {"outcome": "ok", "output_tokens": None},
        {"operation": "embeddings"},
        {"operation": "chat"},
        {"outcome": None, "output_tokens": 0},
    ]
    path = tape(tmp_path / "t", rows)
    assert left_out(path) == {
        "operation embeddings": [7],
        "never reached an engine (connect_error)": [4],
        "never reached an engine (http_error 429)": [1],
        "never reached an engine (http_error 503)": [2],
        "has no output token count": [6],
    }
    assert left_out(path, include_failed=True) == {"operation embeddings": [7]}


def test_a_refusal_in_a_run_is_no_request_for_what_had_been_planned(tmp_path: Path) -> None:
    refused = {"outcome": "http_error", "http_status": 429, "output_tokens": None}
    path = tape(tmp_path / "t", [refused | {"planned_output_tokens": 50}, {}])
    assert left_out(path) == {"never reached an engine (http_error 429)": [0]}


def test_aborted_requests_keep_what_they_had_and_failed_ones_get_their_limit(
    tmp_path: Path,
) -> None:
    failed = {"outcome": "http_error", "http_status": 429, "output_tokens": None}
    rows: list[dict[str, Any]] = [
        {"outcome": "client_abort", "output_tokens": 2},
        {"outcome": "timeout", "output_tokens": None},
        failed | {"max_tokens": 77},
        failed,
        {"output_tokens": 9},
        {"output_tokens": None, "planned_output_tokens": 4},
    ]
    source, _ = read_source(open_tape(tape(tmp_path / "t", rows)), include_failed=True)
    assert source.output_tokens.tolist() == [2, 0, 77, 4, 9, 4]
    assert source.guessed == {"output tokens of failed requests guessed": 2}


def test_missing_prompt_lengths_are_guessed_by_the_tapes_own_ratio_and_counted(
    tmp_path: Path,
) -> None:
    rows: list[dict[str, Any]] = [
        {"input_tokens": 100, "prompt_bytes": 500},
        {"input_tokens": None, "prompt_bytes": 50},
        {"input_tokens": None, "prompt_bytes": 500, "planned_input_tokens": 7},
        {"input_tokens": None},
    ]
    source, _ = read_source(open_tape(tape(tmp_path / "t", rows)))
    assert source.input_tokens.tolist() == [100, 10, 7, 1]
    assert source.guessed == {"prompt tokens guessed from bytes (5.0 per token)": 2}


def test_blocks_come_with_their_size_and_their_scope(tmp_path: Path) -> None:
    block = {"block_tokens": 4, "block_unit": "token", "prefix_partial": 2}
    rows: list[dict[str, Any]] = [
        block | {"block_hashes": [1, -2], "block_scope": "tape"},
        block | {"block_hashes": [1], "block_scope": "session", "session_id": "s"},
        block | {"block_hashes": [], "block_scope": "tape"},
        {},
    ]
    source, _ = read_source(open_tape(tape(tmp_path / "t", rows)))
    assert source.rows.blocks(0).hashes.tolist() == [1, -2]
    assert (source.rows.blocks(0).block_tokens, source.rows.blocks(0).namespace) == (4, "")
    assert source.rows.blocks(1).namespace == "s"
    assert len(source.rows.blocks(2).hashes) == len(source.rows.blocks(3).hashes) == 0
    assert source.rows.columns(0)["block_hashes"] == [1, -2]
    assert source.rows.columns(1)["session_id"] == "s" and source.rows.columns(3) == {}
    assert not source.approximate_blocks


def test_byte_blocks_become_token_blocks_of_one_length_for_the_whole_tape(tmp_path: Path) -> None:
    def row(tokens: int, blocks: int, rest: int) -> dict[str, Any]:
        return {
            "block_tokens": 512,
            "block_unit": "byte",
            "block_scope": "key",
            "block_hashes": list(range(blocks)),
            "prefix_partial": rest,
            "input_tokens": tokens,
        }

    source, _ = read_source(open_tape(tape(tmp_path / "t", [row(130, 1, 8), row(250, 1, 488)])))
    assert source.approximate_blocks
    assert source.rows.bytes_per_token == 4.0
    assert source.rows.blocks(0).block_tokens == source.rows.blocks(1).block_tokens == 128


def test_durations_are_recorded_ones_where_there_are_any(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"end_ns": 3 * SECOND}, {"output_tokens": 100}]
    _, offered = read_source(open_tape(tape(tmp_path / "t", rows)))
    assert offered.duration_ns.tolist() == [3 * SECOND, SECOND // 2 + 2 * SECOND]


def test_sessions_and_dependent_requests_are_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"session_id": "a"},
        {"session_id": "a", "parents": [bytes(16)]},
        {"session_id": "b", "parents": []},
        {},
    ]
    source, _ = read_source(open_tape(tape(tmp_path / "t", rows)))
    assert source.links.child.tolist() == [1] and source.links.missing == 0
    assert source.sessions[0] == source.sessions[1] != source.sessions[2]
    assert source.sessions[3] == -1


def test_rows_in_any_order_are_read_by_arrival_and_a_plan_time_stands_in_for_it(
    tmp_path: Path,
) -> None:
    rows: list[dict[str, Any]] = [
        {"arrival_ns": 9 * SECOND, "input_tokens": 1},
        {"arrival_ns": 4 * SECOND, "input_tokens": 2},
        {"arrival_ns": None, "scheduled_ns": 7 * SECOND, "input_tokens": 3},
    ]
    source, offered = read_source(open_tape(tape(tmp_path / "t", rows)))
    plan = make_schedule(offered, ScheduleOptions())
    assert source.input_tokens[plan.source_index].tolist() == [2, 3, 1]
    assert plan.due_ns.tolist() == [0, 3 * SECOND, 5 * SECOND]
    assert source.stream.all() and not source.apis.any()  # completions: nothing else is told


def test_an_empty_tape_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(TapeError, match="holds no request"):
        read_source(open_tape(tape(tmp_path / "t", [])))
