"""Baseten traces: Parquet columns by name, prompts never read, numbers never guessed."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokentape.traces.errors import TapeError
from tokentape.traces.importers import ImportSummary, import_trace
from tokentape.traces.reader import open_tape

T0_MS = 1_759_813_207_000


def imported(folder: Path, **columns: Any) -> tuple[ImportSummary, list[dict[str, Any]]]:
    size = len(next(iter(columns.values())))
    whole = {"timestamp_start_unix_ms": [T0_MS + i for i in range(size)]}
    whole |= {"input_tokens": [40] * size, "output_tokens": [8] * size}
    path = folder / "trace.parquet"
    pq.write_table(pa.table(whole | columns), path)
    summary = import_trace("baseten", [path], folder / "b.tape", force=True)
    return summary, open_tape(summary.tape).read().to_pylist()


def test_times_cancels_and_what_the_server_said_are_kept(tmp_path: Path) -> None:
    summary, rows = imported(
        tmp_path,
        prompt=["secret words"] * 3,
        output_text=["secret answer"] * 3,
        duration_ttft_ms=[12, None, 0],
        duration_e2e_ms=[100, None, 7],
        request_canceled=[0, None, 1],
        cached_tokens_reference=[16, 0, None],
        model_name=["m", "m", None],
        speculation_ratio=[1.5, None, None],
    )
    assert [r["first_content_ns"] for r in rows] == [12_000_000, None, 2_000_000]
    assert [r["end_ns"] for r in rows] == [100_000_000, None, 9_000_000]
    assert [r["outcome"] for r in rows] == ["ok", "ok", "client_abort"]
    assert [r["cached_tokens"] for r in rows] == [16, 0, None]
    assert json.loads(rows[0]["extra"]) == {"speculation_ratio": 1.5}
    everything = b"".join(p.read_bytes() for p in summary.tape.rglob("*.*"))
    assert b"secret" not in everything


def test_blocks_are_kept_where_they_fit_the_row_s_size(tmp_path: Path) -> None:
    hashes = pa.array([[2**64 - 1, 7], [1, 2, 3], [1], None], pa.list_(pa.uint64()))
    _, rows = imported(tmp_path, total_hashes=hashes, block_size=[16, 16, 16, 16])
    assert [r["block_hashes"] for r in rows] == [[-1, 7], [1, 2, 3], None, None]
    assert [r["block_tokens"] for r in rows] == [16, 16, None, None]
    assert [r["prefix_partial"] for r in rows] == [8, 8, None, None]


def test_sessions_are_linked_by_time(tmp_path: Path) -> None:
    _, (first, second, alone) = imported(
        tmp_path,
        timestamp_start_unix_ms=[T0_MS, T0_MS + 500, T0_MS + 600],
        duration_e2e_ms=[100.0, 10.0, 10.0],
        provided_session_id=[5, 5, None],
    )
    assert (second["parents"], second["think_ns"]) == ([first["request_id"]], 400_000_000)
    assert (second["session_id"], second["turn_index"]) == ("5", 1)
    assert (alone["session_id"], alone["parents"]) == (None, None)


def test_a_row_without_a_count_is_dropped_and_counted(tmp_path: Path) -> None:
    summary, _ = imported(tmp_path, output_tokens=[8, None, 8])
    assert (summary.read, summary.written, summary.dropped) == (3, 2, {"no_value": 1})


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"input_tokens": [40, -1]}, "row 1: input_tokens is -1, not a whole number"),
        ({"input_tokens": [40, 2**31]}, "row 1: input_tokens is 2147483648"),
        ({"input_tokens": [40.5, 1.0]}, "input_tokens is of type double, not whole numbers"),
        ({"input_tokens": ["40", "1"]}, "input_tokens is of type string"),
        ({"timestamp_start_unix_ms": [T0_MS * 10**6] * 2}, "row 0: timestamp_start_unix_ms is"),
        ({"request_canceled": [0, 2]}, "row 1: request_canceled is 2"),
    ],
)
def test_what_cannot_be_right_is_named(tmp_path: Path, columns: Any, says: str) -> None:
    with pytest.raises(TapeError) as raised:
        imported(tmp_path, **columns)
    assert says in str(raised.value)
