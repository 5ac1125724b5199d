"""The journal survives being cut anywhere, and hands over from file to file without loss."""

import threading
from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rows import make_tape, streamed_row
from tokentape.traces import journal
from tokentape.traces.check import check
from tokentape.traces.journal import Journal, count_unsealed, read_records
from tokentape.traces.reader import open_tape
from tokentape.traces.recover import recover

CLOCK = {"clock_id": "host/boot/w0", "anchors": []}


def events(t_ns: list[int]) -> list[bytes]:
    n = len(t_ns)
    return [array("q", t_ns).tobytes(), array("H", [1] * n).tobytes(), bytes(n), bytes(n), b"", b""]


def test_records_come_back_in_order_with_their_clock_first(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    book = Journal(tmp_path, "w0-x", CLOCK)
    book.add(journal.OPEN, 1, {"arrival_ns": 5})
    book.add(journal.ROW, 1, journal.pack_row(streamed_row(1)))
    book.flush()
    records = list(read_records(tmp_path / "journal" / "w0-x-00000.journal"))
    assert [r[0] for r in records] == [journal.CLOCK, journal.OPEN, journal.ROW]
    assert records[0][2] == CLOCK
    assert list(journal.unpack_row(records[2][2])["off_us"]) == [1000, 2000, 3000]


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 2000), flip=st.booleans())
def test_a_journal_cut_or_damaged_anywhere_gives_a_prefix_of_its_records(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: bool
) -> None:
    folder = tmp_path_factory.mktemp("j")
    (folder / "journal").mkdir()
    book = Journal(folder, "w0-x", CLOCK)
    for n in range(12):
        book.add(journal.OPEN, n, {"arrival_ns": n, "model": "m" * n})
    book.flush()
    path = folder / "journal" / "w0-x-00000.journal"
    whole = list(read_records(path))
    data = bytearray(path.read_bytes())
    cut = min(cut, len(data))
    if flip and cut < len(data):
        data[cut] ^= 0xFF
        path.write_bytes(data)
    else:
        path.write_bytes(data[:cut])
    kept = list(read_records(path))
    assert kept == whole[: len(kept)]
    if cut == len(data):
        assert kept == whole


def test_after_a_rotation_only_what_is_still_open_is_unsealed(tmp_path: Path) -> None:
    tape = make_tape(tmp_path / "a.tape", [])
    book = Journal(tape, "w0-x", CLOCK)
    book.add(journal.OPEN, 1, {"arrival_ns": 1})
    book.add(journal.ROW, 1, journal.pack_row(streamed_row(1)))
    book.add(journal.OPEN, 2, {"arrival_ns": 2})
    book.flush()
    assert count_unsealed(tape) == (1, 1)
    book.rotate([(journal.OPEN, 2, {"arrival_ns": 2})])
    assert count_unsealed(tape) == (0, 1)
    assert len(list((tape / "journal").glob("*.journal"))) == 1


def test_recover_seals_finished_rows_and_cuts_open_ones_with_their_events(tmp_path: Path) -> None:
    tape = make_tape(tmp_path / "a.tape", [])
    book = Journal(tape, "w0-x", CLOCK)
    row = streamed_row(1)
    book.add(journal.OPEN, 1, {"arrival_ns": 1})
    book.add(journal.ROW, 1, journal.pack_row(row))
    opened = {"arrival_ns": 2_000_000, "send_ns": 3_000_000, "request_id": b"x" * 16}
    book.add(journal.OPEN, 2, opened)
    book.add(journal.COLUMNS, 2, {"model_requested": "m"})
    book.add(journal.EVENTS, 2, events([4_000_000, 5_000_000]))
    book.add(journal.EVENTS, 2, events([6_000_000]))
    book.flush()
    result = recover(tape)
    assert (result.rows, result.cut) == (2, 1)
    opened_tape = open_tape(tape)
    cut = opened_tape.read().to_pylist()[1]
    assert cut["outcome"] == "cut"
    assert cut["off_us"] == [1000, 2000, 3000]
    assert cut["model_requested"] == "m"
    assert cut["end_ns"] == 6_000_000
    assert opened_tape.unsealed_rows == 0
    assert opened_tape.segments[0].metadata["clock_id"] == "host/boot/w0"


def test_a_recovery_that_dies_before_it_tidies_up_seals_nothing_twice(tmp_path: Path) -> None:
    tape = make_tape(tmp_path / "a.tape", [])
    book = Journal(tape, "w0-x", CLOCK)
    book.add(journal.ROW, 1, journal.pack_row(streamed_row(1)))
    book.flush()
    left = (tape / "journal" / "w0-x-00000.journal").read_bytes()
    assert recover(tape).rows == 1
    (tape / "journal" / "w0-x-00000.journal").write_bytes(left)
    assert recover(tape).rows == 0
    assert open_tape(tape).rows == 1


def test_opening_a_tape_never_fails_while_its_journal_rotates(tmp_path: Path) -> None:
    tape = make_tape(tmp_path / "a.tape", [streamed_row(1)])
    stop = threading.Event()

    def rotate() -> None:
        book = Journal(tape, "w0-x", CLOCK)
        while not stop.is_set():
            book.add(journal.OPEN, 1, {"arrival_ns": 1})
            book.flush()
            book.rotate([(journal.OPEN, 1, {"arrival_ns": 1})])
        book.close()

    thread = threading.Thread(target=rotate)
    thread.start()
    try:
        for _ in range(300):
            assert open_tape(tape).rows == 1
    finally:
        stop.set()
        thread.join()


def test_a_damaged_segment_hinders_neither_reading_the_rest_nor_recovery(tmp_path: Path) -> None:
    tape = make_tape(tmp_path / "a.tape", [streamed_row(1)])
    segment = open_tape(tape).segments[0]
    book = Journal(tape, segment.metadata["incarnation"], CLOCK)
    book.add(journal.ROW, 1, journal.pack_row(streamed_row(2)))
    book.flush()
    data = bytearray(segment.path.read_bytes())
    data[300:320] = bytes(20)
    segment.path.write_bytes(data)
    findings = check(open_tape(tape))
    assert any("cannot be read" in f.what and f.where == str(segment.path) for f in findings)
    segment.path.write_bytes(data[:-50])
    assert open_tape(tape, skip_damaged=True).rows == 0
    assert recover(tape).rows == 1


def test_a_row_that_reached_a_segment_is_not_sealed_again(tmp_path: Path) -> None:
    from tokentape.traces.facts import lock
    from tokentape.traces.writer import TapeWriter

    tape = make_tape(tmp_path / "a.tape", [])
    writer = TapeWriter(tape, lock(tape), CLOCK, "w0")
    book = Journal(tape, writer.incarnation, CLOCK)
    row = streamed_row(1)
    book.add(journal.ROW, 1, journal.pack_row(row))
    book.flush()
    writer.append(row)
    writer.close()  # sealed, and the process died before it could rotate the journal
    assert count_unsealed(tape) == (0, 0)
    assert recover(tape).rows == 0
    assert open_tape(tape).rows == 1
