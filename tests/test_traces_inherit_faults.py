"""Writers that are killed at one very instruction, or on a full disk: the books balance.

The instruction is chosen by a `sitecustomize.py` that only the writer process imports.
"""

import os
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from conftest import fill
from test_traces_inherit import USAGE, chunk, journaled, kill, message, ready, record, since_arrival
from test_traces_recording import begin, finish, start, wait_for
from tokentape.traces import machine, recording
from tokentape.traces.reader import open_tape
from tokentape.traces.recording import Recorder
from tokentape.traces.recover import recover

SEALS_OFTEN = "import os\nimport tokentape.traces.writer as w\nw.SEAL_BYTES = 20_000\n"


class Site:
    """What the writer processes that are started from now on run first."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._file = folder / "site" / "sitecustomize.py"
        self._file.parent.mkdir()
        monkeypatch.setenv("PYTHONPATH", str(self._file.parent))

    def run(self, code: str) -> None:
        self._file.write_text(code)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


def books(tape: Path) -> tuple[int, int, int]:
    """(rows on the tape, requests seen, requests lost), the last two by tape.json; no row twice."""
    opened = open_tape(tape)
    ids = [r["request_id"] for r in opened.read(["request_id"]).to_pylist()]
    assert len(set(ids)) == len(ids)
    return len(ids), sum(opened.facts.get("seen", {}).values()), sum(opened.losses.values())


def quiet(tape: Path) -> Recorder:
    return start(tape, on_trouble=lambda _: None)


def sealed_some(recorder: Recorder, now: int) -> None:
    """Ten rows in segments."""
    for n in range(10):
        finish(recorder, begin(recorder, now + n), now + n)
    recorder.flush()
    wait_for(lambda: open_tape(recorder.tape).segments != [], "sealed")


def everything_dies(recorder: Recorder) -> None:
    recorder._life.process.kill()
    recorder._life.bury()
    os.close(recorder._lock_fd)


@pytest.mark.parametrize(
    "tail",
    [
        b'data: {"choices":[]%s}\n\n' % (USAGE % 5),
        b'data: {"error":{"message":"x","type":"server_error","code":500}}\n\n',
    ],
    ids=["usage", "an error"],
)
def test_what_the_dead_writer_had_been_told_last_is_not_forgotten(
    tmp_path: Path, tail: bytes
) -> None:
    now = time.monotonic_ns()
    pieces = [*map(chunk, (message(0), message(1), tail, b"data: [DONE]\n\n")), b"0\r\n\r\n"]
    whole = record(tmp_path / "whole.tape", now, pieces)
    gone_on = record(tmp_path / "killed.tape", now, pieces, 3)
    assert since_arrival(gone_on) == since_arrival(whole)
    for name in ("outcome", "error_type", "output_tokens", "input_tokens", "usage_raw"):
        assert gone_on[name] == whole[name], name
    assert sum(gone_on["ntok"]) == sum(whole["ntok"])


def test_a_writer_that_dies_between_its_last_seal_and_its_end_doubles_no_row(
    tmp_path: Path, site: Site
) -> None:
    site.run(
        "import os\nimport tokentape.traces.writer as w\n"
        "w.TapeWriter.update_facts = lambda *a, **k: os._exit(9)\n"
    )
    recorder = quiet(tmp_path / "a.tape")
    now = time.monotonic_ns()
    stream = begin(recorder, now)
    begin(recorder, now + 1)
    journaled(recorder, 4)
    finish(recorder, stream, now)
    summary = recorder.finish()
    assert (summary.seen, summary.rows) == (2, 2)
    assert books(tmp_path / "a.tape") == (2, 2, 0)


def test_a_writer_that_dies_before_its_summary_is_summed_up_from_the_tape(
    tmp_path: Path, site: Site
) -> None:
    site.run(
        "import os\nimport tokentape.traces.blocks as b\nnote = b.Channel.note\n"
        "b.Channel.note = lambda c, m: os._exit(9) if b'summary' in m else note(c, m)\n"
    )
    recorder = quiet(tmp_path / "a.tape")
    now = time.monotonic_ns()
    finish(recorder, begin(recorder, now), now)
    recorder.losses["rows_dropped"] = 1
    summary = recorder.finish()
    assert (summary.seen, summary.rows) == (2, 1)
    assert books(tmp_path / "a.tape") == (1, 2, 1)


def test_when_all_is_killed_while_a_successor_starts_every_request_is_counted(
    tmp_path: Path,
) -> None:
    recorder = quiet(tmp_path / "a.tape")
    now = time.monotonic_ns()
    finish(recorder, begin(recorder, now), now)
    journaled(recorder, 3)
    kill(recorder)
    recorder.flush()
    for n in range(1, 6):
        finish(recorder, begin(recorder, now + n), now + n)
    everything_dies(recorder)
    recover(tmp_path / "a.tape")
    rows, seen, lost = books(tmp_path / "a.tape")
    assert (seen, rows + lost) == (6, 6)


def test_a_successor_that_dies_before_it_is_heard_is_summed_up_with_those_before_it(
    tmp_path: Path, site: Site
) -> None:
    site.run(SEALS_OFTEN)
    recorder = quiet(tmp_path / "a.tape")
    now = time.monotonic_ns()
    sealed_some(recorder, now)
    site.run(
        "import os\nimport tokentape.traces.blocks as b\nb.Channel.note = lambda *a: os._exit(9)\n"
    )
    kill(recorder)
    recorder.flush()
    recorder._life.process.wait()
    site.run("")
    finish(recorder, begin(recorder, now + 50), now + 50)
    recorder.flush()
    summary = recorder.finish()
    assert (summary.seen, summary.rows) == (11, 11)
    assert books(tmp_path / "a.tape") == (11, 11, 0)


def test_writers_that_are_killed_as_they_start_lose_nothing(tmp_path: Path) -> None:
    recorder = quiet(tmp_path / "a.tape")
    now = time.monotonic_ns()
    first, second = begin(recorder, now), begin(recorder, now + 1)
    journaled(recorder, 4)
    kill(recorder)
    for n in range(20):
        recorder.reply_data(first, now + 4_100_000 + n * 1000, message(n))
    recorder.close(second, now + 9_000_000, {"outcome": "ok"})
    finish(recorder, begin(recorder, now + 2), now + 2)
    for _ in range(2):
        recorder.flush()
        kill(recorder)
    recorder.flush()
    finish(recorder, first, now)
    summary = recorder.finish()
    assert (summary.seen, summary.rows, summary.losses, summary.lost_reads) == (3, 3, {}, 0)
    lengths = [len(r["off_us"]) for r in open_tape(recorder.tape).read(["off_us"]).to_pylist()]
    assert sorted(lengths) == [2, 3, 23]


def test_no_block_is_confirmed_while_the_dead_writers_journal_is_all_there_is(
    small_disk: Path,
) -> None:
    tape = small_disk / "a.tape"
    recorder = quiet(tape)
    now = time.monotonic_ns()
    for n in range(5):
        finish(recorder, begin(recorder, now + n), now + n)
    journaled(recorder, 15)
    filler = fill(small_disk)
    kill(recorder)
    wait_for(lambda: ready(recorder), "a successor")
    finish(recorder, begin(recorder, now + 9), now + 9)
    recorder.flush()
    kill(recorder)  # it had no journal of its own: its successor begins where it began
    filler.unlink()
    summary = recorder.finish()
    assert (summary.seen, summary.rows, summary.losses) == (6, 6, {})
    assert books(tape) == (6, 6, 0)


def test_with_a_disk_that_stays_full_the_dead_writers_rows_wait_for_recover(
    small_disk: Path,
) -> None:
    tape = small_disk / "a.tape"
    recorder = quiet(tape)
    now = time.monotonic_ns()
    for n in range(5):
        finish(recorder, begin(recorder, now + n), now + n)
    journaled(recorder, 15)
    filler = fill(small_disk)
    kill(recorder)
    wait_for(lambda: ready(recorder), "a successor")
    finish(recorder, begin(recorder, now + 9), now + 9)
    summary = recorder.finish()
    assert (summary.seen, summary.rows, summary.unsealed) == (6, 0, 5)
    filler.unlink()
    recover(tape)
    assert books(tape) == (5, 6, 1)


def test_what_was_sealed_before_a_full_disk_is_on_the_books_after_it(
    small_disk: Path, site: Site
) -> None:
    site.run(SEALS_OFTEN)
    tape = small_disk / "a.tape"
    recorder = quiet(tape)
    now = time.monotonic_ns()
    sealed_some(recorder, now)
    site.run("")
    filler = fill(small_disk)
    kill(recorder)
    wait_for(lambda: ready(recorder), "a successor")
    finish(recorder, begin(recorder, now + 50), now + 50)
    filler.unlink()
    summary = recorder.finish()
    assert (summary.seen, summary.rows) == (11, 11)
    assert books(tape) == (11, 11, 0)


def test_telemetry_that_was_sealed_by_a_writer_that_died_then_is_there_once(
    tmp_path: Path, site: Site
) -> None:
    site.run(
        SEALS_OFTEN
        + "import tokentape.traces.journal as j\nj.Journal.rotate = lambda *a: os._exit(9)\n"
    )
    recorder = quiet(tmp_path / "a.tape")
    now = time.monotonic_ns()
    for n in range(8):
        finish(recorder, begin(recorder, now + n), now + n)
    recorder.telemetry(now, now + 5, "http://e/metrics", [("vllm:x", "{}", 2.5)])
    recorder.flush()
    recorder._life.process.wait()
    site.run("")
    summary = recorder.finish()
    files = (tmp_path / "a.tape" / "telemetry").glob("**/*.parquet")
    names = [n for f in files for n in pq.read_table(f, columns=["name"])["name"].to_pylist()]
    assert summary.rows == 8
    # the writer adds what the machine's cores did at the same instant, a sample for each mode
    assert sorted(names) == ["node_cpu_seconds_total"] * len(machine.cpu_seconds()) + ["vllm:x"]


def test_when_no_process_can_be_had_the_summary_says_what_is_on_the_tape(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_process(*_: Any, **__: Any) -> None:
        raise OSError

    site.run(SEALS_OFTEN)
    recorder = quiet(tmp_path / "a.tape")
    now = time.monotonic_ns()
    sealed_some(recorder, now)
    site.run("")
    kill(recorder)
    recorder.flush()
    wait_for(lambda: ready(recorder), "a successor")
    finish(recorder, begin(recorder, now + 50), now + 50)
    journaled(recorder, 33)
    monkeypatch.setattr(recording, "WriterLife", no_process)
    kill(recorder)
    assert recorder.finish().rows == books(tmp_path / "a.tape")[0] == 11
