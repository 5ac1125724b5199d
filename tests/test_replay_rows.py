"""Rows read when they are sent: the right ones, each row group once, and few at a time."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokentape.replay.rows import APART, GROUPS_KEPT, LOOK_AHEAD, Group, ReadAhead, TapeRows
from tokentape.replay.source import read_source
from tokentape.traces.errors import TapeError
from tokentape.traces.reader import open_tape
from tokentape.traces.writer import ROW_GROUP_ROWS, TapeWriter

GROUPS = 6
ROWS = GROUPS * ROW_GROUP_ROWS - 100


@pytest.fixture(scope="module")
def long_tape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tape of two segments and GROUPS row groups; each row's turn is its position."""
    path = tmp_path_factory.mktemp("rows") / "t"
    writer = TapeWriter.create(path, role="import", command=[], options={}, facts={})
    for number in range(ROWS):
        if number == 4 * ROW_GROUP_ROWS:
            writer.seal()
        known = {"request_id": number.to_bytes(16), "arrival_ns": number * 1000}
        block = {"block_tokens": 4, "block_unit": "token", "block_hashes": [number, 7]}
        more = block if number % 3 == 0 else {"session_id": f"s{number // 10}"}
        writer.append(known | {"turn_index": number, "output_tokens": 1} | more)
    writer.close()
    return path


def rows_of(path: Path) -> TapeRows:
    return read_source(open_tape(path))[0].rows


def test_every_row_is_found_by_its_position(long_tape: Path) -> None:
    rows = rows_of(long_tape)
    assert [g.rows for g in rows.groups] == [ROW_GROUP_ROWS] * (GROUPS - 1) + [3900]
    for position in (0, 3, 3999, 4000, 15_999, 16_000, ROWS - 1, 1):
        assert rows.request_id(position) == position.to_bytes(16)
        assert rows.columns(position)["turn_index"] == position
        hashes = [position, 7] if position % 3 == 0 else []
        assert rows.blocks(position).hashes.tolist() == hashes
        assert ("session_id" in rows.columns(position)) == (position % 3 != 0)
    assert rows.held <= GROUPS_KEPT


def test_rows_that_went_to_another_process_read_the_same(long_tape: Path) -> None:
    rows = rows_of(long_tape)
    rows.request_id(5)
    again = pickle.loads(pickle.dumps(rows))
    assert again.held == 0 and rows.held == 1
    assert again.columns(12_345) == rows.columns(12_345)
    assert again.bytes_per_token == rows.bytes_per_token


def test_a_reader_ahead_reads_each_row_group_once_and_drops_it_after_its_last_row(
    long_tape: Path,
) -> None:
    rows = rows_of(long_tape)
    reads: list[int] = []
    read = rows._read

    def counted(group: int, columns: Any) -> Any:
        reads.append(group)
        return read(group, columns)

    rows._read = counted  # type: ignore[method-assign]
    reader = ReadAhead(rows, np.arange(ROWS, dtype=np.int32))
    reader.start()
    assert reader.most_held == 1 and rows.held >= 1
    for number in range(ROWS):
        assert rows.request_id(number) == number.to_bytes(16)
        reader.built(number)
        assert rows.held <= 2 + LOOK_AHEAD // ROW_GROUP_ROWS
    reader.stop()
    assert sorted(set(reads)) == list(range(GROUPS))
    assert len(reads) == GROUPS and rows.held == 0


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_rows_in_any_order_are_the_right_ones_and_none_is_left(
    long_tape: Path, data: st.DataObject
) -> None:
    rows = rows_of(long_tape)
    positions = data.draw(st.lists(st.integers(0, ROWS - 1), max_size=50))
    reader = ReadAhead(rows, np.array(positions, dtype=np.int32))
    reader.start()
    for number, position in enumerate(positions):
        assert rows.columns(position)["turn_index"] == position
        reader.built(number)
    reader.stop()
    assert rows.held == 0
    assert reader.most_held <= len({p // ROW_GROUP_ROWS for p in positions})


def test_how_many_row_groups_are_needed_at_once_is_known_before(long_tape: Path) -> None:
    rows = rows_of(long_tape)
    there_and_back = np.r_[0, ROW_GROUP_ROWS, 2 * ROW_GROUP_ROWS, ROW_GROUP_ROWS + 1, 1]
    assert ReadAhead(rows, there_and_back.astype(np.int32)).most_held == 3


def test_a_row_group_that_is_needed_again_much_later_is_not_kept_meanwhile(long_tape: Path) -> None:
    rows = rows_of(long_tape)
    away = np.concatenate([[0, 1], np.full(APART + 1, ROWS - 1), [1, 0]]).astype(np.int32)
    ids = [rows.request_id(position) for position in (0, 1)]
    reader = ReadAhead(rows, away)
    assert reader.most_held == 1  # the first one goes and comes back
    reader.start()
    for number, position in enumerate(away.tolist()):
        if position < 2:
            assert rows.request_id(position) == ids[position]
        reader.built(number)
        if number == APART // 2:
            assert rows.held == 1
    reader.stop()
    assert rows.held == 0


def test_a_segment_that_is_gone_is_one_line_of_whoever_needs_it(tmp_path: Path) -> None:
    rows = TapeRows([Group(tmp_path / "gone.parquet", 0, 0, 10)])
    reader = ReadAhead(rows, np.arange(10, dtype=np.int32))
    with pytest.raises(TapeError, match=r"gone.parquet: cannot be read any more"):
        reader.start()
    with pytest.raises(TapeError, match="cannot be read any more"):
        rows.request_id(3)
