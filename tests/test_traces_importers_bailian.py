"""Bailian traces: chats find their parents and their root, blocks keep the ceil rule of 16."""

import json
from pathlib import Path
from typing import Any

import pytest

from tokentape.traces.errors import TapeError
from tokentape.traces.importers import ImportSummary, import_trace
from tokentape.traces.reader import open_tape

SAMPLE = Path(__file__).parents[2] / "shared/data/bailian/schema_sample.jsonl"


def chat(number: int, parent: int = -1, t_s: float = 0.0, n_in: int = 20, **more: Any) -> str:
    hashes = [number * 100 + i for i in range(-(-n_in // 16))]
    row = {"chat_id": number, "parent_chat_id": parent, "timestamp": t_s, "input_length": n_in}
    return json.dumps(row | {"output_length": 5, "type": "text", "hash_ids": hashes} | more)


def imported(folder: Path, *lines: str) -> tuple[ImportSummary, list[dict[str, Any]]]:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(lines) + "\n")
    summary = import_trace("bailian", [path], folder / "b.tape", force=True)
    return summary, open_tape(summary.tape).read().to_pylist()


def test_a_turn_names_its_parent_and_the_root_is_the_session(tmp_path: Path) -> None:
    lines = [
        chat(10, t_s=0.25, turn=1),
        chat(11, t_s=0.5, turn=1),
        chat(12, parent=10, t_s=60.125, turn=2),
        chat(13, parent=12, t_s=61.0, turn=3),
    ]
    _, rows = imported(tmp_path, *lines)
    first, other, second, third = rows
    assert [row["session_id"] for row in rows] == ["10", "11", "10", "10"]
    assert [row["turn_index"] for row in rows] == [0, 0, 1, 2]
    assert [row["parents"] for row in (first, other)] == [None, None]
    assert second["parents"] == [first["request_id"]]
    assert third["parents"] == [second["request_id"]]
    assert [row["arrival_ns"] for row in rows] == [0, 250_000_000, 59_875_000_000, 60_750_000_000]
    assert {row["think_ns"] for row in rows} == {None}, "the trace does not say when a chat ended"


def test_a_parent_is_found_across_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokentape.traces.importers.bailian.BATCH_ROWS", 1)
    _, (first, second) = imported(tmp_path, chat(1), chat(2, parent=1, t_s=3.0))
    assert second["parents"] == [first["request_id"]]


def test_a_parent_that_is_not_there_and_a_circle_leave_the_row_without_one(tmp_path: Path) -> None:
    summary, rows = imported(tmp_path, chat(1, parent=2), chat(2, parent=1), chat(3, parent=99))
    assert [row["parents"] for row in rows] == [None, [rows[0]["request_id"]], None]
    (file,) = open_tape(summary.tape).facts["source"]["files"]
    assert file["parents_not_found"] == 2


def test_a_chat_that_comes_twice_is_dropped_and_counted(tmp_path: Path) -> None:
    summary, rows = imported(tmp_path, chat(1), chat(1, n_in=40), chat(2))
    assert (summary.read, summary.written, summary.dropped) == (3, 2, {"duplicate_id": 1})
    assert [row["input_tokens"] for row in rows] == [20, 20]


def test_blocks_of_16_follow_the_ceil_rule_or_are_not_kept(tmp_path: Path) -> None:
    _, (part, full, broken) = imported(
        tmp_path, chat(1, n_in=20), chat(2, n_in=32), chat(3, n_in=32, hash_ids=[1])
    )
    assert (part["block_tokens"], part["prefix_partial"], part["block_hashes"]) == (
        16,
        4,
        [100, 101],
    )
    assert (full["prefix_partial"], full["block_hashes"]) == (0, [200, 201])
    assert (broken["block_tokens"], broken["block_hashes"]) == (None, None)
    assert json.loads(part["extra"]) == {"type": "text"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (chat(2, t_s=-1.0), "line 2: timestamp is -1.0, not a time"),
        (chat(2) + chat(3), "line 2: not JSON"),
        (chat(2, n_in=-5), "line 2: input_length is -5, not a whole number"),
        ('{"chat_id": 2}', "line 2: no column timestamp, input_length, output_length; found"),
        (chat(2).replace('"timestamp": 0.0', '"timestamp": NaN'), "line 2: not JSON"),
        (chat(2).replace('"chat_id": 2', '"chat_id": "x"'), 'line 2: chat_id is "x", not the'),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(TapeError, match="line 2") as raised:
        imported(tmp_path, chat(1), line)
    assert says in str(raised.value)


def test_the_quoted_row_of_the_thinking_trace_is_read(tmp_path: Path) -> None:
    if not SAMPLE.exists():
        pytest.skip("the Bailian sample is not beside this checkout")
    summary = import_trace("bailian", [SAMPLE], tmp_path / "b.tape")
    (row,) = open_tape(summary.tape).read().to_pylist()
    assert (row["input_tokens"], row["output_tokens"], row["turn_index"]) == (502, 1494, 0)
    assert row["block_hashes"] == list(range(32))
    assert row["prefix_partial"] == 502 - 31 * 16
