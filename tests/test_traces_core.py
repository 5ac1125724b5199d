"""Clocks, ids, facts, lock, writer and reader of a tape."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import tokentape
from rows import make_tape, streamed_row
from tokentape.traces import facts as tape_facts
from tokentape.traces.clock import TapeClock, take_anchor, wall_unix_ns
from tokentape.traces.errors import TapeError
from tokentape.traces.identity import incarnation, request_id
from tokentape.traces.reader import Tape, Tapes, open_tape, open_tapes
from tokentape.traces.schema import COLUMNS, REQUESTS, allowed
from tokentape.traces.writer import TapeWriter


def test_request_ids_are_uuids_of_version_7_and_sort_by_time() -> None:
    ids = [request_id(1_700_000_000_000_000_000 + n * 1000) for n in range(2000)]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert uuid.UUID(bytes=ids[0]).version == 7
    assert int.from_bytes(ids[0][:6]) == 1_700_000_000_000


def test_incarnations_of_one_worker_never_share_a_name() -> None:
    assert len({incarnation("w0") for _ in range(100)}) == 100


def test_a_tape_clock_keeps_differences_of_the_monotonic_clock() -> None:
    clock = TapeClock.start(wall_unix_ns(), "w0")
    assert clock.tape_ns(5_000) - clock.tape_ns(2_000) == 3_000
    assert clock.unix_ns(7) == clock.tape_ns(7) + clock.epoch_unix_ns


def test_an_anchor_agrees_with_both_clocks() -> None:
    anchor = take_anchor()
    assert 0 <= anchor.uncertainty_ns < 1_000_000
    assert abs(anchor.wall_unix_ns - wall_unix_ns()) < 5_000_000_000


def test_column_names_are_unique_and_each_has_a_meaning() -> None:
    names = [c.name for c in COLUMNS]
    assert len(set(names)) == len(names)
    assert all(c.meaning for c in COLUMNS)
    assert "block_hashes" not in allowed("none")
    assert "block_hashes" in allowed("structure")


def test_rows_come_back_as_they_were_written_and_missing_ones_are_null(tmp_path: Path) -> None:
    parent = request_id(1)
    tape = make_tape(
        tmp_path / "a.tape",
        [
            streamed_row(2, model="m", finish_reason=["stop", "length"], parents=[parent]),
            streamed_row(1, off_us=None, ntok=None, cls=None, stream=False),
            streamed_row(3, events=0),
        ],
    )
    opened = open_tape(tape)
    assert (opened.rows, opened.events) == (3, 3)
    rows = opened.read().to_pylist()
    assert [r["arrival_ns"] for r in rows] == [1_000_000, 2_000_000, 3_000_000]
    assert rows[0]["off_us"] is None
    assert rows[0]["model"] is None
    assert rows[1]["off_us"] == [1000, 2000, 3000]
    assert rows[1]["cls"] == [0, 0, 0]
    assert rows[1]["finish_reason"] == ["stop", "length"]
    assert rows[1]["parents"][0].bytes == parent
    assert rows[2]["off_us"] == []


def test_a_row_with_an_unknown_column_is_refused(tmp_path: Path) -> None:
    writer = TapeWriter.create(tmp_path / "a.tape", role="import", command=[], options={}, facts={})
    writer.append(streamed_row(surprise=1))
    with pytest.raises(KeyError, match="surprise"):
        writer.seal()


def test_segment_footers_carry_the_facts_that_a_lone_file_needs(tmp_path: Path) -> None:
    tape = open_tape(make_tape(tmp_path / "a.tape", [streamed_row()]))
    metadata = tape.segments[0].metadata
    assert metadata["tape_id"] == tape.facts["tape_id"]
    assert metadata["rows"] == "1"
    assert metadata["clock_id"] == "trace"
    assert pq.read_schema(tape.segments[0].path).names == REQUESTS.names


def test_a_value_that_no_column_can_hold_costs_its_row_and_no_other(tmp_path: Path) -> None:
    writer = TapeWriter.create(tmp_path / "a.tape", role="import", command=[], options={}, facts={})
    for row in (streamed_row(1), streamed_row(2, http_status=70_000), streamed_row(3)):
        writer.append(row)
    writer.close()
    tape = open_tape(tmp_path / "a.tape")
    assert (tape.rows, tape.losses) == (2, {"unwritable": 1})


def test_a_second_tape_in_the_same_place_needs_force(tmp_path: Path) -> None:
    tape = make_tape(tmp_path / "a.tape", [streamed_row()])
    with pytest.raises(TapeError, match="--force replaces it"):
        make_tape(tape, [])
    writer = TapeWriter.create(tape, role="import", command=[], options={}, facts={}, force=True)
    writer.close()
    assert open_tape(tape).rows == 0


def test_force_never_removes_a_folder_that_is_no_tape(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(TapeError, match="not a tape"):
        TapeWriter.create(tmp_path, role="import", command=[], options={}, facts={}, force=True)
    assert (tmp_path / "precious").exists()


def test_a_tape_that_is_being_written_has_a_lock_that_dies_with_its_holder(tmp_path: Path) -> None:
    tape = make_tape(tmp_path / "a.tape", [])
    hold = (
        "import sys; from pathlib import Path; from tokentape.traces.facts import lock;"
        "lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(tape)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(TapeError, match=f"process {holder.pid} is writing it"):
        tape_facts.lock(tape)
    holder.kill()
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    os.close(tape_facts.lock(tape))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a tape"),
        ("{", "damaged"),
        ('{"format_version": "2.0"}', "newer"),
        ("{}", "damaged"),
    ],
)
def test_a_folder_without_good_facts_is_refused_in_one_line(
    tmp_path: Path, content: str | None, message: str
) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    if content is not None:
        (folder / "tape.json").write_text(content)
    with pytest.raises(TapeError, match=message) as caught:
        open_tape(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_tape_is_named(tmp_path: Path) -> None:
    with pytest.raises(TapeError, match="no such tape"):
        open_tape(tmp_path / "nowhere")
    with pytest.raises(TapeError, match="matches no tape"):
        open_tapes(str(tmp_path / "*.tape"))


def test_a_pattern_opens_several_tapes_that_answer_as_one(tmp_path: Path) -> None:
    for name in ("b", "a"):
        make_tape(tmp_path / f"{name}.tape", [streamed_row(1), streamed_row(2)])
    tapes = tokentape.open(str(tmp_path / "*.tape"))
    assert isinstance(tapes, Tapes)
    assert [t.path.name for t in tapes] == ["a.tape", "b.tape"]
    assert (tapes.rows, tapes.events, tapes.read(["arrival_ns"]).num_rows) == (4, 12, 4)
    one = tokentape.open(tmp_path / "a.tape")
    assert isinstance(one, Tape)
    assert one.facts["role"] == "capture"


def test_a_tape_without_segments_reads_as_no_rows(tmp_path: Path) -> None:
    tape = open_tape(make_tape(tmp_path / "a.tape", []))
    assert tape.read().num_rows == 0
    assert tape.read().schema.names == REQUESTS.names


def test_segments_are_read_as_one_table_in_order_of_arrival(tmp_path: Path) -> None:
    tape = make_tape(tmp_path / "a.tape", [streamed_row(n, parents=[]) for n in (4, 2)])
    writer = TapeWriter(tape, tape_facts.lock(tape), {"clock_id": "x", "anchors": []}, "w1")
    writer.append(streamed_row(3, parents=[request_id(2)]))
    writer.close()
    assert open_tape(tape).read()["arrival_ns"].to_pylist() == [2_000_000, 3_000_000, 4_000_000]


def test_a_damaged_segment_is_named_and_the_rest_can_be_read(tmp_path: Path) -> None:
    tape = make_tape(tmp_path / "a.tape", [streamed_row(1)])
    writer = TapeWriter(tape, tape_facts.lock(tape), {"clock_id": "x", "anchors": []}, "w1")
    writer.append(streamed_row(2))
    writer.close()
    broken = open_tape(tape).segments[0].path
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.raises(TapeError, match=broken.name):
        open_tape(tape)
    rest = open_tape(tape, skip_damaged=True)
    assert rest.rows == 1
    assert [p for p, _ in rest.damaged] == [broken]


def test_a_segment_of_an_older_minor_version_reads_with_nulls(tmp_path: Path) -> None:
    tape = make_tape(tmp_path / "a.tape", [streamed_row(1, model="m")])
    segment = open_tape(tape).segments[0].path
    table = pq.read_table(segment)
    pq.write_table(table.drop_columns(["model", "late_cause"]), segment)
    rows = open_tape(tape).read(["model", "late_cause", "input_tokens"]).to_pylist()
    assert rows == [{"model": None, "late_cause": None, "input_tokens": 10}]


def test_tape_json_is_whole_after_every_replacement(tmp_path: Path) -> None:
    tape = make_tape(tmp_path / "a.tape", [], note="first")
    facts = tape_facts.read_facts(tape)
    for n in range(20):
        tape_facts.replace_facts(tape, facts | {"note": "x" * n * 1000})
        assert len(json.loads((tape / "tape.json").read_text())["note"]) == n * 1000
    assert sorted(p.name for p in tape.iterdir()) == [
        "journal",
        "requests",
        "tape.json",
        "telemetry",
    ]
