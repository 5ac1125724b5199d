"""Recording with the real writer process: what survives when something dies or stalls."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conftest import fill
from tokentape.traces import assemble, blocks
from tokentape.traces.check import check
from tokentape.traces.clock import TapeClock
from tokentape.traces.errors import TapeError
from tokentape.traces.privacy import Privacy
from tokentape.traces.reader import open_tape
from tokentape.traces.recording import MEMORY_BYTES, STREAM_BYTES, Recorder
from tokentape.traces.recover import recover

HEAD = (
    b"POST",
    b"/v1/completions?api_key=sk-canary",
    [(b"Authorization", b"Bearer sk-canary"), (b"X-Session-Id", b"sk-canary")],
)
BODY = json.dumps({"model": "m", "prompt": "word " * 300, "stream": True, "max_tokens": 3}).encode()
SSE = [(b"Content-Type", b"text/event-stream")]


def event(text: str) -> bytes:
    return b'data: {"id":"c-1","choices":[{"index":0,"text":"%s"}]}\n\n' % text.encode()


def start(tape: Path, **options: Any) -> Recorder:
    arguments = {"role": "capture", "command": [], "options": {}, "facts": {}, "key": b"k" * 32}
    return Recorder.start(tape, **(arguments | options))


def begin(recorder: Recorder, now: int) -> int:
    """Open one streamed request and send its first two events."""
    stream = recorder.open(now, {"arrival_ns": now}, HEAD)
    recorder.request_body(stream, now, BODY)
    recorder.mark(stream, "request_end_ns", now)
    recorder.mark(stream, "send_ns", now + 1_000_000)
    recorder.reply_head(stream, now + 2_000_000, 200, SSE)
    recorder.reply_data(stream, now + 3_000_000, event("a"))
    recorder.reply_data(stream, now + 4_000_000, event("b"))
    return stream


def finish(recorder: Recorder, stream: int, now: int) -> None:
    recorder.reply_data(stream, now + 5_000_000, event("c") + b"data: [DONE]\n\n")
    row = {"outcome": "ok", "send_ns": now + 1_000_000, "send_end_ns": now + 1_000_000}
    recorder.close(stream, now + 6_000_000, row)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.01)


def wait_for_unlock(tape: Path) -> None:
    """Block until nobody writes the tape."""
    with (tape / "journal" / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)


def test_what_is_recorded_comes_back_as_a_row(tmp_path: Path) -> None:
    recorder = start(tmp_path / "a.tape")
    now = time.monotonic_ns()
    finish(recorder, begin(recorder, now), now)
    recorder.telemetry(now, now + 5, "http://engine/metrics", [("vllm:x", "{}", 2.5)])
    summary = recorder.finish({"note": "done"})
    assert (summary.seen, summary.rows, summary.events, summary.losses) == (1, 1, 3, {})
    tape = open_tape(tmp_path / "a.tape")
    (row,) = tape.read().to_pylist()
    assert row["off_us"] == [2000, 3000, 4000]
    assert row["endpoint"] == "/v1/completions"
    assert row["model_requested"] == "m"
    assert len(row["block_hashes"]) == 2
    assert row["outcome"] == "ok"
    assert tape.facts["note"] == "done"
    assert len(tape.telemetry_files) == 1
    assert check(tape) == []
    assert list((tape.path / "journal").iterdir()) == [tape.path / "journal" / "lock"]


def test_what_the_head_of_a_reply_says_of_the_servers_times_is_in_the_row(tmp_path: Path) -> None:
    recorder = start(tmp_path / "a.tape")
    now = time.monotonic_ns()
    stream = recorder.open(now, {"arrival_ns": now}, (b"POST", b"/generate", []))
    recorder.request_body(stream, now, b'{"inputs": "hi"}')
    recorder.mark(stream, "request_end_ns", now)
    told = [(b"X-Queue-Time", b"12"), (b"X-Inference-Time", b"300")]
    recorder.reply_head(stream, now, 200, [(b"Content-Type", b"application/json"), *told])
    recorder.reply_data(stream, now, b'{"generated_text": "x"}')
    recorder.close(stream, now, {"outcome": "ok", "send_ns": now, "send_end_ns": now})
    recorder.finish({})
    (row,) = open_tape(tmp_path / "a.tape").read().to_pylist()
    assert (row["wire_format"], row["server_queue_ns"]) == ("tgi", 12_000_000)
    assert row["server_timing_source"] == "headers"


@pytest.mark.parametrize(
    ("last", "outcome"),
    [(b"data: [DONE]\n\n", "ok"), (event("d"), "client_abort")],
    ids=["behind the end mark", "before it"],
)
def test_a_client_that_hangs_up_has_aborted_only_what_it_did_not_get(
    tmp_path: Path, last: bytes, outcome: str
) -> None:
    recorder = start(tmp_path / "a.tape")
    now = time.monotonic_ns()
    stream = begin(recorder, now)
    recorder.reply_data(stream, now + 5_000_000, last)
    recorder.close(stream, now + 6_000_000, {"outcome": "client_abort"})
    recorder.finish()
    (row,) = open_tape(tmp_path / "a.tape").read(["outcome", "parse_status"]).to_pylist()
    assert row == {"outcome": outcome, "parse_status": "ok" if outcome == "ok" else "partial"}


def test_no_secret_reaches_any_file_in_any_mode(tmp_path: Path) -> None:
    for mode in ("none", "structure"):
        tape = tmp_path / f"{mode}.tape"
        recorder = start(tape, content=mode)
        now = time.monotonic_ns()
        stream = recorder.open(now, {}, HEAD)
        secret = {"model": "m", "prompt": "sk-canary", "user": "sk-canary", "stop": ["sk-canary"]}
        recorder.request_body(stream, now, json.dumps(secret).encode())
        recorder.mark(stream, "request_end_ns", now)
        recorder.reply_head(stream, now, 400, [(b"X-Echo", b"sk-canary")])
        recorder.reply_data(stream, now, b'{"error": {"message": "sk-canary", "type": "bad"}}')
        recorder.flush()
        wait_for(lambda t=tape: b"arrival_ns" in journal_bytes(t), "journaled")  # type: ignore[misc]
        assert b"canary" not in journal_bytes(tape)
        recorder.close(stream, now, {"outcome": "ok"})
        recorder.finish()
        files = [p for p in tmp_path.rglob("*") if p.is_file()]
        assert len(files) >= 3
        for path in files:
            assert b"canary" not in path.read_bytes(), path
        columns = open_tape(tape).read(["block_hashes", "outcome"]).to_pylist()
        assert columns == [
            {"block_hashes": None if mode == "none" else [], "outcome": "http_error"}
        ]


def journal_bytes(tape: Path) -> bytes:
    return b"".join(p.read_bytes() for p in (tape / "journal").glob("*.journal"))


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_traces_recording import begin, finish, start
recorder = start(Path(sys.argv[1]))
now = time.monotonic_ns()
finish(recorder, begin(recorder, now), now)
begin(recorder, now)
recorder.flush()
print(recorder._life.process.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def hot_process(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has recorded one finished and one open request, and waits."""
    here = str(Path(__file__).parent)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "a.tape"), here],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        yield process
        process.kill()


def test_after_kill_9_of_the_hot_process_the_writer_seals_everything(
    tmp_path: Path, hot_process: subprocess.Popen[bytes]
) -> None:
    assert hot_process.stdout is not None
    hot_process.stdout.readline()
    hot_process.kill()
    wait_for_unlock(tmp_path / "a.tape")
    tape = open_tape(tmp_path / "a.tape")
    rows = tape.read(["outcome", "off_us"]).to_pylist()
    assert sorted(r["outcome"] for r in rows) == ["cut", "ok"]
    assert next(r for r in rows if r["outcome"] == "cut")["off_us"] == [2000, 3000]


def test_after_kill_9_of_both_processes_the_journal_holds_all_and_recover_seals_it(
    tmp_path: Path, hot_process: subprocess.Popen[bytes]
) -> None:
    assert hot_process.stdout is not None
    writer_pid = int(hot_process.stdout.readline())
    tape = tmp_path / "a.tape"
    wait_for(lambda: open_tape(tape).unsealed_rows == 1, "the finished row is in the journal")
    wait_for(lambda: len(journal_bytes(tape)) > 1500, "the open request's events are there")
    os.kill(writer_pid, signal.SIGKILL)
    hot_process.kill()
    wait_for_unlock(tape)
    assert (open_tape(tape).rows, open_tape(tape).open_rows) == (0, 1)
    assert any("not sealed" in f.what for f in check(open_tape(tape)))
    recovered = recover(tape)
    assert (recovered.rows, recovered.cut) == (2, 1)
    rows = open_tape(tape).read().to_pylist()
    cut = next(r for r in rows if r["outcome"] == "cut")
    assert cut["off_us"] == [2000, 3000]
    assert cut["model_requested"] == "m"
    assert check(open_tape(tape)) == []


def test_a_stuck_writer_bounds_memory_then_drops_detail_and_counts_it(tmp_path: Path) -> None:
    recorder = start(tmp_path / "a.tape")
    os.kill(recorder._life.process.pid, signal.SIGSTOP)
    now = time.monotonic_ns()
    streams = [begin(recorder, now) for _ in range(30)]
    piece = event("x" * 100_000)
    pieces = 2 * MEMORY_BYTES // len(piece) // len(streams)
    assert pieces * len(piece) < STREAM_BYTES
    for _ in range(pieces):
        for stream in streams:
            recorder.reply_data(stream, now + 5_000_000, piece)
    assert MEMORY_BYTES < recorder._waiting_bytes < MEMORY_BYTES + (2 << 20)
    os.kill(recorder._life.process.pid, signal.SIGCONT)
    for stream in streams:
        recorder.close(stream, now + 6_000_000, {"outcome": "ok", "send_ns": now + 1_000_000})
    summary = recorder.finish()
    assert (summary.seen, summary.rows) == (len(streams), len(streams))
    for row in open_tape(tmp_path / "a.tape").read(["events_dropped", "off_us"]).to_pylist():
        assert row["events_dropped"] > 0
        assert row["events_dropped"] + len(row["off_us"]) == pieces + 2


def test_a_flood_while_the_writer_is_stuck_costs_its_own_detail_and_nobody_elses(
    tmp_path: Path,
) -> None:
    recorder = start(tmp_path / "a.tape")
    os.kill(recorder._life.process.pid, signal.SIGSTOP)
    now = time.monotonic_ns()
    flood, quiet = begin(recorder, now), begin(recorder, now + 1_000)
    piece = b"%x\r\n%s\r\n" % (len(event("x" * 100_000)), event("x" * 100_000))
    pieces = 2 * MEMORY_BYTES // len(piece)
    for _ in range(pieces):
        recorder.reply_chunked(flood, now + 5_000_000, piece)
    recorder.reply_chunked(quiet, now + 5_000_000, piece)
    assert recorder._waiting_bytes < STREAM_BYTES + (2 << 20)
    os.kill(recorder._life.process.pid, signal.SIGCONT)
    while recorder._waiting:
        recorder.flush()
        time.sleep(0.001)
    recorder.reply_chunked(flood, now + 6_000_000, piece)  # the writer is back: recorded again
    for stream in (flood, quiet):
        recorder.close(stream, now + 7_000_000, {"outcome": "ok", "send_ns": now + 1_000_000})
    recorder.finish()
    columns = ["events_dropped", "off_us", "parse_status"]
    flooded, kept = open_tape(tmp_path / "a.tape").read(columns).to_pylist()
    assert flooded["events_dropped"] + len(flooded["off_us"]) == pieces + 1 + 2
    assert (flooded["off_us"][-1], flooded["parse_status"]) == (5_000, "partial")
    assert (kept["events_dropped"], len(kept["off_us"])) == (None, 3)


def test_a_reply_without_end_is_kept_up_to_a_bound_and_the_rest_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "MAX_EVENTS", 100)
    clock, now = TapeClock.start(0, "w0"), time.monotonic_ns()
    found: list[dict[str, Any]] = []

    class Sink:
        def __getattr__(self, name: str) -> Any:
            return lambda *a: found.append(a[1]) if name == "finished" else None

    assembler = assemble.Assembler(clock, Privacy("none", bytes(32)), Sink())
    records = [(blocks.OPEN, msgspec.msgpack.encode([{}, HEAD]))]
    records += [(blocks.REQUEST_BODY, BODY), (blocks.MARK, b"request_end_ns")]
    head = [200, [(b"content-type", b"text/event-stream")]]
    records += [(blocks.REPLY_HEAD, msgspec.msgpack.encode(head))]
    records += [(blocks.REPLY_DATA, event("x"))] * 300
    records += [(blocks.CLOSE, msgspec.msgpack.encode({"outcome": "ok"}))]
    block = b"".join(
        blocks.RECORD.pack(kind, 1, now + n, blocks.NO_STAMP, len(payload)) + payload
        for n, (kind, payload) in enumerate(records)
    )
    assembler.take(memoryview(block))
    (row,) = found
    assert len(row["off_us"]) + row["events_dropped"] == 300
    assert len(row["off_us"]) == 100
    assert (row["parse_status"], row.get("output_tokens")) == ("truncated", None)


def test_a_second_life_appends_and_seals_what_the_first_left(tmp_path: Path) -> None:
    tape = tmp_path / "a.tape"
    now = time.monotonic_ns()
    for _ in range(2):
        recorder = start(tape, append=True)
        finish(recorder, begin(recorder, now), now)
        recorder.finish()
    opened = open_tape(tape)
    assert opened.rows == 2
    assert len({s.metadata["incarnation"] for s in opened.segments}) == 2
    with pytest.raises(TapeError, match="another key"):
        start(tape, append=True, facts={"key_id": "0123"})
    with pytest.raises(TapeError, match="is a capture"):
        start(tape, append=True, role="replay")
    with pytest.raises(TapeError, match="--force"):
        start(tape)


def test_a_full_disk_loses_rows_by_count_and_keeps_what_is_journaled(small_disk: Path) -> None:
    troubles: list[str] = []
    tape = small_disk / "a.tape"
    recorder = start(tape, on_trouble=troubles.append)
    now = time.monotonic_ns()
    finish(recorder, begin(recorder, now), now)
    recorder.flush()
    wait_for(lambda: open_tape(tape).unsealed_rows == 1, "the first row is journaled")
    filler = fill(small_disk)
    for n in range(50):
        finish(recorder, begin(recorder, now + n), now + n)
    summary = recorder.finish()
    assert summary.seen == 51
    assert summary.unsealed >= 1
    assert summary.losses == {"disk_full": 51 - summary.unsealed}
    assert any("No space left" in t and "traffic goes on" in t for t in troubles)
    assert open_tape(tape).losses == summary.losses
    assert open_tape(tape).unsealed_rows == summary.unsealed
    filler.unlink()
    recovered = recover(tape)
    assert recovered.rows - recovered.cut == summary.unsealed
    assert open_tape(tape).rows + sum(open_tape(tape).losses.values()) == 51
    assert not [f for f in check(open_tape(tape)) if f.severity == "error"]


ODD = {
    "half a surrogate pair in the request": (b'{"model":"\\ud800","prompt":"a"}', 200, b"{}"),
    "half a surrogate pair in the reply": (b"{}", 200, b'{"id":"\\udc00","model":"\\ud800"}'),
    "a negative token id": (b'{"prompt":[-1]}', 200, b"{}"),
    "a token id past 32 bits": (b'{"prompt":[4294967296]}', 200, b"{}"),
    "numbers past 64 bits": (b'{"max_tokens":1e300,"seed":123456789012345678901}', 200, b"{}"),
    "a status past 16 bits": (b"{}", 70_000, b"{}"),
    "deep nesting": (b'{"prompt":' + b"[" * 5000 + b"]" * 5000 + b"}", 200, b"[" * 5000),
}


@pytest.mark.parametrize("name", ODD)
def test_no_request_or_reply_can_end_the_recording_of_others(tmp_path: Path, name: str) -> None:
    body, status, reply = ODD[name]
    recorder = start(tmp_path / "a.tape")
    now = time.monotonic_ns()
    for n in range(3):
        stream = recorder.open(now + n, {"arrival_ns": now + n}, HEAD)
        recorder.request_body(stream, now, body if n == 1 else BODY)
        recorder.mark(stream, "request_end_ns", now)
        content = [(b"content-type", b"application/json")]
        recorder.reply_head(stream, now, status if n == 1 else 200, content)
        recorder.reply_data(stream, now, reply)
        recorder.close(stream, now, {"outcome": "ok"})
    summary = recorder.finish()
    assert (summary.seen, summary.rows, summary.losses) == (3, 3, {})


def test_heads_of_any_size_are_cut_and_never_overrun_a_block(tmp_path: Path) -> None:
    recorder = start(tmp_path / "a.tape")
    now = time.monotonic_ns()
    huge = [(b"x-huge", b"h" * 1_300_000), (b"authorization", b"Bearer x")]
    for n in range(40):
        stream = recorder.open(now + n, {}, (b"POST", b"/v1/completions?" + b"q" * 3_000_000, huge))
        recorder.reply_head(stream, now, 200, huge)
        recorder.close(stream, now, {"outcome": "ok"})
    assert recorder.finish().rows == 40
    rows = open_tape(tmp_path / "a.tape").read(["tenant_digest", "endpoint"]).to_pylist()
    assert {len(r["tenant_digest"]) for r in rows} == {16}
    assert {r["endpoint"] for r in rows} == {"/v1/completions"}


def test_blocks_on_their_way_survive_the_death_of_the_hot_process(tmp_path: Path) -> None:
    code = """
import os, select, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_traces_recording import begin, finish, start
recorder = start(Path(sys.argv[1]))
print(recorder._life.process.pid, flush=True)
now = time.monotonic_ns()
for n in range(60):
    if n == 20:
        recorder._hand_over()
        select.select([recorder._life.channel.sock], [], [])  # a note for us, which we leave unread
        os.kill(recorder._life.process.pid, signal.SIGSTOP)
    finish(recorder, begin(recorder, now + n), now + n)
    if n == 40:
        recorder._hand_over()
recorder._hand_over()
os.kill(os.getpid(), signal.SIGKILL)
"""
    tape = tmp_path / "a.tape"
    command = [sys.executable, "-c", code, str(tape), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as hot:
        assert hot.stdout is not None
        writer_pid = int(hot.stdout.readline())
        assert hot.wait(30) == -signal.SIGKILL
    os.kill(writer_pid, signal.SIGCONT)
    wait_for_unlock(tape)
    assert open_tape(tape).rows == 60


def test_pieces_that_were_dropped_leave_no_false_prompt_structure(tmp_path: Path) -> None:
    recorder = start(tmp_path / "a.tape")
    os.kill(recorder._life.process.pid, signal.SIGSTOP)
    now = time.monotonic_ns()
    fillers = [begin(recorder, now) for _ in range(30)]
    while recorder._waiting_bytes <= MEMORY_BYTES:
        for filler in fillers:
            recorder.reply_data(filler, now, b"x" * 200_000)
    stream = recorder.open(now + 1, {}, HEAD)
    recorder.request_body(stream, now, BODY)
    os.kill(recorder._life.process.pid, signal.SIGCONT)
    recorder.mark(stream, "request_end_ns", now)
    recorder.close(stream, now, {"outcome": "client_abort"})
    for filler in fillers:
        recorder.close(filler, now, {"outcome": "client_abort"})
    recorder.finish()
    columns = ["block_hashes", "prompt_bytes", "parse_status", "events_dropped"]
    rows = open_tape(tmp_path / "a.tape").read(columns).to_pylist()
    assert rows[0]["block_hashes"] is not None
    assert rows[-1] == {
        "block_hashes": None,
        "prompt_bytes": None,
        "parse_status": "partial",
        "events_dropped": None,
    }


def test_a_path_or_a_method_cannot_carry_text_into_mode_none(tmp_path: Path) -> None:
    recorder = start(tmp_path / "a.tape", content="none")
    now = time.monotonic_ns()
    odd = [(b"traceparent", b"a-sk-canary-b-c")]
    stream = recorder.open(now, {}, (b"sk-canary", b"/bot-sk-canary/x", odd))
    recorder.reply_head(stream, now, 200, [(b"content-encoding", b"sk-canary")])
    recorder.close(stream, now, {"outcome": "ok"})
    recorder.finish()
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        assert b"canary" not in path.read_bytes(), path


def test_without_event_sizes_gaps_per_event_stay_and_gaps_per_token_are_unknown(
    tmp_path: Path,
) -> None:
    tape, now = tmp_path / "a.tape", time.monotonic_ns()
    recorder = start(tape, facts={"event_sizes": False})
    finish(recorder, begin(recorder, now), now)
    recorder.finish()
    opened = open_tape(tape)
    (row,) = opened.read().to_pylist()
    assert (row["ntok"], row["ntok_source"], row["output_tokens"]) == (None, "withheld", 3)
    assert len(row["off_us"]) == 3
    assert [f for f in check(opened) if f.severity == "error"] == []
    assert opened.sql("SELECT count(*) FROM gaps").fetchall() == [(2,)]
    assert opened.sql("SELECT count(*) FROM itl").fetchall() == [(0,)]
    assert opened.sql("SELECT count(*) FROM tpot WHERE tpot_ns IS NOT NULL").fetchall() == [(1,)]
