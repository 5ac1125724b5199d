"""Dynamo's request traces and its agentic Mooncake form: server times, sessions, graphs."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tokentape.traces.errors import TapeError
from tokentape.traces.importers import ImportSummary, import_trace
from tokentape.traces.reader import open_tape

T0_MS = 1_759_813_207_000


def end(name: str, t_ms: int, total_ms: float = 100.0, **more: Any) -> dict[str, Any]:
    context = more.pop("agent_context", None)
    request = {"request_id": name, "input_tokens": 40, "output_tokens": 8}
    request |= {"request_received_ms": T0_MS + t_ms, "total_time_ms": total_ms} | more
    event: dict[str, Any] = {"schema": "dynamo.request.trace.v1", "event_type": "request_end"}
    event |= {"event_time_unix_ms": T0_MS, "request": request}
    return event | ({"agent_context": context} if context else {})


def imported(
    folder: Path, *lines: Any, form: str = "dynamo"
) -> tuple[ImportSummary, list[dict[str, Any]]]:
    path = folder / "trace.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps(line) for line in lines).encode()))
    summary = import_trace(form, [path], folder / "d.tape", force=True)
    return summary, open_tape(summary.tape).read().to_pylist()


def test_what_dynamo_measured_is_kept_as_the_server_s_word(tmp_path: Path) -> None:
    line = end(
        "r1",
        0,
        1234.5,
        model="m",
        cached_tokens=16,
        prefill_wait_time_ms=1.25,
        prefill_time_ms=20.5,
        ttft_ms=21.75,
        avg_itl_ms=5.5,
        queue_depth=3,
        worker={"prefill_worker_id": 7, "decode_worker_id": 2**63},
        finish_reason_metadata={"finish_reason": "stop"},
    )
    with pytest.raises(TapeError, match="decode_worker_id is 9223372036854775808"):
        imported(tmp_path, line)
    line["request"]["worker"]["decode_worker_id"] = 9
    summary, (row,) = imported(tmp_path, {"timestamp": 3, "event": line})
    assert (row["first_content_ns"], row["end_ns"]) == (21_750_000, 1_234_500_000)
    assert (row["server_queue_ns"], row["server_prefill_ns"]) == (1_250_000, 20_500_000)
    assert row["server_timing_source"] == "dynamo"
    assert (row["cached_tokens"], row["model"], row["server_id"]) == (16, "m", "7/9")
    assert row["finish_reason"] == ["stop"]
    assert json.loads(row["extra"]) == {"avg_itl_ms": 5.5, "queue_depth": 3}
    assert open_tape(summary.tape).facts["wall_epoch_unix_ns"] == T0_MS * 10**6


def test_other_events_are_counted_and_never_read(tmp_path: Path) -> None:
    tool = {"schema": "dynamo.request.trace.v1", "event_type": "tool_end", "tool": {}}
    payload = tool | {"event_type": "request_payload", "payload": {"request": "secret"}}
    summary, rows = imported(
        tmp_path, end("a", 0), tool, payload, {"verification": "uploader"}, end("a", 5)
    )
    assert summary.dropped == {"tool_event": 1, "payload": 1, "no_record": 1, "duplicate_id": 1}
    assert (summary.read, len(rows)) == (5, 1)
    assert b"secret" not in b"".join(p.read_bytes() for p in summary.tape.rglob("*.*"))


def test_a_row_keeps_blocks_of_either_rule_and_64_bit_hashes(tmp_path: Path) -> None:
    def replay(*hashes: int) -> dict[str, Any]:
        return {"trace_block_size": 16, "input_length": 40, "input_sequence_hashes": list(hashes)}

    _, rows = imported(
        tmp_path,
        end("floor", 0, replay=replay(2**64 - 1, 5)),
        end("ceil", 1, replay=replay(1, 2, 3)),
        end("neither", 2, replay=replay(1)),
    )
    assert [row["block_hashes"] for row in rows] == [[-1, 5], [1, 2, 3], None]
    assert [row["prefix_partial"] for row in rows] == [8, 8, None]
    assert [row["block_tokens"] for row in rows] == [16, 16, None]


def test_sessions_link_by_time_and_subagents_to_who_started_them(tmp_path: Path) -> None:
    main = {"session_id": "main"}
    sub = {"session_id": "sub", "parent_trajectory_id": "main"}
    _, (first, started, last) = imported(
        tmp_path,
        end("sub-1", 200, 50, agent_context=sub),
        end("main-1", 0, 100, agent_context=main),
        end("main-2", 400, 100, agent_context=main),
    )
    assert [r["response_id"] for r in (first, started, last)] == ["main-1", "sub-1", "main-2"]
    assert started["parents"] == last["parents"] == [first["request_id"]]
    assert (started["session_id"], started["turn_index"]) == ("sub", 0)
    assert last["think_ns"] == 300_000_000


def graph(name: str, *waits: str, t: float | None = None, **more: Any) -> dict[str, Any]:
    row = {"request_id": name, "session_id": "s", "input_length": 100, "output_length": 3}
    row |= {"hash_ids": [1, 2], "wait_for": list(waits)} | more
    return row | ({"timestamp": t} if t is not None else {})


def test_a_row_that_waits_comes_at_the_earliest_and_thinks_exactly(tmp_path: Path) -> None:
    summary, (root, left, right, join) = imported(
        tmp_path,
        graph("root", t=1000.5),
        graph("left", "root", delay=10.0),
        graph("right", "root", tool_wait_ms=20.25, delay=1.0),
        graph("join", "left", "right", delay=5.0),
        form="agentic-mooncake",
    )
    assert [r["arrival_ns"] for r in (root, left, right, join)] == [
        0,
        10_000_000,
        21_250_000,
        26_250_000,
    ]
    assert join["parents"] == [left["request_id"], right["request_id"]]
    assert [r["think_ns"] for r in (root, left, right)] == [None, 10_000_000, 21_250_000]
    assert [r["turn_index"] for r in (root, left, right, join)] == [0, 1, 2, 3]
    assert root["block_tokens"] == 64, "the one power of two that 2 blocks for 100 tokens allow"
    assert "earliest" in open_tape(summary.tape).facts["source"]["arrivals"]


@pytest.mark.parametrize(
    "lines",
    [
        (graph("a", "b"), graph("b", "a")),
        (graph("a", "a"),),
        (graph("a", t=0.0), graph("b", "lost")),
    ],
)
def test_a_circle_or_a_missing_parent_is_refused(tmp_path: Path, lines: tuple[Any, ...]) -> None:
    with pytest.raises(TapeError, match="a circle, or a row that is missing"):
        imported(tmp_path, *lines, form="agentic-mooncake")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"schema": "dynamo.request.trace.v2"}, "not dynamo.request.trace.v1"),
        (end("a", 0) | {"event_type": "request_begin"}, 'event_type is "request_begin"'),
        (end("a", 0, ttft_ms=-1.0), "ttft_ms is -1.0, not a time"),
        (end("a", 0, input_tokens=2**31), "input_tokens is 2147483648"),
        (end("a", 0, replay=[1]), "replay is [1], not an object"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(tmp_path: Path, line: Any, says: str) -> None:
    with pytest.raises(TapeError, match="line 2") as raised:
        imported(tmp_path, end("good", 0), line)
    assert says in str(raised.value)
