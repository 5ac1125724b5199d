"""A writer process that is killed costs nothing: the next one goes on with what it had."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import fill
from test_traces_recording import BODY, HEAD, SSE, begin, finish, start, wait_for
from tokentape.traces import blocks
from tokentape.traces.check import check
from tokentape.traces.journal import leftovers
from tokentape.traces.reader import open_tape
from tokentape.traces.recording import Recorder
from tokentape.traces.recover import recover, replay_journal
from tokentape.traces.writer import _ROW_BYTES, SEAL_BYTES

USAGE = b',"usage":{"prompt_tokens":7,"completion_tokens":%d,"total_tokens":9}'
OWN = {"request_id", "host", "worker"}  # columns that no two recordings share


def chunk(message: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(message), message)


def message(n: int, extras: bytes = b"", choice: bytes = b'"text":"w%d"') -> bytes:
    text = choice % n if b"%d" in choice else choice
    return b'data: {"id":"c","model":"m-1","choices":[{"index":0,%s}]%s}\n\n' % (text, extras)


def ids_told() -> list[bytes]:
    return [message(n, choice=b'"text":"ab","token_ids":[%d,5]') for n in range(12)]


def usage_with_each() -> list[bytes]:
    return [message(n, USAGE % (3 * n + 3)) for n in range(12)]


def usage_at_the_end() -> list[bytes]:
    return [message(n) for n in range(12)] + [b'data: {"choices":[]%s}\n\n' % (USAGE % 24)]


def roles_and_reasons() -> list[bytes]:
    first = b'data: {"model":"m-1","choices":[{"index":%d,"delta":{"role":"assistant"}}]}\n\n'
    text = b'data: {"choices":[{"index":%d,"delta":{"content":"x"}}]}\n\n'
    last = b'data: {"choices":[{"index":%d,"delta":{},"finish_reason":"stop"}]}\n\n'
    bodies = [first % 0, first % 1, text % 0, text % 1, last % 0, text % 1, text % 1, last % 1]
    return [*bodies, b'data: {"choices":[]%s}\n\n' % (USAGE % 4)]


DIALECTS = [ids_told, usage_with_each, usage_at_the_end, roles_and_reasons]


def kill(recorder: Recorder) -> None:
    os.kill(recorder._life.process.pid, signal.SIGKILL)
    recorder._life.process.wait()


def journaled(recorder: Recorder, reads: int) -> None:
    """Wait until so many reads of replies are in the journal."""

    def there() -> bool:
        with contextlib.suppress(FileNotFoundError):  # a successor that is done removes its past
            return any(replay_journal(f).reads >= reads for _, f in leftovers(recorder.tape))
        return False

    recorder.flush()
    wait_for(there, f"{reads} reads in the journal")


def ready(recorder: Recorder) -> bool:
    """Whether the writer of now has said that it is there."""
    recorder.flush()
    return recorder._life.ready is not None


def record(tape: Path, now: int, pieces: list[bytes], kill_at: int = -1) -> dict[str, Any]:
    """The row of one stream whose reads are `pieces`; the writer is killed before one of them."""
    recorder = start(tape, on_trouble=lambda _: None)
    stream = recorder.open(now, {"arrival_ns": now}, HEAD)
    recorder.request_body(stream, now, BODY)
    recorder.mark(stream, "request_end_ns", now)
    recorder.reply_head(stream, now + 2_000_000, 200, SSE, 7)
    for n, piece in enumerate(pieces):
        if n == kill_at:
            journaled(recorder, n)
            kill(recorder)
            recorder.flush()
        recorder.reply_chunked(stream, now + (n + 3) * 1_000_000, piece, n % 3)
    recorder.close(stream, now + 90_000_000, {"outcome": "ok", "send_ns": now + 1_000_000})
    summary = recorder.finish()
    assert (summary.seen, summary.rows, summary.losses, summary.lost_reads) == (1, 1, {}, 0)
    opened = open_tape(tape)
    assert check(opened) == []
    assert [f.name for f in (tape / "journal").iterdir()] == ["lock"]
    (row,) = opened.read().to_pylist()
    assert summary.events == len(row["off_us"])
    return dict(row)


def since_arrival(row: dict[str, Any]) -> dict[str, Any]:
    instants = [n for n in row if n.endswith("_ns") and not n.startswith("server_")]
    return {n: row[n] - row["arrival_ns"] for n in instants if row[n] is not None}


@pytest.mark.parametrize("kill_at", [0, 1, 5, 8])
@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.__name__)
def test_a_stream_that_outlives_its_writer_has_the_row_that_it_would_have_had(
    tmp_path: Path, dialect: Any, kill_at: int
) -> None:
    now = time.monotonic_ns()
    pieces = [chunk(m) for m in [*dialect(), b"data: [DONE]\n\n"]] + [b"0\r\n\r\n"]
    whole = record(tmp_path / "whole.tape", now, pieces)
    gone_on = record(tmp_path / "killed.tape", now, pieces, kill_at)
    assert since_arrival(gone_on) == since_arrival(whole)
    instants = set(since_arrival(whole)) | OWN
    if dialect is usage_at_the_end:  # text sizes are not journaled: spread evenly
        instants.add("ntok")
        assert sum(gone_on["ntok"]) == sum(whole["ntok"]) == 24
    assert {k: v for k, v in gone_on.items() if k not in instants} == {
        k: v for k, v in whole.items() if k not in instants
    }
    assert (whole["parse_status"], gone_on["parse_status"]) == ("ok", "ok")


CUTS = {"in a size line": 1, "in a message": 40, "before the CRLF": -2}


@pytest.mark.parametrize("name", CUTS)
def test_a_message_that_the_dead_writer_held_half_of_is_the_only_one_lost_and_counted(
    tmp_path: Path, name: str
) -> None:
    whole, at = chunk(message(1)), CUTS[name]
    before, after = whole[:at], whole[at:]
    now = time.monotonic_ns()
    pieces = [chunk(message(0)), before, after, *(chunk(message(n)) for n in range(2, 6))]
    usage = b'data: {"choices":[]%s}\n\ndata: [DONE]\n\n' % (USAGE % 6)
    row = record(tmp_path / "a.tape", now, [*pieces, chunk(usage), b"0\r\n\r\n"], kill_at=2)
    if name == "before the CRLF":  # the message itself had been read
        assert (len(row["off_us"]), row["events_dropped"], row["parse_status"]) == (6, None, "ok")
    else:
        assert (len(row["off_us"]), row["events_dropped"]) == (5, 1)
        assert row["parse_status"] == "partial"
    assert (row["output_tokens"], row["finish_reason"]) == (6, None)


def test_what_a_killed_writer_had_not_read_yet_is_read_by_the_next_one(tmp_path: Path) -> None:
    recorder = start(tmp_path / "a.tape", on_trouble=lambda _: None)
    now = time.monotonic_ns()
    open_before = begin(recorder, now)
    finish(recorder, begin(recorder, now + 1), now + 1)
    journaled(recorder, 5)
    os.kill(recorder._life.process.pid, signal.SIGSTOP)
    for n in range(2, 42):
        finish(recorder, begin(recorder, now + n), now + n)
        if n % 7 == 0:
            recorder.flush()
    kill(recorder)
    finish(recorder, open_before, now)
    summary = recorder.finish()
    assert (summary.seen, summary.rows, summary.events) == (42, 42, 126)
    assert (summary.losses, summary.lost_reads) == ({}, 0)
    tape = open_tape(tmp_path / "a.tape")
    assert {tuple(r["off_us"]) for r in tape.read(["off_us"]).to_pylist()} == {(2000, 3000, 4000)}
    assert check(tape) == []


def test_blocks_that_the_dead_writer_journaled_and_could_not_confirm_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = start(tmp_path / "a.tape", on_trouble=lambda _: None)
    now = time.monotonic_ns()
    stream = begin(recorder, now)
    recorder.flush()
    # The confirmation comes, and this process dies to it: as if the writer had died before it.
    monkeypatch.setattr(recorder._life.sender, "poll", list)
    wait_for(
        lambda: any(replay_journal(f).reads == 2 for _, f in leftovers(recorder.tape)), "journaled"
    )
    kill(recorder)
    recorder._life.sender.alive = False
    assert len(recorder._life.sender.unconfirmed()) == 1
    finish(recorder, stream, now)
    summary = recorder.finish()
    assert (summary.seen, summary.rows, summary.events) == (1, 1, 3)


def test_writers_that_are_killed_again_and_again_lose_nothing(tmp_path: Path) -> None:
    recorder = start(tmp_path / "a.tape", on_trouble=lambda _: None)
    now = time.monotonic_ns()
    streams = []
    for n in range(4):
        streams.append(begin(recorder, now + n))
        if n % 2:  # this one may not even have started
            recorder.flush()
        else:
            journaled(recorder, 2 * len(streams))
        kill(recorder)
        recorder.flush()
    for n, stream in enumerate(streams):
        finish(recorder, stream, now + n)
    summary = recorder.finish()
    assert (summary.seen, summary.rows, summary.events, summary.losses) == (4, 4, 12, {})
    tape = open_tape(tmp_path / "a.tape")
    assert check(tape) == []
    assert len({s.metadata["clock_id"] for s in tape.segments}) == 1


def test_when_the_successor_dies_with_everything_else_recover_has_each_request_once(
    tmp_path: Path,
) -> None:
    recorder = start(tmp_path / "a.tape", on_trouble=lambda _: None)
    now = time.monotonic_ns()
    finish(recorder, begin(recorder, now), now)
    begin(recorder, now + 1)
    journaled(recorder, 5)
    kill(recorder)
    finish(recorder, begin(recorder, now + 2), now + 2)
    begin(recorder, now + 3)
    wait_for(lambda: ready(recorder), "the successor is there")
    journaled(recorder, 10)
    kill(recorder)
    recorder._life.bury()
    os.close(recorder._lock_fd)
    recovered = recover(tmp_path / "a.tape")
    assert (recovered.rows, recovered.cut) == (4, 2)
    assert (recovered.lost_requests, recovered.lost_reads) == (0, 0)
    tape = open_tape(tmp_path / "a.tape")
    assert sorted(r["outcome"] for r in tape.read(["outcome"]).to_pylist()) == [
        *["cut"] * 2,
        *["ok"] * 2,
    ]
    assert check(tape) == []


def test_a_block_that_kills_every_writer_is_given_up_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os\n"
        "import tokentape.traces.assemble as assemble\n"
        "take = assemble.Assembler.take\n"
        "def deadly(self, block):\n"
        "    if b'/v1/deadly' in bytes(block): os._exit(9)\n"
        "    take(self, block)\n"
        "assemble.Assembler.take = deadly\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    recorder = start(tmp_path / "a.tape", on_trouble=lambda _: None)
    now = time.monotonic_ns()
    finish(recorder, begin(recorder, now), now)
    recorder.flush()
    deadly = recorder.open(now, {"arrival_ns": now}, (b"GET", b"/v1/deadly", []))
    recorder.close(deadly, now, {"outcome": "ok"})
    wait_for(lambda: ready(recorder) and recorder._deaths > 1, "the block is given up")
    finish(recorder, begin(recorder, now + 1), now + 1)
    summary = recorder.finish()
    assert summary.seen == summary.rows + sum(summary.losses.values()) == 3
    assert summary.losses["killed"] <= 2
    assert check(open_tape(tmp_path / "a.tape"))[0].severity == "warning"


def test_a_successor_that_finds_the_disk_full_goes_on_and_takes_over_when_there_is_room(
    small_disk: Path,
) -> None:
    tape = small_disk / "a.tape"
    recorder = start(tape, on_trouble=lambda _: None)
    now = time.monotonic_ns()
    finish(recorder, begin(recorder, now), now)
    stream = begin(recorder, now + 1)
    journaled(recorder, 5)
    filler = fill(small_disk)
    kill(recorder)
    wait_for(lambda: ready(recorder), "the successor is there")
    finish(recorder, stream, now + 1)
    recorder.flush()
    filler.unlink()
    summary = recorder.finish()
    assert (summary.seen, summary.rows, summary.losses) == (2, 2, {})
    assert check(open_tape(tape)) == []
    assert [f.name for f in (tape / "journal").iterdir()] == ["lock"]


def test_what_the_dead_writer_had_sealed_is_on_the_tape_once(tmp_path: Path) -> None:
    recorder = start(tmp_path / "a.tape", on_trouble=lambda _: None)
    now = time.monotonic_ns()
    stream = begin(recorder, now)
    many = SEAL_BYTES // _ROW_BYTES + 100
    for n in range(many):
        recorder.close(recorder.open(now + n, {"arrival_ns": now + n}), now + n, {"outcome": "ok"})
        if n % 5000 == 0:
            recorder.flush()
    recorder.flush()
    wait_for(lambda: open_tape(recorder.tape).segments != [], "a segment is sealed")
    finish(recorder, begin(recorder, now + many), now + many)
    journaled(recorder, 5)
    kill(recorder)
    finish(recorder, stream, now)
    summary = recorder.finish()
    assert (summary.seen, summary.rows, summary.events) == (many + 2, many + 2, 6)
    tape = open_tape(recorder.tape)
    assert (tape.rows, len({s.metadata["incarnation"] for s in tape.segments})) == (many + 2, 2)
    assert check(tape) == []


def test_slots_are_freed_by_bytes_as_well_as_by_time(tmp_path: Path) -> None:
    recorder = start(tmp_path / "a.tape")
    now = time.monotonic_ns()
    stream = recorder.open(now, {"arrival_ns": now}, HEAD)
    piece = b"x" * blocks.MAX_PAYLOAD_BYTES
    deadline = time.monotonic() + 20
    for _ in range(4 * blocks.SLOTS * 4):  # four times the memory, as fast as it is read
        recorder.request_body(stream, now, piece)
        while recorder._waiting:
            recorder.flush()
            assert time.monotonic() < deadline
    recorder.close(stream, now, {"outcome": "client_abort"})
    assert recorder.finish().rows == 1
