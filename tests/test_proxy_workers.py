"""The processes of a capture: workers, their writers, the supervisor; killed, stopped, replaced."""

import contextlib
import json
import os
import random
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxied import (
    Proxied,
    Script,
    capturing,
    chunk,
    ended,
    post,
    receive,
    scripted,
    talk,
    until,
    workers,
    writers,
)
from tokentape.proxy.supervisor import bind
from tokentape.traces.check import check
from tokentape.traces.reader import open_tape
from tokentape.traces.recover import recover

BODY = json.dumps({"model": "m", "prompt": "a b", "stream": True}).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"data: [DONE]\n\n"


def event(n: int) -> bytes:
    return b'data: {"id":"c","model":"m","choices":[{"index":0,"text":"t%d"}]}\n\n' % n


def reply(events: int) -> bytes:
    return HEAD + b"".join(chunk(event(n)) for n in range(events)) + chunk(END) + b"0\r\n\r\n"


WHOLE = reply(3)


def whole(connection: socket.socket, _: bytes) -> None:
    connection.sendall(WHOLE)


@contextlib.contextmanager
def serving(tape: Path, *options: str, script: Script = whole) -> Iterator[Proxied]:
    with scripted(script) as upstream, capturing(upstream, tape, *options) as proxy:
        try:
            yield proxy
        finally:
            left = [proxy.process.pid, *workers(proxy), *writers(proxy)]
            if proxy.process.poll() is None:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


def ask(proxy: Proxied) -> bytes:
    return talk(proxy.host, proxy.port, post("/v1/completions", BODY))


def sound(tape: Path) -> None:
    """No error, no duplicate, and nothing that is neither a row nor counted."""
    opened = open_tape(tape)
    assert [f for f in check(opened) if f.severity == "error"] == []
    seen = sum(opened.facts.get("seen", {}).values())
    assert seen == opened.rows + sum(opened.losses.values()) + opened.unsealed_rows


def test_a_worker_that_is_killed_is_replaced_and_no_connection_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path / "a.tape") as proxy:
        for _ in range(5):
            assert ask(proxy) == WHOLE
        (before,) = workers(proxy)
        os.kill(before, signal.SIGKILL)
        for _ in range(5):  # the first ones wait in the backlog for the replacement
            assert ask(proxy) == WHOLE
        assert workers(proxy) != [before]
        said = proxy.stop()
    assert "10 requests seen, 10 rows" in said
    assert "died (signal 9)" in said
    assert len(proxy.rows()) == 10
    sound(proxy.tape)


def test_a_stream_that_was_open_in_a_killed_worker_is_a_cut_row(tmp_path: Path) -> None:
    sent = threading.Event()

    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(HEAD + chunk(event(0)))
        connection.sendall(chunk(event(1)))
        sent.set()
        connection.recv(1)  # until the proxy is gone

    with serving(tmp_path / "a.tape", script=script) as proxy:
        with socket.create_connection((proxy.host, proxy.port), timeout=10) as client:
            client.sendall(post("/v1/completions", BODY))
            want = HEAD + chunk(event(0)) + chunk(event(1))
            assert receive(client, len(want)) == want
            # Traffic goes first: that the next client is served shows that the last was recorded.
            with socket.create_connection((proxy.host, proxy.port), timeout=10) as other:
                other.sendall(post("/v1/completions", BODY))
                assert receive(other, len(HEAD)) == HEAD
                os.kill(workers(proxy)[0], signal.SIGKILL)
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
        proxy.stop()
    row, _ = sorted(proxy.rows(), key=lambda r: r["arrival_ns"])
    assert row["outcome"] == "cut"
    assert len(row["off_us"]) == 2  # what was in shared memory was not lost with the process
    sound(proxy.tape)


def test_several_workers_share_a_port_and_a_tape(tmp_path: Path) -> None:
    with serving(tmp_path / "a.tape", "--workers", "3") as proxy:
        assert len(workers(proxy)) == 3
        for _ in range(40):
            assert ask(proxy) == WHOLE
        said = proxy.stop()
    assert "40 requests seen, 40 rows" in said
    rows = proxy.rows()
    assert len(rows) == 40
    assert len({r["worker"] for r in rows}) > 1
    assert len({r["request_id"] for r in rows}) == 40
    sound(proxy.tape)


def test_a_writer_that_is_killed_costs_no_byte_no_row_and_no_event(tmp_path: Path) -> None:
    with serving(tmp_path / "a.tape") as proxy:
        for _ in range(5):
            assert ask(proxy) == WHOLE
        (first,) = writers(proxy)
        os.kill(first, signal.SIGKILL)
        for _ in range(5):
            assert ask(proxy) == WHOLE
        until(lambda: writers(proxy) not in ([], [first]), "no successor")
        until(lambda: open_tape(proxy.tape).unsealed_rows == 10, "nobody went on")
        for _ in range(5):
            assert ask(proxy) == WHOLE
        said = proxy.stop()
    assert "15 requests seen" in said
    assert "a new one is started" in said
    tape = open_tape(proxy.tape)
    assert (tape.rows, tape.losses, tape.facts.get("lost_reads")) == (15, {}, None)
    assert {r["outcome"] for r in tape.read(["outcome"]).to_pylist()} == {"ok"}
    sound(proxy.tape)


def test_when_everything_is_killed_recover_finds_what_was_journaled_and_counts_the_rest(
    tmp_path: Path,
) -> None:
    with serving(tmp_path / "a.tape", "--workers", "2") as proxy:
        for _ in range(10):
            assert ask(proxy) == WHOLE
        until(lambda: open_tape(proxy.tape).unsealed_rows == 10, "not journaled")
        for _ in range(3):
            assert ask(proxy) == WHOLE
        doomed = [proxy.process.pid, *workers(proxy), *writers(proxy)]
        for pid in doomed:
            os.kill(pid, signal.SIGKILL)
        until(lambda: all(ended(p) for p in doomed), "still alive")
    recovered = recover(proxy.tape)
    assert recovered.rows + recovered.lost_requests == 13
    assert recovered.rows >= 10
    assert recovered.lost_reads <= 3 * recovered.lost_requests + 3
    sound(proxy.tape)
    assert recover(proxy.tape).rows == 0


def test_workers_outlive_a_killed_supervisor_only_to_seal(tmp_path: Path) -> None:
    with serving(tmp_path / "a.tape") as proxy:
        for _ in range(4):
            assert ask(proxy) == WHOLE
        left = workers(proxy) + writers(proxy)
        proxy.process.kill()
        until(lambda: all(ended(p) for p in left), "they go on")
    assert open_tape(proxy.tape).rows == 4
    sound(proxy.tape)


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_whoever_is_killed_whenever_the_books_balance(tmp_path: Path, seed: int) -> None:
    """Writers and workers die at random moments under load; clients see only their own streams."""
    rng = random.Random(seed)
    stop = threading.Event()
    asked, odd = [0], list[bytes]()

    def load(proxy: Proxied) -> None:
        while not stop.is_set():
            try:
                got = ask(proxy)
            except OSError:
                got = b""
            asked[0] += 1
            if not WHOLE.startswith(got):
                odd.append(got)

    with serving(tmp_path / "a.tape", "--workers", "2") as proxy:
        threads = [threading.Thread(target=load, args=(proxy,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            goal = asked[0] + rng.randrange(5, 60)
            until(lambda goal=goal: asked[0] >= goal, "no progress")  # type: ignore[misc]
            victims = writers(proxy) if rng.random() < 0.6 else workers(proxy)
            if victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(victims), signal.SIGKILL)
        goal = asked[0] + 30
        until(lambda: asked[0] >= goal, "no progress")
        stop.set()
        for thread in threads:
            thread.join()
        said = proxy.stop()
    assert odd == []
    sound(proxy.tape)
    tape = open_tape(proxy.tape)
    assert f"{sum(tape.facts['seen'].values())} requests seen" in said
    assert tape.unsealed_rows == tape.open_rows == 0


def test_a_worker_that_cannot_come_up_ends_the_capture_with_its_reason(tmp_path: Path) -> None:
    tape = tmp_path / "a.tape"
    create = tape / "journal"
    create.mkdir(parents=True)
    (tape / "tape.json").write_text("{")
    with pytest.raises(AssertionError, match=r"tokentape: .*tape.json: damaged"):  # noqa: SIM117
        with capturing("http://127.0.0.1:9", tape):
            pass


def test_a_port_that_is_taken_is_taken_for_many_workers_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        bind("127.0.0.1", taken.getsockname()[1], 3, 16)


def test_with_fsync_the_tape_is_the_same(tmp_path: Path) -> None:
    with serving(tmp_path / "a.tape", "--fsync") as proxy:
        assert ask(proxy) == WHOLE
        proxy.stop()
    assert len(proxy.rows()) == 1
