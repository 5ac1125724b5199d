"""LiteLLM logs: streams have a first content, whole replies have none, secrets stay out."""

import json
from pathlib import Path
from typing import Any

import pytest

from tokentape.traces.errors import TapeError
from tokentape.traces.importers import ImportSummary, import_trace
from tokentape.traces.reader import open_tape

T0_S = 1_759_813_207.123456


def entry(name: str, start_s: float = 0.0, **more: Any) -> dict[str, Any]:
    row = {
        "id": name,
        "trace_id": "t1",
        "call_type": "acompletion",
        "stream": True,
        "status": "success",
        "prompt_tokens": 40,
        "completion_tokens": 9,
        "startTime": T0_S + start_s,
        "completionStartTime": T0_S + start_s + 0.25,
        "endTime": T0_S + start_s + 1.5,
        "model": "openai/gpt-4",
        "model_group": "gpt",
        "messages": [{"role": "user", "content": "secret prompt"}],
        "response": {"choices": ["secret reply"]},
        "end_user": "secret-user",
        "requester_ip_address": "10.9.8.7",
        "metadata": {"user_api_key_hash": "secret-key"},
        "model_parameters": {"max_tokens": 64, "temperature": 0.5, "seed": "x"},
    }
    return row | more


def imported(folder: Path, *rows: dict[str, Any]) -> tuple[ImportSummary, list[dict[str, Any]]]:
    path = folder / "log.jsonl"
    path.write_text("\r\n".join(map(json.dumps, rows)))
    summary = import_trace("litellm", [path], folder / "l.tape", force=True)
    return summary, open_tape(summary.tape).read().to_pylist()


def test_a_stream_has_a_first_content_and_a_whole_reply_has_none(tmp_path: Path) -> None:
    summary, (stream, whole) = imported(tmp_path, entry("a"), entry("b", 1.0, stream=False))
    assert (stream["first_content_ns"], stream["end_ns"]) == (250_000_000, 1_500_000_000)
    assert (stream["event_clock"], stream["operation"]) == ("coroutine", "chat")
    assert (whole["first_content_ns"], whole["event_clock"]) == (None, None)
    assert (stream["model_requested"], stream["model"]) == ("gpt", "openai/gpt-4")
    assert (stream["max_tokens"], stream["temperature"], stream["sampling_seed"]) == (64, 0.5, None)
    assert open_tape(summary.tape).facts["wall_epoch_unix_ns"] == 1_759_813_207_123_456_000


def test_nothing_that_somebody_wrote_and_no_key_reaches_the_tape(tmp_path: Path) -> None:
    summary, _ = imported(tmp_path, entry("a", api_key="secret-key", note="secret words"))
    everything = b"".join(p.read_bytes() for p in summary.tape.rglob("*.*"))
    assert b"secret" not in everything
    assert b"10.9.8.7" not in everything


def test_failures_are_kept_cache_hits_and_repeated_lines_are_counted(tmp_path: Path) -> None:
    error = {"error_code": "429", "error_class": "RateLimitError", "error_message": "secret"}
    failed = entry(
        "b", 1.0, status="failure", error_information=error, prompt_tokens=0, completion_tokens=0
    )
    summary, rows = imported(tmp_path, entry("a"), failed, entry("a"), entry("c", cache_hit=True))
    assert summary.dropped == {"duplicate_id": 1, "answered_by_cache": 1}
    assert [r["outcome"] for r in rows] == ["ok", "http_error"]
    assert (rows[1]["http_status"], rows[1]["error_type"]) == (429, "RateLimitError")
    assert rows[1]["first_content_ns"] is None
    assert rows[1]["input_tokens"] is None, "0 prompt tokens of a failure are not a measured zero"


def test_usage_details_iso_times_and_sessions_are_read(tmp_path: Path) -> None:
    usage = {"prompt_tokens_details": {"cached_tokens": 32}}
    first = entry("a", session_id="s", metadata={"usage_object": usage})
    iso = {"startTime": "2025-10-07T05:00:10.5Z", "endTime": "2025-10-07 05:00:11+00:00"}
    second = entry("b", session_id="s", stream=False) | iso
    _, (one, two) = imported(tmp_path, first, second)
    assert one["cached_tokens"] == 32
    assert (two["parents"], two["turn_index"]) == ([one["request_id"]], 1)
    assert two["end_ns"] - two["arrival_ns"] == 500_000_000


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"id": "x"}, "no column startTime"),
        (entry("x", startTime="yesterday"), 'startTime is "yesterday", not a time with a date'),
        (entry("x", completion_tokens=-1), "completion_tokens is -1, not a whole number"),
        (entry("x", startTime=1e30), "startTime is 1e+30, not a time"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(
    tmp_path: Path, row: dict[str, Any], says: str
) -> None:
    with pytest.raises(TapeError, match="line 2") as raised:
        imported(tmp_path, entry("a"), row)
    assert says in str(raised.value)
