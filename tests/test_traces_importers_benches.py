"""Results of vLLM's bench and of AIPerf: streams rebuilt from gaps, tokens only where they fit."""

import json
from pathlib import Path
from typing import Any

import pytest

from tokentape.traces.check import check
from tokentape.traces.errors import TapeError
from tokentape.traces.importers import ImportSummary, import_trace
from tokentape.traces.reader import open_tape

VLLM = {
    "model_id": "llama",
    "start_times": [1000.5, 1000.25, 1001.0],
    "input_lens": [10, 20, 30],
    "output_lens": [3, 5, 0],
    "ttfts": [0.5, 0.25, 0.0],
    "itls": [[0.010001, 0.02], [0.125], []],
    "errors": ["", "", "Connection refused: secret"],
    "generated_texts": ["secret"] * 3,
}


def read(folder: Path, form: str, text: str) -> tuple[ImportSummary, list[dict[str, Any]]]:
    path = folder / "result.json"
    path.write_text(text)
    summary = import_trace(form, [path], folder / "r.tape", force=True)
    return summary, open_tape(summary.tape).read().to_pylist()


def test_a_vllm_result_becomes_streams(tmp_path: Path) -> None:
    summary, (second, first, failed) = read(tmp_path, "vllm-bench", json.dumps(VLLM))
    assert [r["arrival_ns"] for r in (second, first, failed)] == [0, 250_000_000, 750_000_000]
    assert first["off_us"] == [500_000, 510_001, 530_001]
    assert (first["ntok"], first["ntok_source"]) == ([1, 1, 1], "one_per_event")
    assert first["end_ns"] == first["last_content_ns"] == 250_000_000 + 530_001_000
    assert (second["ntok"], second["ntok_source"]) == (None, "events_not_tokens")
    assert (failed["outcome"], failed["off_us"], failed["send_ns"]) == ("http_error", None, None)
    assert {r["event_clock"] for r in (first, second)} == {"coroutine"}
    assert first["model"] == "llama"
    assert [f for f in check(open_tape(summary.tape)) if f.severity == "error"] == []
    assert b"secret" not in b"".join(p.read_bytes() for p in summary.tape.rglob("*.*"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"start_times": [1.0]}, "its lists differ in length"),
        ({"itls": [[0.1], [-1.0], []]}, "request 1: itls is null, not a list of gaps"),
        ({"ttfts": ["a", 0.1, 0.1]}, 'request 0: ttft is "a", not a time'),
    ],
)
def test_a_vllm_result_that_cannot_be_right_is_refused(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(TapeError) as raised:
        read(tmp_path, "vllm-bench", json.dumps(VLLM | change))
    assert says in str(raised.value)


def test_a_vllm_result_without_starts_has_no_arrivals(tmp_path: Path) -> None:
    without = {name: some for name, some in VLLM.items() if name != "start_times"}
    with pytest.raises(TapeError, match="no start_times, so no arrivals; save the result with"):
        read(tmp_path, "vllm-bench", json.dumps(without))


START_NS = 1_759_813_207_532_900_363


def record(offset_ns: int = 0, **metrics: Any) -> dict[str, Any]:
    metadata = {
        "request_start_ns": START_NS + offset_ns,
        "request_ack_ns": START_NS + offset_ns + 90_000_000,
        "request_end_ns": START_NS + offset_ns + 305_864_241,
        "x_correlation_id": "c1",
        "turn_index": 0,
        "benchmark_phase": "profiling",
        "was_cancelled": False,
    }
    whole: dict[str, Any] = {
        "input_sequence_length": {"value": 550, "unit": "tokens"},
        "output_sequence_length": {"value": 3, "unit": "tokens"},
        "time_to_first_token": {"value": 255.5, "unit": "ms"},
        "inter_chunk_latency": {"value": [4.5, 5.25], "unit": "ms"},
    }
    return {"metadata": metadata, "metrics": whole | metrics, "error": None}


def test_aiperf_records_become_streams_without_the_warm_up(tmp_path: Path) -> None:
    warm = record()
    warm["metadata"]["benchmark_phase"] = "warmup"
    error = {"code": 499, "type": "RequestCancellationError", "message": "secret"}
    cancelled = record(10**9)
    cancelled |= {"metrics": {"error_isl": {"value": 550, "unit": "tokens"}}, "error": error}
    cancelled["metadata"]["was_cancelled"] = True
    refused = record(2 * 10**9) | {"metrics": {}, "error": error | {"code": 503, "type": "E"}}
    lines = [warm, record(), cancelled, refused]
    summary, rows = read(tmp_path, "aiperf", "\n".join(map(json.dumps, lines)))
    assert (summary.read, summary.written, summary.dropped) == (4, 3, {"warmup": 1})
    one, two, three = rows
    assert open_tape(summary.tape).facts["wall_epoch_unix_ns"] == START_NS
    assert one["off_us"] == [255_500, 260_000, 265_250]
    assert one["end_ns"] == 305_864_241
    assert (one["session_id"], one["turn_index"], one["input_tokens"]) == ("c1", 0, 550)
    assert (two["outcome"], two["http_status"], two["input_tokens"]) == ("client_abort", None, 550)
    assert (three["outcome"], three["http_status"], three["error_type"]) == ("http_error", 503, "E")
    assert [f for f in check(open_tape(summary.tape)) if f.severity == "error"] == []


def test_an_unknown_unit_is_refused(tmp_path: Path) -> None:
    bad = record(time_to_first_token={"value": 2, "unit": "fortnights"})
    with pytest.raises(TapeError, match="in the unit fortnights, which is not one of ns, us, ms"):
        read(tmp_path, "aiperf", json.dumps(bad))
