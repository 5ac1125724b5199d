"""Traffic passes whatever breaks beside it: the recorder, mitmproxy's patience, its own machine."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from proxied import chunk, finished_rows, post, receive, scripted, talk
from tokentape.analysis.session import connect
from tokentape.proxy import master
from tokentape.proxy.addon import Capture
from tokentape.proxy.options import CaptureOptions
from tokentape.proxy.supervisor import bind
from tokentape.traces.reader import open_tape

BODY = json.dumps({"model": "m", "prompt": "a b", "stream": True}).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"
WHOLE = HEAD + LAST
EVENTS = 50


def event(n: int) -> bytes:
    text = b'data: {"id":"c","model":"m","choices":[{"index":0,"text":"t%d"}]}\n\n' % n
    return chunk(text)


@dataclass
class Troubled:
    """A running troubled worker; `counted` is there when it has ended."""

    host: str
    port: int
    pid: int
    counted: dict[str, Any] = field(default_factory=dict)
    said: str = ""


@contextlib.contextmanager
def troubled(upstream: str, tape: Path, *trouble: str) -> Iterator[Troubled]:
    script = Path(__file__).with_name("troubled_worker.py")
    process = subprocess.Popen(
        [sys.executable, str(script), upstream, str(tape), *trouble],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        worker = Troubled("127.0.0.1", int(process.stdout.readline()), process.pid)
        yield worker
        process.send_signal(signal.SIGTERM)
        out, worker.said = process.communicate(timeout=60)
        worker.counted = json.loads(out)
    finally:
        process.kill()
        process.communicate()


def step_by_step(taken: threading.Semaphore) -> Any:
    """A server that sends an event only when the client has the one before."""

    def script(connection: socket.socket, request: bytes) -> None:
        assert request.endswith(BODY)
        connection.sendall(HEAD)
        for n in range(EVENTS):
            assert taken.acquire(timeout=20), f"event {n - 1} never reached the client"
            connection.sendall(event(n))
        connection.sendall(LAST)

    return script


METHODS = ("open", "request_body", "mark", "reply_head", "reply_data", "reply_chunked", "close")


@pytest.mark.parametrize(
    ("method", "nth"), [*((method, 0) for method in METHODS), ("mark", 3), ("reply_chunked", 3)]
)
def test_a_recorder_that_raises_costs_no_byte_and_holds_none_back(
    tmp_path: Path, method: str, nth: int
) -> None:
    taken = threading.Semaphore(0)
    with (
        scripted(step_by_step(taken)) as upstream,
        troubled(upstream, tmp_path / "a.tape", method, str(nth)) as worker,
        socket.create_connection((worker.host, worker.port), timeout=20) as client,
    ):
        for _ in range(2):  # the connection goes on to be used
            client.sendall(post("/v1/completions", BODY, close=False))
            assert receive(client, len(HEAD)) == HEAD
            for n in range(EVENTS):
                taken.release()
                assert receive(client, len(event(n))) == event(n)
            assert receive(client, len(LAST)) == LAST
    calls = {"reply_data": 0, "reply_chunked": 2 * EVENTS, "mark": 4}.get(method, 2)
    assert (worker.counted["errors"] > 0) == (calls >= max(nth, 1))
    assert worker.counted["relayed"] > 0 or method in {"mark", "reply_head"}


def test_a_long_stream_outlives_mitmproxys_patience_on_the_fast_path(tmp_path: Path) -> None:
    every_s, count = 0.25, 14  # 3.5 s, of which mitmproxy itself sees the first and last event

    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(HEAD)
        for n in range(count):
            connection.sendall(event(n))
            time.sleep(every_s)
        connection.sendall(LAST)

    want = HEAD + b"".join(map(event, range(count))) + LAST
    with (
        scripted(script) as upstream,
        troubled(upstream, tmp_path / "a.tape", "watchdog") as worker,
    ):
        assert talk(worker.host, worker.port, post("/v1/completions", BODY), until=LAST) == want
    assert worker.counted["relayed"] > count // 2


def test_a_worker_that_runs_late_yields_its_recording_and_the_tape_shows_when(
    tmp_path: Path,
) -> None:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(WHOLE)

    def asked_until(recorded: bool) -> int:
        """Ask until requests are recorded, or not; how many were asked."""
        for n in range(1, 1000):
            before = len(finished_rows(tape))
            assert talk(worker.host, worker.port, post("/v1/completions", BODY), LAST) == WHOLE
            deadline = time.monotonic() + 1.5  # three times the journal's own pace
            while len(finished_rows(tape)) == before and time.monotonic() < deadline:
                time.sleep(0.02)
            if (len(finished_rows(tape)) > before) == recorded:
                return n
        raise AssertionError(f"recording never became {recorded}")

    tape = tmp_path / "a.tape"
    with scripted(script) as upstream, troubled(upstream, tape, "late") as worker:
        asked = asked_until(recorded=True)
        os.kill(worker.pid, signal.SIGUSR1)
        asked += asked_until(recorded=False)
        os.kill(worker.pid, signal.SIGUSR1)
        asked += asked_until(recorded=True)
    paused = worker.counted["losses"]["rows_paused"]
    assert paused > 0
    assert worker.counted["seen"] == asked == worker.counted["rows"] + paused
    with connect([tape]) as opened:
        seen = opened.sql("SELECT recording, requests_lost FROM coverage ORDER BY ts_ns").fetchall()
    states = [on for on, _ in groupby(on for on, _ in seen)]
    assert states[-3:] == [True, False, True]  # a loaded machine may be late at the start, too
    assert sum(lost for _, lost in seen) == paused


def test_a_silent_upstream_is_waited_for_a_day_and_connected_to_when_asked() -> None:
    (bound,) = bind("127.0.0.1", 0, 1, 16)
    with bound:

        async def options() -> Any:
            capture = Capture(None, "w0")  # type: ignore[arg-type]
            wanted = CaptureOptions("http://127.0.0.1:1", Path("unused"))
            return master.build(wanted, wanted.upstream, bound, capture).options

        found = asyncio.run(options())
    assert found.tcp_timeout == 86_400  # stock: 600 s, which a long prefill outlasts
    assert found.connection_strategy == "lazy"


def test_a_defect_of_mitmproxy_is_said_and_counted(tmp_path: Path) -> None:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(HEAD + event(0) + LAST)

    with (
        scripted(script) as upstream,
        troubled(upstream, tmp_path / "a.tape", "layer") as worker,
        socket.create_connection((worker.host, worker.port), timeout=20) as client,
    ):
        client.sendall(post("/v1/completions", BODY))
        client.settimeout(1)
        with contextlib.suppress(TimeoutError):
            client.recv(1)
    assert worker.counted["errors"] > 0
    assert "mitmproxy has crashed" in worker.said
    assert open_tape(tmp_path / "a.tape").rows == 1
