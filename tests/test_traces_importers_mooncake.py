"""Mooncake traces: block hashes as they are, the ceil rule, and how coarse the arrivals are."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokentape.traces.errors import TapeError
from tokentape.traces.importers import import_trace, mooncake, reading
from tokentape.traces.importers.rows import survey
from tokentape.traces.reader import open_tape

CONVERSATION = Path(__file__).parents[2] / "shared/data/mooncake/conversation_trace.jsonl"
PREFIX = ("block_tokens", "block_unit", "block_scope", "prefix_partial", "block_hashes")


def record(t_ms: int = 0, n_in: int = 600, n_out: int = 5, **more: Any) -> dict[str, Any]:
    row = {"timestamp": t_ms, "input_length": n_in, "output_length": n_out}
    return row | {"hash_ids": list(range(-(-n_in // 512)))} | more


def trace(folder: Path, *rows: dict[str, Any] | str, end: str = "\n") -> Path:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + end)
    return path


def imported(folder: Path, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    summary = import_trace("mooncake", [trace(folder, *rows)], folder / "m.tape", force=True)
    found: list[dict[str, Any]] = open_tape(summary.tape).read().to_pylist()
    return found


def refusal(path: Path) -> str:
    with pytest.raises(TapeError) as raised:
        list(mooncake.read_batches(path))
    return str(raised.value)


def test_hashes_are_kept_and_the_last_one_stands_for_the_part_block(tmp_path: Path) -> None:
    part, full = imported(tmp_path, record(n_in=600), record(n_in=1024, hash_ids=[0, 9]))
    assert [part[name] for name in PREFIX] == [512, "token", "trace", 88, [0, 1]]
    assert [full[name] for name in PREFIX] == [512, "token", "trace", 0, [0, 9]]


def test_hashes_that_break_the_ceil_rule_are_not_kept(tmp_path: Path) -> None:
    rows = imported(tmp_path, record(n_in=600, hash_ids=[1]), record(n_in=600, hash_ids=None))
    assert [[row[name] for name in PREFIX] for row in rows] == [[None] * 5] * 2
    (file,) = open_tape(tmp_path / "m.tape").facts["source"]["files"]
    assert file["rows_without_prefix"] == 2


def test_unsigned_hash_ids_keep_their_64_bits(tmp_path: Path) -> None:
    (row,) = imported(tmp_path, record(n_in=1024, hash_ids=[2**64 - 1, 2**63]))
    assert row["block_hashes"] == [-1, -(2**63)]


def test_times_are_ms_and_the_first_is_the_epoch(tmp_path: Path) -> None:
    rows = imported(tmp_path, record(8_000), record(5_001), record(5_000), record(5_001, n_in=9))
    assert [row["arrival_ns"] for row in rows] == [0, 1_000_000, 1_000_000, 3_000_000_000]
    assert [row["scheduled_ns"] for row in rows] == [row["arrival_ns"] for row in rows]
    assert [row["input_tokens"] for row in rows] == [600, 600, 9, 600], "ties keep the file's order"
    facts = open_tape(tmp_path / "m.tape").facts
    assert facts["wall_epoch_unix_ns"] == 5_000_000_000
    assert facts["source"]["wall_epoch_known"] is False
    assert facts["arrival_resolution_ns"] == 1_000_000


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 10**9), min_size=1), st.integers(1, 7))
def test_what_a_survey_finds_does_not_depend_on_the_batches(
    tmp_path_factory: pytest.TempPathFactory, times_ms: list[int], batch_rows: int
) -> None:
    times_ms.sort()
    path = trace(tmp_path_factory.mktemp("mooncake"), *(record(t, n_in=1) for t in times_ms))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK_BYTES", 80 * batch_rows)
        found = survey(path, mooncake.FORMAT, mooncake.read_batches)
    distinct = sorted(set(times_ms))
    gaps = [b - a for a, b in itertools.pairwise(distinct)]
    assert found.rows == len(times_ms)
    assert found.distinct == len(distinct)
    assert found.resolution_ns == (min(gaps) * 1_000_000 if gaps else None)
    assert (found.first_ns, found.last_ns) == (distinct[0] * 10**6, distinct[-1] * 10**6)


def test_distinct_arrivals_of_a_disordered_file_are_not_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 160)
    found = survey(
        trace(tmp_path, *map(record, (5, 9, 5, 0))), mooncake.FORMAT, mooncake.read_batches
    )
    assert found.distinct is None
    assert (found.first_ns, found.last_ns) == (0, 9_000_000)


def test_unknown_keys_are_kept_as_scalars_and_long_text_only_as_its_size(tmp_path: Path) -> None:
    (row,) = imported(
        tmp_path, record(session_id="s-1", delay=2.5, text_input="x" * 65, messages=[{"a": 1}])
    )
    assert json.loads(row["extra"]) == {
        "session_id": "s-1",
        "delay": 2.5,
        "text_input_json_bytes": 67,
        "messages_json_bytes": 10,
    }
    assert row["session_id"] is None


def test_null_values_drop_the_row_and_are_counted(tmp_path: Path) -> None:
    path = trace(tmp_path, record(), record() | {"timestamp": None}, "", record(n_out=0))
    summary = import_trace("mooncake", [path], tmp_path / "m.tape")
    assert (summary.read, summary.written, summary.dropped) == (3, 2, {"no_value": 1})
    assert open_tape(summary.tape).read()["outcome"].to_pylist() == ["ok", None]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"timestamp": 3, "input_le', "line 2: not JSON"),
        ("[1, 2]", "line 2: not a JSON object"),
        ('{"timestamp": 3}', 'line 2: no column input_length, output_length; found "timestamp"'),
        (
            json.dumps(record(n_in=-1, hash_ids=[])),
            "line 2: input_length is -1, not a whole number",
        ),
        (json.dumps(record() | {"timestamp": 0.5}), "line 2: timestamp is 0.5, not a whole number"),
        (json.dumps(record() | {"output_length": True}), "line 2: output_length is true, not a"),
        (json.dumps(record(hash_ids={"a": 1})), 'line 2: hash_ids is {"a": 1}, not a list'),
        (json.dumps(record(hash_ids=[1, "b"])), 'line 2: hash_ids is [1, "b"], not a list'),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(tmp_path: Path, line: str, says: str) -> None:
    path = trace(tmp_path, record(), line, end="")
    assert f"{path}, {says}" in refusal(path)


@pytest.fixture(scope="module")
def conversation() -> list[dict[str, Any]]:
    if not CONVERSATION.exists():
        pytest.skip("the Mooncake conversation trace is not beside this checkout")
    return [json.loads(line) for line in CONVERSATION.read_text().splitlines()]


def test_the_conversation_trace_is_imported_whole(
    tmp_path: Path, conversation: list[dict[str, Any]]
) -> None:
    summary = import_trace("mooncake", [CONVERSATION], tmp_path / "m.tape")
    assert (summary.read, summary.written, summary.dropped) == (12_031, 12_031, {})
    tape = open_tape(summary.tape)
    assert tape.facts["source"]["files"][0]["distinct_arrivals"] == 1_180
    assert 2_990_000_000 <= tape.facts["arrival_resolution_ns"] <= 3_000_000_000
    table = tape.read(["arrival_ns", "input_tokens", "output_tokens", *PREFIX])
    rows = table.to_pylist()
    assert [r["arrival_ns"] for r in rows] == [c["timestamp"] * 1_000_000 for c in conversation]
    assert [r["input_tokens"] for r in rows] == [c["input_length"] for c in conversation]
    assert [r["output_tokens"] for r in rows] == [c["output_length"] for c in conversation]
    assert [r["block_hashes"] for r in rows] == [c["hash_ids"] for c in conversation]
    assert all(
        (len(r["block_hashes"]) - (r["prefix_partial"] > 0)) * 512 + r["prefix_partial"]
        == r["input_tokens"]
        for r in rows
    )


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 10**9), st.integers(0, 2_000), st.integers(0, 9), st.booleans()),
        min_size=1,
        max_size=20,
    ),
    st.integers(0, 19),
)
def test_the_fast_way_and_the_line_by_line_way_agree(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, int, bool]], odd: int
) -> None:
    """One more key in one row sends its whole block the slow way."""
    records = [record(t, n, out) for t, n, out, _ in rows]
    for one, (*_, broken) in zip(records, rows, strict=True):
        one["hash_ids"] = one["hash_ids"][1:] if broken else one["hash_ids"]
    folder = tmp_path_factory.mktemp("mooncake")
    (plain,) = mooncake.read_batches(trace(folder, *records))
    assert plain.columns.keys() == {"input_tokens", "output_tokens", *PREFIX}
    records[odd % len(records)]["one_more"] = 1
    (slow,) = mooncake.read_batches(trace(folder, *records))
    assert slow.columns.keys() == plain.columns.keys() | {"extra"}
    assert (slow.time_ns == plain.time_ns).all()
    assert (slow.row == plain.row).all()
    assert slow.notes == plain.notes
    for name, column in plain.columns.items():
        assert column.to_pylist() == slow.columns[name].to_pylist(), name
