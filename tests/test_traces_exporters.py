"""Exports: a round trip is the identity on what a format holds; the rest is counted or said."""

import itertools
import json
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pytest

from rows import make_tape, streamed_row
from tokentape.cli import read
from tokentape.traces.errors import TapeError, UsageError
from tokentape.traces.exporters import FORMATS, export_tape
from tokentape.traces.importers import import_trace
from tokentape.traces.reader import Tape, open_tape

DATA = Path(__file__).parents[2] / "shared/data"
SAMPLE = Path(__file__).parents[1] / "src/tokentape/sample/capture.tape"
WHEN = ("arrival_ns", "input_tokens", "output_tokens")
PREFIX = ("block_hashes", "block_tokens", "block_unit", "prefix_partial")


def real(*parts: str) -> Path:
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is not beside this checkout")
    return path


def imported(form: str, path: Path, tape: Path, **options: Any) -> Tape:
    return open_tape(import_trace(form, [path], tape, **options).tape)


def compared(tape: Tape, *columns: str) -> pa.Table:
    return tape.read([*WHEN, *columns])


def waits(tape: Tape) -> list[tuple[int, ...]]:
    """Parents of each row as positions, since a file's digest is in the ids."""
    rows = tape.read(["request_id", "parents"]).to_pylist()
    place = {row["request_id"]: number for number, row in enumerate(rows)}
    return [tuple(sorted(place[parent] for parent in row["parents"] or [])) for row in rows]


def exported(tape: Tape, form: str, out: Path, **options: Any) -> list[dict[str, Any]]:
    done = export_tape(tape, form, out, **options)
    assert done.read == done.written + sum(done.dropped.values())
    return [json.loads(line) for line in out.read_text().splitlines()]


def capture(folder: Path, *rows: dict[str, Any]) -> Tape:
    make_tape(folder / "c.tape", [streamed_row(n, **row) for n, row in enumerate(rows)])
    return open_tape(folder / "c.tape")


# Round trips on the real files


def test_mooncake_comes_back_line_by_line(tmp_path: Path) -> None:
    source = real("mooncake", "conversation_trace.jsonl")
    tape = imported("mooncake", source, tmp_path / "m.tape")
    lines = exported(tape, "mooncake", tmp_path / "m.jsonl")
    assert lines == [json.loads(line) for line in source.read_text().splitlines()]
    again = imported("mooncake", tmp_path / "m.jsonl", tmp_path / "again.tape")
    assert compared(again, *PREFIX, "outcome").equals(compared(tape, *PREFIX, "outcome"))


def test_azure_keeps_its_ms_and_says_what_it_loses(tmp_path: Path) -> None:
    source = real("azure", "AzureLLMInferenceTrace_code.csv")
    tape = imported("azure", source, tmp_path / "a.tape")
    done = export_tape(tape, "mooncake", tmp_path / "a.jsonl")
    assert done.written == 8_819
    assert any("cut down to whole ms" in note for note in done.notes)
    again = imported("mooncake", tmp_path / "a.jsonl", tmp_path / "again.tape")
    first, second = (compared(t).to_pydict() for t in (tape, again))
    assert [ns // 10**6 * 10**6 for ns in first["arrival_ns"]] == second["arrival_ns"]
    assert first["input_tokens"] == second["input_tokens"]
    assert again.read(["block_hashes"])["block_hashes"].null_count == 8_819


def test_weka_comes_back_with_its_subagents(tmp_path: Path) -> None:
    tape = imported("weka", real("weka-agentic"), tmp_path / "w.tape")
    done = export_tape(tape, "weka", tmp_path / "out")
    assert (done.written, len(list((tmp_path / "out").glob("*.json")))) == (307, 12)
    again = imported("weka", tmp_path / "out", tmp_path / "again.tape")
    columns = [*PREFIX, "session_id", "turn_index", "think_ns", "end_ns", "first_content_ns"]
    columns += ["stream", "model_requested", "finish_reason", "extra"]
    keys = [("session_id", "ascending"), ("turn_index", "ascending")]
    first, second = (compared(t, *columns).sort_by(keys) for t in (tape, again))
    for name in first.column_names:
        assert first[name].equals(second[name]), name
    originals = sorted(json.loads(p.read_text())["id"] for p in real("weka-agentic").glob("*.json"))
    files = [json.loads(p.read_text()) for p in (tmp_path / "out").glob("*.json")]
    assert sorted(file["id"] for file in files) == originals
    assert all(file["block_size"] == 64 for file in files)


def test_the_weka_graph_survives_agentic_mooncake(tmp_path: Path) -> None:
    tape = imported("weka", real("weka-agentic", "trace_0282.json"), tmp_path / "w.tape")
    export_tape(tape, "agentic-mooncake", tmp_path / "w.jsonl")
    once = imported("agentic-mooncake", tmp_path / "w.jsonl", tmp_path / "once.tape")
    export_tape(once, "dynamo", tmp_path / "again.jsonl")
    again = imported("agentic-mooncake", tmp_path / "again.jsonl", tmp_path / "again.tape")
    columns = ("session_id", "think_ns", *PREFIX)
    assert compared(once, *columns).equals(compared(again, *columns))
    assert waits(once) == waits(again)
    sizes = [len(some) for some in waits(tape)]
    assert sorted(sizes) == sorted(len(some) for some in waits(once))
    assert sorted(tape.read(["think_ns"])["think_ns"].drop_null().to_pylist()) == sorted(
        once.read(["think_ns"])["think_ns"].drop_null().to_pylist()
    )
    assert once.read(["block_tokens"])["block_tokens"].unique().to_pylist() == [64]


def test_ragpulse_s_sharing_survives_aiperf_s_form(tmp_path: Path) -> None:
    tape = imported("ragpulse", real("ragpulse"), tmp_path / "r.tape")
    lines = exported(tape, "aiperf", tmp_path / "r.jsonl")
    hashes = tape.read(["block_hashes", "input_tokens"]).to_pylist()
    assert all(len(line["hash_ids"]) == -(-line["input_length"] // 64) for line in lines)
    pairs = list(zip(lines, hashes, strict=True))
    known = [line["hash_ids"][: len(row["block_hashes"])] for line, row in pairs]
    names: dict[int, int] = {}
    for row, ids in zip(hashes, known, strict=True):
        for mine, theirs in zip(row["block_hashes"], ids, strict=True):
            assert names.setdefault(mine, theirs) == theirs
    assert len(set(names.values())) == len(names)
    ends = [i for line, ids in zip(lines, known, strict=True) for i in line["hash_ids"][len(ids) :]]
    assert len(set(ends)) == len(ends), "what the tape does not know is shared by none"


def test_bailian_and_otel_survive_their_ways_out(tmp_path: Path) -> None:
    for name in ("code_review_workflow", "parallel_requests"):
        tape = imported("otel", real("otel-inference-perf", f"{name}.json"), tmp_path / f"{name}.t")
        export_tape(tape, "otlp", tmp_path / f"{name}.jsonl")
        again = imported("otel", tmp_path / f"{name}.jsonl", tmp_path / f"{name}2.t")
        columns = ("end_ns", "model_requested", "max_tokens", "temperature", "session_id")
        assert compared(again, *columns).equals(compared(tape, *columns))
        assert waits(again) == waits(tape)
        assert again.facts["wall_epoch_unix_ns"] == tape.facts["wall_epoch_unix_ns"]
    tape = imported("bailian", real("bailian", "schema_sample.jsonl"), tmp_path / "b.tape")
    (line,) = exported(tape, "mooncake", tmp_path / "b.jsonl")
    assert line == {
        "timestamp": 0,
        "input_length": 502,
        "output_length": 1494,
        "hash_ids": list(range(32)),
    }


# What each form says


def test_a_capture_s_keyed_hashes_never_leave_and_keep_what_they_say(tmp_path: Path) -> None:
    blocks: dict[str, Any] = {"block_tokens": 16, "block_unit": "token", "block_scope": "key"}
    rows = [
        blocks | {"block_hashes": [-5, 9 << 50], "input_tokens": 40, "prefix_partial": 8},
        blocks | {"block_hashes": [-5, 7 << 50], "input_tokens": 32, "prefix_partial": 0},
        {"input_tokens": 9},
    ]
    lines = exported(capture(tmp_path, *rows), "mooncake", tmp_path / "c.jsonl")
    assert [line.get("hash_ids") for line in lines] == [[0, 1, 2], [0, 3], None]
    assert [line["timestamp"] for line in lines] == [0, 1, 2]


def test_byte_blocks_go_out_as_about_as_many_tokens_and_that_is_said(tmp_path: Path) -> None:
    blocks = {"block_tokens": 512, "block_unit": "byte", "block_scope": "key"}
    row = blocks | {"block_hashes": [3, 4], "input_tokens": 300, "prefix_partial": 176}
    tape = capture(tmp_path, row)
    done = export_tape(tape, "mooncake", tmp_path / "c.jsonl")
    (line,) = (json.loads(text) for text in (tmp_path / "c.jsonl").read_text().splitlines())
    assert line["hash_ids"] == [0, 1, 2]
    assert "one hash id for 128 tokens" in done.notes
    assert any("approximate" in note for note in done.notes)


def test_rows_that_a_form_cannot_hold_are_counted(tmp_path: Path) -> None:
    tape = capture(
        tmp_path, {}, {"output_tokens": None}, {"operation": "embeddings"}, {"input_tokens": None}
    )
    done = export_tape(tape, "mooncake", tmp_path / "c.jsonl")
    assert (done.read, done.written) == (4, 1)
    assert done.dropped == {"no_value": 2, "no_generation": 1}
    with pytest.raises(TapeError, match="1 rows: no_session"):
        export_tape(tape, "weka", tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_window_counts_from_the_first_arrival(tmp_path: Path) -> None:
    tape = capture(tmp_path, *[{} for _ in range(5)])
    lines = exported(tape, "mooncake", tmp_path / "c.jsonl", window=(1_000_000, 3_000_000))
    assert [line["timestamp"] for line in lines] == [1, 2]
    with pytest.raises(TapeError, match="no rows in this window"):
        export_tape(tape, "mooncake", tmp_path / "d.jsonl", window=(10**12, None))


def test_nothing_is_replaced_unasked_and_no_half_file_is_left(tmp_path: Path) -> None:
    tape = capture(tmp_path, {})
    out = tmp_path / "c.jsonl"
    out.write_text("mine")
    with pytest.raises(TapeError, match="exists; --force replaces it"):
        export_tape(tape, "mooncake", out)
    export_tape(tape, "mooncake", out, force=True)
    assert json.loads(out.read_text())["timestamp"] == 0
    with pytest.raises(UsageError, match="nonsense: unknown export format; known are agentic"):
        export_tape(tape, "nonsense", tmp_path / "x")
    with pytest.raises(TapeError, match="a folder with other things"):
        export_tape(tape, "mooncake", tmp_path, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "c.tape"]


def test_guidellm_gets_seconds_durations_and_small_ids(tmp_path: Path) -> None:
    tape = imported("weka", real("weka-agentic", "trace_0504.json"), tmp_path / "w.tape")
    lines = exported(tape, "guidellm", tmp_path / "w.jsonl")
    assert [line["timestamp"] for line in lines][:2] == [0.0, 13.0]
    assert lines[0]["duration"] == 8.79
    assert all(max(line["hash_ids"]) < 2**31 for line in lines)
    assert all(len(line["hash_ids"]) == -(-line["input_length"] // 64) for line in lines)


def test_csv_holds_every_scalar_that_says_anything(tmp_path: Path) -> None:
    out = tmp_path / "c.csv"
    done = export_tape(open_tape(SAMPLE), "csv", out)
    table = pa_csv.read_csv(out)
    rows = open_tape(SAMPLE).read()
    assert (done.written, table.num_rows) == (rows.num_rows, rows.num_rows)
    pairs = zip(rows["request_id"].to_pylist(), rows["arrival_ns"].to_pylist(), strict=True)
    assert dict(pairs) == {UUID(r["request_id"]): r["arrival_ns"] for r in table.to_pylist()}
    assert "length" in table["finish_reason"].to_pylist()
    filled = {name for name in rows.column_names if rows[name].null_count < rows.num_rows}
    lists = {f.name for f in rows.schema if pa.types.is_list(f.type)} - {"finish_reason"}
    assert set(table.column_names) == filled - lists | (filled & {"parents", "deviations"})


def test_otlp_of_a_capture_names_what_it_saw(tmp_path: Path) -> None:
    tape = open_tape(SAMPLE)
    export_tape(tape, "otlp", tmp_path / "s.jsonl")
    again = imported("otel", tmp_path / "s.jsonl", tmp_path / "s.tape")
    columns = ("model_requested", "stream", "temperature", "reasoning_tokens")
    first, second = (t.read([*WHEN, *columns, "end_ns", "operation"]) for t in (tape, again))
    first = first.filter(pc.is_in(first["operation"], pa.array(["chat", "text_completion"])))
    start = first["arrival_ns"][0].as_py()
    shifted = [None if e is None else e - start for e in first["end_ns"].to_pylist()]
    assert shifted == second["end_ns"].to_pylist()
    for name in (*WHEN[1:], *columns):
        assert first[name].equals(second[name]), name


def test_perfetto_s_slices_lie_inside_their_request_and_never_cross(tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    done = export_tape(open_tape(SAMPLE), "perfetto", out)
    events = json.loads(out.read_text())["traceEvents"]
    slices = [e for e in events if e["ph"] == "X"]
    whole = [e for e in slices if "request_id" in e["args"]]
    assert len(whole) == done.written == open_tape(SAMPLE).rows
    for track in {e["tid"] for e in slices}:
        mine = sorted((e for e in whole if e["tid"] == track), key=lambda e: e["ts"])
        for a, b in itertools.pairwise(mine):
            assert a["ts"] + a["dur"] <= b["ts"] + 1e-6
    for part in (e for e in slices if "request_id" not in e["args"]):
        assert any(
            w["tid"] == part["tid"]
            and w["ts"] - 1e-6 <= part["ts"]
            and part["ts"] + part["dur"] <= w["ts"] + w["dur"] + 1e-3
            for w in whole
        )
    counts = [e["args"]["requests"] for e in events if e["ph"] == "C"]
    assert counts[-1] == 0
    assert max(counts) > 1


def test_perfetto_draws_who_waited_for_whom(tmp_path: Path) -> None:
    tape = imported("weka", real("weka-agentic", "trace_0282.json"), tmp_path / "w.tape")
    export_tape(tape, "perfetto", tmp_path / "w.json")
    events = json.loads((tmp_path / "w.json").read_text())["traceEvents"]
    arrows = sum(e["ph"] == "s" for e in events)
    assert arrows == sum(e["ph"] == "f" for e in events) == sum(map(len, waits(tape)))
    names = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert "trace_0282/agent_001" in names


def test_help_and_the_page_on_formats_name_every_export() -> None:
    text = read.export.__annotations__["form"].__metadata__[0].help
    formats, _, views = text.rstrip(".").partition("; ")
    assert sorted(formats.split(", ")) == sorted(FORMATS)
    assert views.startswith("sql:")  # no format of rows: the views themselves
    page = (Path(__file__).parents[1] / "docs/formats.md").read_text().partition("## Out")[2]
    assert all(f"`{name}`" in page for name in FORMATS)
