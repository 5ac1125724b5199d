"""`check` proves each invariant, and names file, row and request of the first violation."""

import json
from array import array
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rows import make_tape, streamed_row
from tokentape.traces.check import Finding, check
from tokentape.traces.importers import import_trace
from tokentape.traces.reader import open_tape

NS = 1_000_000


def found(tape: Path) -> list[Finding]:
    return check(open_tape(tape, skip_damaged=True))


def bad_third_row(folder: Path, **columns: Any) -> tuple[list[Finding], Path, UUID]:
    rows = [streamed_row(n) for n in range(5)]
    rows[2] |= columns
    tape = make_tape(folder / "t.tape", rows)
    (segment,) = (tape / "requests").glob("**/*.parquet")
    third = pq.read_table(segment, columns=["request_id"])["request_id"][2].as_py()
    return found(tape), segment, third


def u32(*values: int) -> array[int]:
    return array("I", values)


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"send_ns": NS}, "send_ns precedes arrival_ns"),
        ({"end_ns": 4 * NS}, "end_ns precedes last_content_ns"),
        ({"input_tokens": -1}, "input_tokens is negative"),
        ({"server_queue_ns": -5}, "server_queue_ns is negative"),
        ({"cached_tokens": 11}, "cached_tokens is more than input_tokens"),
        ({"reasoning_tokens": 4}, "reasoning_tokens is more than output_tokens"),
        ({"outcome": "fine"}, "outcome is none of ok, http_error"),
        ({"event_clock": "sundial"}, "event_clock is none of kernel"),
        ({"block_unit": "page"}, "block_unit is none of token, byte"),
        ({"ntok": array("H", [3])}, "ntok and off_us differ in length"),
        ({"cls": bytes([0, 9, 0])}, "cls is of no known class"),
        ({"off_us": u32(3000, 2000, 4000)}, "off_us decreases"),
        ({"aux_off_us": u32(5, 4), "aux_cls": bytes(2)}, "aux_off_us decreases"),
        ({"aux_off_us": u32(5), "aux_cls": bytes(2)}, "aux_cls and aux_off_us differ"),
        ({"send_ns": None}, "events without send_ns"),
        ({"output_tokens": 4}, "the sum of ntok is not output_tokens"),
        ({"block_hashes": [1]}, "block_hashes without block_tokens"),
        (
            {"block_hashes": [1, 2, 3], "block_tokens": 5, "block_unit": "token"},
            "block_hashes stand for more than input_tokens",
        ),
    ],
)
def test_a_broken_rule_is_named_with_the_row(
    tmp_path: Path, columns: dict[str, Any], what: str
) -> None:
    findings, segment, third = bad_third_row(tmp_path, **columns)
    assert findings
    assert {f.severity for f in findings} == {"error"}
    assert any(f.what.startswith(what) for f in findings)
    assert {(f.where, f.count) for f in findings} == {(f"{segment}, row 2 ({third})", 1)}


def test_counts_go_over_batches_and_the_first_row_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokentape.traces.check.BATCH_ROWS", 2)
    rows = [streamed_row(n, input_tokens=-1 if n % 2 else 5) for n in range(7)]
    (finding,) = found(make_tape(tmp_path / "t.tape", rows))
    assert (finding.what, finding.count) == ("input_tokens is negative", 3)
    assert ", row 1 (" in finding.where


def test_a_sound_tape_says_nothing(tmp_path: Path) -> None:
    first, second = streamed_row(0), streamed_row(9)
    second["parents"] = [first["request_id"]]
    second |= {"block_hashes": [1, 2], "block_tokens": 5, "block_unit": "token"}
    second |= {"cached_tokens": 10, "reasoning_tokens": 3, "aux_off_us": u32(1), "aux_cls": b"\x03"}
    assert found(make_tape(tmp_path / "t.tape", [first, second])) == []


def test_ids_that_come_twice_are_named(tmp_path: Path) -> None:
    rows = [streamed_row(0), streamed_row(1), streamed_row(2)]
    rows[2]["request_id"] = rows[0]["request_id"]
    (finding,) = found(make_tape(tmp_path / "t.tape", rows))
    assert (finding.severity, finding.what, finding.count) == (
        "error",
        "request_id is not unique",
        1,
    )
    assert ", row 0 (" in finding.where


def test_parents_that_are_missing_or_late_are_named(tmp_path: Path) -> None:
    rows = [streamed_row(n) for n in range(3)]
    rows[0]["parents"] = [rows[2]["request_id"]]
    rows[1]["parents"] = [uuid4().bytes]
    late, lost = found(make_tape(tmp_path / "t.tape", rows))
    assert (late.severity, lost.severity) == ("error", "warning")
    assert late.what == "a parent arrives after the request that waited for it"
    assert lost.what == "a parent is not on this tape"
    assert ", row 0 (" in late.where
    assert ", row 1 (" in lost.where


def test_a_row_that_waits_for_itself_is_an_error(tmp_path: Path) -> None:
    row = streamed_row()
    row["parents"] = [row["request_id"]]
    (finding,) = found(make_tape(tmp_path / "t.tape", [row]))
    assert finding.severity == "error"


def test_what_the_privacy_mode_forbids_is_an_error(tmp_path: Path) -> None:
    rows = [streamed_row(0, response_id="r1"), streamed_row(1)]
    (finding,) = found(make_tape(tmp_path / "t.tape", rows, content="none"))
    assert (finding.what, finding.count) == ("response_id is written though content is none", 1)


def test_an_import_whose_counts_do_not_add_up_is_an_error(tmp_path: Path) -> None:
    trace = tmp_path / "a.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,4808,10\n")
    tape = import_trace("azure", [trace], tmp_path / "a.tape").tape
    assert found(tape) == []
    facts = json.loads((tape / "tape.json").read_text())
    facts["source"]["read"] = 3
    (tape / "tape.json").write_text(json.dumps(facts))
    (finding,) = found(tape)
    assert (finding.what, finding.count) == (
        "rows of the trace are neither written nor counted as dropped",
        2,
    )


def test_a_column_of_another_type_is_named_and_the_rest_is_checked(tmp_path: Path) -> None:
    tape = make_tape(tmp_path / "t.tape", [streamed_row(0), streamed_row(1, max_tokens=-1)])
    (segment,) = (tape / "requests").glob("**/*.parquet")
    table = pq.read_table(segment)
    at = table.schema.get_field_index("input_tokens")
    table = table.set_column(at, "input_tokens", table["input_tokens"].cast(pa.string()))
    pq.write_table(table, segment)
    whats = sorted(f.what for f in found(tape))
    assert whats == ["input_tokens is of type string", "max_tokens is negative"]
