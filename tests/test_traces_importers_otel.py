"""OTel GenAI spans: OTLP JSON and inference-perf's form give the same rows, texts only sizes."""

import json
from pathlib import Path
from typing import Any

import pytest

from tokentape.traces.errors import TapeError
from tokentape.traces.importers import ImportSummary, import_trace
from tokentape.traces.reader import open_tape

REAL = Path(__file__).parents[2] / "shared/data/otel-inference-perf"
T0_NS = 1_772_013_600 * 10**9  # 2026-02-25T10:00:00Z


def plain(name: str, start: str, end: str, **attributes: Any) -> dict[str, Any]:
    said = {key.replace("__", "."): value for key, value in attributes.items()}
    said = {"gen_ai.operation.name": "chat"} | said
    return {
        "trace_id": "t1",
        "span_id": name,
        "start_time": f"2026-02-25T10:00:{start}",
        "end_time": f"2026-02-25T10:00:{end}",
        "attributes": said,
        "status": {"code": 1},
    }


def value(one: Any) -> dict[str, Any]:
    if isinstance(one, bool):
        return {"boolValue": one}
    if isinstance(one, int):
        return {"intValue": str(one)}
    if isinstance(one, float):
        return {"doubleValue": one}
    if isinstance(one, list):
        return {"arrayValue": {"values": [value(inner) for inner in one]}}
    return {"stringValue": one}


def otlp(span: dict[str, Any]) -> dict[str, Any]:
    def unix(text: str) -> str:
        seconds, _, digits = text.rsplit(":", maxsplit=1)[-1].partition(".")
        return str(T0_NS + int(seconds) * 10**9 + int(digits.ljust(9, "0") or 0))

    return {
        "traceId": span["trace_id"],
        "spanId": span["span_id"],
        "startTimeUnixNano": unix(span["start_time"]),
        "endTimeUnixNano": unix(span["end_time"]),
        "attributes": [{"key": k, "value": value(v)} for k, v in span["attributes"].items()],
        "status": {"code": "STATUS_CODE_OK"},
    }


def exported(*spans: dict[str, Any]) -> dict[str, Any]:
    return {"resourceSpans": [{"scopeSpans": [{"spans": list(map(otlp, spans))}]}]}


def imported(folder: Path, text: str) -> tuple[ImportSummary, list[dict[str, Any]]]:
    path = folder / "spans.json"
    path.write_text(text)
    summary = import_trace("otel", [path], folder / "o.tape", force=True)
    rows: list[dict[str, Any]] = open_tape(summary.tape).read().to_pylist()
    for row in rows:
        row.pop("request_id")
        row["parents"] = row["parents"] and len(row["parents"])
    return summary, rows


SPANS = [
    plain(
        "a",
        "00.000000001",
        "02.5",
        gen_ai__conversation__id="c1",
        gen_ai__request__model="gpt",
        gen_ai__response__model="gpt-4",
        gen_ai__request__max_tokens=500,
        gen_ai__request__temperature=0.5,
        gen_ai__request__stream=True,
        gen_ai__usage__input_tokens=40,
        gen_ai__usage__output_tokens=9,
        gen_ai__response__finish_reasons=["stop"],
        gen_ai__response__time_to_first_chunk=0.25,
        gen_ai__input__messages="secret prompt",
        gen_ai__output__text="secret reply",
    ),
    plain("b", "05.0", "06.0", gen_ai__conversation__id="c1", error__type="429"),
    plain("tool", "05.5", "05.6", gen_ai__operation__name="execute_tool"),
]


def test_every_form_gives_the_same_rows(tmp_path: Path) -> None:
    _, rows = imported(tmp_path, json.dumps({"trace_id": "t1", "spans": SPANS}, indent=1))
    forms = [
        json.dumps(exported(*SPANS), indent=1),
        json.dumps(exported(*SPANS)),
        "\n".join(json.dumps(exported(span)) for span in SPANS),
    ]
    for text in forms:
        assert imported(tmp_path, text)[1] == rows


def test_what_a_span_says_becomes_columns_and_texts_only_sizes(tmp_path: Path) -> None:
    summary, (first, second) = imported(tmp_path, json.dumps(exported(*SPANS)))
    assert (summary.read, summary.written, summary.dropped) == (3, 2, {"no_inference": 1})
    assert (first["input_tokens"], first["output_tokens"], first["max_tokens"]) == (40, 9, 500)
    assert (first["model_requested"], first["model"]) == ("gpt", "gpt-4")
    assert (first["arrival_ns"], first["end_ns"]) == (0, 2_499_999_999)
    assert (first["first_byte_ns"], first["first_content_ns"]) == (250_000_000, None)
    assert (first["stream"], first["finish_reason"]) == (True, ["stop"])
    assert (first["prompt_bytes"], first["response_bytes"]) == (13, 12)
    assert (second["outcome"], second["http_status"], second["error_type"]) == (
        "http_error",
        429,
        "429",
    )
    assert (second["session_id"], second["turn_index"], second["parents"]) == ("c1", 1, 1)
    assert second["output_tokens"] is None
    assert open_tape(summary.tape).facts["wall_epoch_unix_ns"] == T0_NS + 1
    assert b"secret" not in b"".join(p.read_bytes() for p in summary.tape.rglob("*.*"))


def test_a_span_that_comes_twice_is_counted_once(tmp_path: Path) -> None:
    summary, _ = imported(tmp_path, json.dumps(exported(SPANS[0], SPANS[0])))
    assert (summary.written, summary.dropped) == (1, {"duplicate_id": 1})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"start_time": "25 Feb"}, 'start_time is "25 Feb", not a time with a date'),
        ({"start_time": "2026-02-30T10:00:00"}, "no such time"),
        ({"start_time": "1969-01-01T00:00:00"}, "not a time of this age"),
        ({"attributes": []}, "attributes is [], not an object"),
        ({"startTimeUnixNano": "soon"}, 'startTimeUnixNano is "soon", not unix nanoseconds'),
        (
            {"attributes": {"gen_ai.operation.name": "chat", "gen_ai.usage.input_tokens": -4}},
            "gen_ai.usage.input_tokens is -4, not a whole number",
        ),
    ],
)
def test_a_bad_span_is_named_with_what_is_wrong(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    text = json.dumps({"spans": [SPANS[0], SPANS[1] | change]}, indent=1)
    with pytest.raises(TapeError) as raised:
        imported(tmp_path, text)
    assert "spans[1]" in str(raised.value)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("name", "spans", "waits"),
    [
        ("code_review_workflow", 15, None),
        ("customer_support_escalation", 9, None),
        ("fan_in_dependencies", 4, 2),
        ("multi_agent_research", 12, None),
        ("parallel_requests", 5, None),
    ],
)
def test_the_real_examples_are_imported_whole(
    tmp_path: Path, name: str, spans: int, waits: int | None
) -> None:
    path = REAL / f"{name}.json"
    if not path.exists():
        pytest.skip("the span examples are not beside this checkout")
    summary, rows = imported(tmp_path, path.read_text())
    assert (summary.read, summary.written, summary.dropped) == (spans, spans, {})
    assert all(row["prompt_bytes"] and row["max_tokens"] and row["end_ns"] for row in rows)
    if waits:
        assert rows[-1]["parents"] == waits, (
            "for the two that ran side by side, which waited for the first"
        )
