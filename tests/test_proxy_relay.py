"""The fast path: which bytes take it, what it does to them (nothing), and how it yields."""

import asyncio
import functools
import json
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from mitmproxy.master import Master
from mitmproxy.options import Options
from mitmproxy.proxy.layers.http import HttpStream
from mitmproxy.proxy.server import ConnectionHandler

from proxied import Stage, capturing, chunk, post, receive, scripted, staged, talk
from tokentape.proxy import relay as relays
from tokentape.proxy import steps
from tokentape.proxy.pulse import CALM_BEATS, LATE_BEATS, LATE_S, Breaker
from tokentape.proxy.sockets import StampedSocket
from tokentape.traces.blocks import NO_STAMP
from tokentape.traces.check import check
from tokentape.traces.kernel_stamps import SO_TIMESTAMPNS, KernelClock, stamp_of
from tokentape.traces.reader import open_tape

BODY = json.dumps({"model": "m", "prompt": "a b", "stream": True, "max_tokens": 3}).encode()
SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)
END = b"data: [DONE]\n\n"


def event(text: str) -> bytes:
    return b'data: {"id":"c-1","model":"m","choices":[{"index":0,"text":"%s"}]}\n\n' % text.encode()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One proxy for the tests of this file that need none of their own."""
    tape = tmp_path_factory.mktemp("stage") / "a.tape"
    with staged(tape) as stage:
        yield stage
    assert check(open_tape(tape)) == []


class Lockstep:
    """Sends each piece only when the client has all before it, so that no two share a read."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self._received = 0
        self._more = threading.Condition()

    def script(self, connection: socket.socket, _: bytes) -> None:
        sent = 0
        for piece in self.pieces:
            with self._more:
                assert self._more.wait_for(functools.partial(self._has, sent), 10), "held back"
            connection.sendall(piece)
            sent += len(piece)

    def _has(self, sent: int) -> bool:
        return self._received >= sent

    def got(self, size: int) -> None:
        """The client has this many bytes."""
        with self._more:
            self._received = size
            self._more.notify()

    def ask(self, host: str, port: int, request: bytes) -> bytes:
        """What the client gets, to the last byte of the last piece."""
        total = sum(map(len, self.pieces))
        with socket.create_connection((host, port), timeout=10) as client:
            client.sendall(request)
            got = b""
            while len(got) < total and (piece := client.recv(65536)):
                got += piece
                self.got(len(got))
        return got


def telemetry(tape: Path) -> list[dict[str, Any]]:
    files = sorted((tape / "telemetry").glob("**/*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def last(tape: Path, name: str, labels: str = "{}") -> float:
    rows = [r for r in telemetry(tape) if r["name"] == name and r["labels"] == labels]
    return float(max(rows, key=lambda r: r["ts_ns"])["value"])


FRAMED = [
    SSE_HEAD,
    chunk(event("a")),
    b"%X;note=1\r\n" % len(event("b")) + event("b") + b"\r\n",
    b"00%x ; x=" % len(event("c")) + b"y" * 2000,
    b"\r\n" + event("c")[:9],
    event("c")[9:] + b"\r",
    b"\n" + chunk(event("d")) + chunk(event("e")) + b"4",
    b"",
    b"\r\ndata\r\n6\r\n: [X]\n\r\n",
    chunk(END) + b"0",
    b";last\r",
    b"\nX-Sum: 1\r\n",
    b"\r\n",
]


def test_chunk_framing_passes_byte_for_byte_however_it_is_cut(stage: Stage) -> None:
    pieces = [p for p in FRAMED if p]
    play = Lockstep(pieces)
    path = stage.play(play.script)
    assert play.ask(stage.host, stage.port, post(path, BODY, close=False)) == b"".join(pieces)
    (row,) = stage.rows(path)
    assert row["outcome"] == "ok"
    assert len(row["off_us"]) == 5
    assert row["response_bytes"] == sum(len(event(c)) for c in "abcde") + 10 + len(END)
    assert row["event_clock"] == row["arrival_clock"] == "kernel"
    assert row.get("deviations") is None


def test_a_chunk_that_comes_with_the_head_keeps_its_framing_as_well(stage: Stage) -> None:
    reply = SSE_HEAD + b"%04x;a\r\n" % len(event("a")) + event("a") + b"\r\n" + b"0;z\r\n\r\n"

    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(reply)

    path = stage.play(script)
    for _ in range(2):
        assert talk(stage.host, stage.port, post(path, BODY), until=b"0;z\r\n\r\n") == reply
    assert [len(r["off_us"]) for r in stage.rows(path, 2)] == [1, 1]


def test_all_but_the_first_and_last_read_of_a_stream_take_the_fast_path(tmp_path: Path) -> None:
    play = Lockstep([SSE_HEAD, *(chunk(event(f"t{n}")) for n in range(50)), b"0\r\n\r\n"])
    with scripted(play.script) as upstream, capturing(upstream, tmp_path / "a.tape") as proxy:
        got = play.ask(proxy.host, proxy.port, post("/v1/completions", BODY, close=False))
        assert got == b"".join(play.pieces)
        proxy.stop()
    assert last(proxy.tape, "tokentape_reply_reads_total", '{"path":"relay"}') >= 49
    assert last(proxy.tape, "tokentape_reply_reads_total", '{"path":"mitmproxy"}') <= 3
    assert last(proxy.tape, "tokentape_recording") == 1.0
    (row,) = proxy.rows()
    assert len(row["off_us"]) == 50
    assert row["lag_max_us"] < 1_000_000


def test_two_streams_on_one_connection_are_both_relayed(stage: Stage) -> None:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(SSE_HEAD)
        connection.sendall(chunk(event("a")))
        connection.sendall(chunk(END))
        connection.sendall(b"0\r\n\r\n")

    path = stage.play(script)
    whole = SSE_HEAD + chunk(event("a")) + chunk(END) + b"0\r\n\r\n"
    with socket.create_connection((stage.host, stage.port), timeout=10) as client:
        for _ in range(20):
            client.sendall(post(path, BODY, close=False))
            assert receive(client, len(whole)) == whole
    rows = stage.rows(path, 20)
    assert [r["upstream_reused"] for r in rows] == [False] + [True] * 19


@pytest.mark.parametrize("line", [b"-5\r\n", b"0x3\r\n", b"1_0\r\n", b" 3\r\n", b"\r\n", b"zz\r\n"])
def test_a_bad_size_line_reaches_the_client_and_hangs_nobody(stage: Stage, line: bytes) -> None:
    pieces = [SSE_HEAD, chunk(event("a")), chunk(event("b")), line + b"abc\r\n"]
    play = Lockstep(pieces)

    def script(connection: socket.socket, request: bytes) -> None:
        play.script(connection, request)
        connection.shutdown(socket.SHUT_RDWR)

    path = stage.play(script)
    asked = post(path, BODY, close=False)
    assert talk_in_lockstep(play, stage, asked) == b"".join(pieces)
    (row,) = stage.rows(path)
    assert row["outcome"] == "upstream_abort"
    assert len(row["off_us"]) == 2


def talk_in_lockstep(play: Lockstep, stage: Stage, request: bytes) -> bytes:
    with socket.create_connection((stage.host, stage.port), timeout=10) as client:
        client.sendall(request)
        got = b""
        while piece := client.recv(65536):
            got += piece
            play.got(len(got))
    return got


def test_a_client_that_asks_again_after_broken_framing_is_hung_up_on(stage: Stage) -> None:
    broken = SSE_HEAD + chunk(event("a")) + b" 3\r\nabc\r\n0\r\n\r\n"
    released = threading.Event()

    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(broken)
        assert connection.recv(1) == b""  # the proxy lets go of the upstream as well
        released.set()

    path = stage.play(script)
    with socket.create_connection((stage.host, stage.port), timeout=10) as client:
        client.sendall(post(path, BODY, close=False))
        assert receive(client, len(broken)) == broken
        client.sendall(post(path, BODY, close=False))
        assert client.recv(1) == b""
    assert released.wait(10)


def test_a_client_that_stops_reading_stops_the_upstream_and_the_time_is_kept(
    tmp_path: Path,
) -> None:
    piece = chunk(b": " + b"x" * 60_000 + b"\n\n")
    stalled = threading.Event()
    sent = [0]

    def script(connection: socket.socket, _: bytes) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        connection.sendall(SSE_HEAD)
        connection.setblocking(False)
        for _number in range(400):
            left = len(piece)
            while left:
                if not select.select([], [connection], [], 0.5)[1]:
                    stalled.set()
                    select.select([], [connection], [], 20)
                done = connection.send(piece[-left:])
                sent[0] += done
                left -= done
        connection.setblocking(True)
        connection.sendall(b"0\r\n\r\n")

    with scripted(script) as upstream, capturing(upstream, tmp_path / "a.tape") as proxy:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            client.settimeout(20)
            client.connect((proxy.host, proxy.port))
            client.sendall(post("/v1/completions", BODY, close=False))
            assert stalled.wait(20), "the upstream never had to wait"
            assert sent[0] < 20 << 20
            got = receive(client, len(SSE_HEAD) + 400 * len(piece) + 5)
        assert got == SSE_HEAD + piece * 400 + b"0\r\n\r\n"
        proxy.stop()
    (row,) = proxy.rows()
    assert row["outcome"] == "ok"
    assert row["backpressure_ns"] > 400_000_000
    assert row["response_bytes"] == 400 * 60_004


def test_a_client_that_leaves_ends_the_relay_and_the_upstream(stage: Stage) -> None:
    ended = threading.Event()

    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(SSE_HEAD)
        try:
            while True:
                connection.sendall(chunk(event("a")))
                select.select([connection], [], [], 0.005)
        except OSError:
            ended.set()
            raise

    path = stage.play(script)
    with socket.create_connection((stage.host, stage.port), timeout=10) as client:
        client.sendall(post(path, BODY, close=False))
        receive(client, 2000)
    assert ended.wait(10)
    (row,) = stage.rows(path)
    assert row["outcome"] == "client_abort"
    assert len(row["off_us"]) > 5


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("head", [SSE_HEAD, b"HTTP/1.0 200 OK\r\n\r\n"])
def test_an_upstream_that_resets_resets_the_client(stage: Stage, head: bytes) -> None:
    """Else a body that lasts until the end of the connection would look whole."""
    pieces = [head, *(chunk(event(c)) for c in "abc")]
    play = Lockstep(pieces)
    seen = threading.Event()

    def script(connection: socket.socket, request: bytes) -> None:
        play.script(connection, request)
        assert seen.wait(10)
        reset(connection)

    path = stage.play(script)
    with socket.create_connection((stage.host, stage.port), timeout=10) as client:
        client.sendall(post(path, BODY, close=False))
        whole = b"".join(pieces)
        got = b""
        while len(got) < len(whole) and (piece := client.recv(65536)):
            got += piece
            play.got(len(got))
        assert got == whole
        seen.set()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    (row,) = stage.rows(path)
    assert row["outcome"] == "upstream_abort"


def test_a_wall_clock_that_was_set_is_noticed_and_not_believed() -> None:
    clock = KernelClock()
    user_ns = time.monotonic_ns()
    wall = user_ns + clock.offset_ns
    assert clock.place(wall - 250_000, user_ns) == (user_ns - 250_000, 250)
    assert clock.place(0, user_ns) == (user_ns, NO_STAMP)
    ahead_ns = 3_600_000_000_000
    assert clock.place(wall + ahead_ns, user_ns) == (user_ns, NO_STAMP)
    assert clock.steps == 0  # the clock itself has not moved: the stamp was wrong
    clock.offset_ns -= ahead_ns  # as if it had been set since the last look
    assert clock.place(wall, user_ns) == (user_ns, NO_STAMP)
    assert clock.steps == 1
    assert clock.place(wall - 250_000, user_ns)[1] == pytest.approx(250, abs=30)


def test_a_read_that_really_was_late_keeps_its_stamp() -> None:
    clock = KernelClock()
    user_ns = time.monotonic_ns()
    at_ns, lag_us = clock.place(user_ns + clock.offset_ns - 3_000_000_000, user_ns)
    assert at_ns == pytest.approx(user_ns - 3_000_000_000, abs=100_000)
    assert lag_us == pytest.approx(3_000_000, abs=100)


def test_a_stamp_is_when_the_kernel_got_the_bytes_not_when_they_were_read() -> None:
    ours, theirs = socket.socket(), socket.socket()
    with ours, theirs:
        ours.bind(("127.0.0.1", 0))
        ours.listen()
        with StampedSocket(fileno=ours.detach()) as listener:
            theirs.connect(listener.getsockname())
            before = time.time_ns()
            theirs.sendall(b"x")
            after = time.time_ns()
            accepted, _ = listener.accept()
            with accepted:
                select.select([accepted], [], [], 5)
                deadline = time.monotonic() + 0.05
                while time.monotonic() < deadline:
                    pass
                assert accepted.recv(10) == b"x"
                assert isinstance(accepted, StampedSocket)
                assert before <= accepted.kernel_unix_ns <= after + 5_000_000
    assert stamp_of([]) == 0
    assert (
        stamp_of([(socket.SOL_SOCKET, SO_TIMESTAMPNS, struct.pack("@ll", 2, 5))]) == 2_000_000_005
    )


def test_recording_yields_to_lasting_lateness_only_and_comes_back() -> None:
    breaker = Breaker()
    for _ in range(LATE_BEATS - 1):
        assert not breaker.beat(LATE_S)
    assert not breaker.beat(0.0)
    states = [breaker.beat(LATE_S * 2) for _ in range(LATE_BEATS)]
    assert states == [False] * (LATE_BEATS - 1) + [True]
    states = [breaker.beat(0.0) for _ in range(CALM_BEATS)]
    assert states == [True] * (CALM_BEATS - 1) + [False]
    assert breaker.trips == 1


def test_without_a_private_part_everything_goes_mitmproxys_own_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert relays.missing_parts() == []
    monkeypatch.delattr(HttpStream, "state_stream_response_body")
    assert relays.missing_parts() == ["HttpStream.state_stream_response_body"]


def test_a_mitmproxy_that_nobody_has_read_keeps_its_own_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stock = ConnectionHandler.server_event
    monkeypatch.setattr(steps, "KNOWN_SOURCES", {})
    with closing(asyncio.new_event_loop()) as loop:  # a Master asks for one
        assert not steps.apply(Master(Options(), event_loop=loop))
    assert ConnectionHandler.server_event is stock
