"""Few sorted files in place of many: the same rows, the same numbers, the same books."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rows import MS, streamed_row
from tokentape.analysis.session import connect
from tokentape.traces import rewrite
from tokentape.traces.check import check
from tokentape.traces.compact import compact, merge
from tokentape.traces.errors import TapeError
from tokentape.traces.facts import changing, lock
from tokentape.traces.identity import request_id
from tokentape.traces.reader import open_tape
from tokentape.traces.recover import recover
from tokentape.traces.schema import INSTANTS
from tokentape.traces.writer import TapeWriter

DAY_MS = 86_400_000
EPOCH = 1_790_000_000_000_000_000
METRICS = "SELECT * EXCLUDE (run) FROM metrics_long ORDER BY ALL"
TELEMETRY = "SELECT * EXCLUDE (run) FROM telemetry ORDER BY ALL"
SESSIONS = "SELECT * EXCLUDE (run) FROM requests ORDER BY request_id"


def captured(
    path: Path, numbers: list[int], *, epoch: int = EPOCH, writers: int = 2, **facts: Any
) -> Path:
    """A capture by several writers, each with a clock and books, whose segments overlap in time."""
    rng = np.random.default_rng(numbers[0])
    for w in range(writers):
        if w == 0:
            made = TapeWriter.create(
                path, role="capture", command=[], options={}, facts=facts, wall_epoch_unix_ns=epoch
            )
            os.close(made._lock_fd)
        anchors = [
            {"wall_unix_ns": epoch + n, "monotonic_ns": n, "uncertainty_ns": 9} for n in (w, 7)
        ]
        clock = {"clock_id": f"host/boot/w{w}", "anchors": anchors}
        writer = TapeWriter(path, lock(path), clock, f"w{w}")
        mine = numbers[w::writers]
        for at in range(0, len(mine), 10):
            for n in rng.permutation(mine[at : at + 10]).tolist():
                row = streamed_row(n, events=n % 5, session_id=f"s{n % 7}", worker=f"w{w}")
                writer.append(row | {"request_id": request_id(EPOCH + n * MS)})
            writer.append_telemetry((at * MS, at * MS + 5, f"http://x/{w}", "load", "{}", 0.5 * at))
            writer.seal()
        writer.seen, writer.losses = len(mine) + 1, {"rows_dropped": 1}
        writer.close()
    return path


@pytest.fixture
def tape(tmp_path: Path) -> Path:
    """120 requests of two writers, half of them a day later."""
    numbers = [*range(60), *(DAY_MS + n for n in range(60))]
    return captured(tmp_path / "a.tape", numbers)


def numbers_of(path: Path) -> list[list[tuple[Any, ...]]]:
    """Metrics, rows and telemetry; a mean's last digit hangs on the order of its sum."""
    connection = connect([open_tape(path)])
    found = [connection.sql(query).fetchall() for query in (METRICS, SESSIONS, TELEMETRY)]
    connection.close()
    digits = [[f"{v:.12g}" if isinstance(v, float) else v for v in row] for row in found[0]]
    return [[tuple(row) for row in digits], *found[1:]]


def test_compacting_changes_the_files_and_no_number(
    tape: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewrite, "SLICE_VALUES", 60)  # many slices of few rows
    (tape / "notes").mkdir()
    (tape / "notes" / "mine.txt").write_text("kept")
    before, was = numbers_of(tape), open_tape(tape)
    found = check(was)
    done = compact(tape)
    now = open_tape(tape)
    assert numbers_of(tape) == before
    assert check(now) == found and not [f for f in found if f.severity == "error"]
    assert (done.rows, done.events, done.duplicates) == (was.rows, was.events, 0)
    assert (len(was.segments), len(now.segments), len(now.telemetry_files)) == (12, 2, 1)
    for segment in now.segments:
        arrivals = pq.read_table(segment.path)["arrival_ns"].to_numpy()
        assert len(arrivals) == segment.rows == 60 and (np.diff(arrivals) >= 0).all()
    assert (tape / "notes" / "mine.txt").read_text() == "kept"
    assert sorted(p.name for p in tape.parent.iterdir()) == ["a.tape"]
    clocks = now.facts["clocks"].values()
    assert sorted(clock["clock_id"] for clock in clocks) == ["host/boot/w0", "host/boot/w1"]
    assert [a["monotonic_ns"] for clock in clocks for a in clock["anchors"]] in (
        [0, 7, 1, 7],
        [1, 7, 0, 7],
    )
    recover(tape)  # takes no writer that has become part of a file for one that died
    assert check(open_tape(tape)) == found
    rows = now.read()
    compact(tape)
    assert open_tape(tape).read() == rows
    assert open_tape(tape).facts["clocks"] == now.facts["clocks"]


def test_a_row_that_reaches_over_a_days_end_belongs_to_the_day_of_its_arrival(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    midnight = (EPOCH // (DAY_MS * MS) + 1) * DAY_MS * MS
    path = captured(tmp_path / "a.tape", list(range(40)), epoch=midnight - 20 * MS, writers=1)
    monkeypatch.setattr(rewrite, "FILE_BYTES", 1)  # a file for each slice
    compact(path)
    files = [s.path for s in open_tape(path).segments]
    assert len({f.parent.name for f in files}) == len(files) == 2
    assert [s.rows for s in open_tape(path).segments] == [20, 20]


def test_nothing_is_replaced_when_a_tape_is_written_or_has_rows_that_are_not_sealed(
    tape: Path,
) -> None:
    held = lock(tape)
    with pytest.raises(TapeError, match="is writing it"):
        compact(tape)
    os.close(held)
    damaged = next((tape / "requests").glob("**/*.parquet"))
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-9])
    with pytest.raises(TapeError, match="damaged"):
        compact(tape)
    damaged.write_bytes(content)
    assert len(open_tape(tape).segments) == 12
    assert sorted(p.name for p in tape.parent.iterdir()) == ["a.tape"]


def test_captures_of_different_epochs_become_one_and_what_they_share_is_there_once(
    tape: Path, tmp_path: Path
) -> None:
    """b is a later part of the same days; c is an older copy of a."""
    later = EPOCH + 50 * MS
    b = captured(tmp_path / "b.tape", list(range(200, 260)), epoch=later)
    c = tmp_path / "c.tape"
    shutil.copytree(tape, c)
    gone = sorted((c / "requests").glob("**/*.parquet"))[:3]
    for file in gone:
        file.unlink()
    with changing(c) as facts:
        facts["seen"] = {name: n // 2 for name, n in facts["seen"].items()}
    copies = open_tape(c).rows
    both = tmp_path / "both.tape"
    done = merge([b, tape, c], both, command=["test"])
    assert (done.rows, done.duplicates) == (180, copies)
    merged, first, second = open_tape(both), open_tape(tape), open_tape(b)
    assert [f for f in check(merged) if f.severity == "error"] == []
    assert merged.facts["wall_epoch_unix_ns"] == EPOCH
    assert merged.losses == {"rows_dropped": 4}
    assert sum(merged.facts["seen"].values()) == 184
    assert len(merged.facts["clocks"]) == 4

    def on_one_axis(rows: list[dict[str, Any]], shift_ns: int) -> list[dict[str, Any]]:
        instants = [n for n in rows[0] if n in INSTANTS]
        return [
            row | {n: row[n] + shift_ns for n in instants if row[n] is not None} for row in rows
        ]

    expected = on_one_axis(first.read().to_pylist(), 0)
    expected += on_one_axis(second.read().to_pylist(), 50 * MS)
    expected.sort(key=lambda row: row["request_id"])
    got = sorted(merged.read().to_pylist(), key=lambda row: row["request_id"])
    assert got == expected


def test_what_cannot_be_one_tape_is_refused_and_leaves_nothing(tape: Path, tmp_path: Path) -> None:
    other = captured(tmp_path / "b.tape", [1], content="none")
    into = tmp_path / "both.tape"
    with pytest.raises(TapeError, match="other content"):
        merge([tape, other], into, command=[])
    with changing(other) as facts:
        facts["role"] = "replay"
    with pytest.raises(TapeError, match="is a replay; merge joins captures"):
        merge([tape, other], into, command=[])
    with pytest.raises(TapeError, match="choose another --tape"):
        merge([tape, tape], tape, command=[], force=True)
    assert not into.exists() and json.loads((tape / "tape.json").read_text())["role"] == "capture"
