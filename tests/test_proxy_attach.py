"""Transparent mode in network namespaces of its own: hitless both ways, and never left behind."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from namespaces import HOST, Network, inside, network, someone_else
from proxied import (
    Proxied,
    capturing,
    children,
    chunk,
    finished_rows,
    post,
    receive,
    scripted,
    until,
)
from tokentape.cli import grammar
from tokentape.proxy.attach import AttachOptions, NoAnswerError, _check, _where, found_proxy, probe
from tokentape.traces.errors import UsageError

EXAMPLES = {name: example for name, _, example in grammar.VERBS}
LEASE_S = 3.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
FIRST = HEAD + chunk(b'data: {"choices":[{"index":0,"text":"one"}]}\n\n')
REST = chunk(b'data: {"choices":[{"index":0,"text":"two"}]}\n\n') + chunk(b"data: [DONE]\n\n")
REST += b"0\r\n\r\n"


class Server:
    """Sends half of a stream, and the rest when it is told; knows who has asked."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.peers: dict[str, int] = {}  # whose stream: the port of who asked for it

    def script(self, connection: socket.socket, request: bytes) -> None:
        if request.startswith(b"GET"):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            return
        name = json.loads(request.partition(b"\r\n\r\n")[2])["prompt"]
        self.peers[name] = connection.getpeername()[1]
        connection.sendall(FIRST)
        assert self.go.wait(30)
        connection.sendall(REST)


class Rig:
    """A server on a host, a capture of it, and clients outside and inside."""

    def __init__(self, net: Network, proxy: Proxied, server: Server, port: int) -> None:
        self.net, self.proxy, self.server, self.port = net, proxy, server, port

    def begin(self, name: str, *, local: bool = False) -> "Stream":
        """A stream to the server's own address, of which the first half has come."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(inside(self.net.host if local else self.net.outside))
            if local:
                stack.enter_context(someone_else())
            connection = socket.create_connection((HOST, self.port), timeout=20)
        body = json.dumps({"model": "m", "prompt": name, "stream": True}).encode()
        connection.sendall(post("/v1/completions", body))
        stream = Stream(name, connection)
        stream.got = receive(connection, len(FIRST))
        return stream

    def attach(self, *options: str) -> "subprocess.Popen[str]":
        """A watchdog that has said that clients are redirected."""
        line = EXAMPLES["attach"].replace("8000", str(self.port))
        line = line.replace("8080", str(self.proxy.port))
        with inside(self.net.host):
            watchdog = subprocess.Popen(
                [sys.executable, "-m", *line.split(), "--lease", f"{LEASE_S:g}s", *options],
                stderr=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert watchdog.stderr is not None
        said = watchdog.stderr.readline()
        assert "goes to" in said, said + watchdog.stderr.read()
        return watchdog

    def tokentape(self, *words: str) -> "subprocess.CompletedProcess[str]":
        with inside(self.net.host):
            return subprocess.run(
                [sys.executable, "-m", "tokentape", *words],
                capture_output=True,
                text=True,
                check=False,
            )

    def captured(self, stream: "Stream") -> bool:
        """Whether the server was asked by the proxy: it does not see the client's own port."""
        port: int = stream.connection.getsockname()[1]
        return port != self.server.peers[stream.name]

    def is_redirected(self) -> bool:
        """Whether a new stream goes through the proxy."""
        self.server.go.set()
        stream = self.begin("which way")
        found = self.captured(stream)
        assert stream.rest() == FIRST + REST
        return found

    def streams(self) -> list[str]:
        """Outcomes of the streams on the tape; its other rows are probes."""
        rows = finished_rows(self.proxy.tape)
        return [r["outcome"] for r in rows if r["operation"] != "get"]


class Stream:
    def __init__(self, name: str, connection: socket.socket) -> None:
        self.name, self.connection = name, connection
        self.got = b""

    def rest(self) -> bytes:
        with self.connection:
            self.got += receive(self.connection, len(REST))
        return self.got


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rigged(tmp_path_factory.mktemp("rig")) as rig:
        yield rig
        rig.proxy.stop()


@contextlib.contextmanager
def rigged(folder: Path) -> Iterator[Rig]:
    server = Server()
    with network() as net, contextlib.ExitStack() as stack:
        with inside(net.host):
            url = stack.enter_context(scripted(server.script, "0.0.0.0"))
            port = int(url.rpartition(":")[2])
            upstream = f"http://127.0.0.1:{port}"
            proxy = stack.enter_context(capturing(upstream, folder / "a.tape", listen="0.0.0.0:0"))
        yield Rig(net, proxy, server, port)


def left(watchdog: "subprocess.Popen[str]", code: int) -> str:
    out, error = watchdog.communicate(timeout=20)
    assert watchdog.returncode == code, out + error
    return out + error


def test_attach_and_detach_cut_no_stream_and_alter_no_byte(here: Rig) -> None:
    before = here.begin("direct, before")
    watchdog = here.attach()  # the first nat chain of this host: conntrack meets `before` now
    meanwhile = here.begin("through the proxy"), here.begin("from the host", local=True)
    again = here.tokentape("attach", "--port", str(here.port), "--to", str(here.proxy.port))
    assert (again.returncode, "attached already" in again.stderr) == (2, True)
    detached = here.tokentape(*EXAMPLES["detach"].replace("8000", str(here.port)).split()[1:])
    assert f"port {here.port} goes direct again" in detached.stdout
    after = here.begin("direct, after"), here.begin("direct, host", local=True)
    ways = [here.captured(s) for s in (before, *meanwhile, *after)]
    here.server.go.set()
    assert [s.rest() for s in (before, *meanwhile, *after)] == [FIRST + REST] * 5
    assert ways == [False, True, True, False, False]
    assert "detached by someone else" in left(watchdog, 0)
    assert here.tokentape("detach").stdout == "nothing was attached\n"
    until(lambda: here.streams() == ["ok", "ok"], "the captured ones are on the tape")


def test_the_redirect_of_a_killed_watchdog_ends_with_its_lease_and_can_be_made_again(
    here: Rig,
) -> None:
    watchdog = here.attach()
    assert here.is_redirected()
    watchdog.kill()
    left(watchdog, -signal.SIGKILL)
    here.server.go.clear()
    in_flight = here.begin("while nobody watches")
    assert here.captured(in_flight)
    until(lambda: not here.is_redirected(), "the kernel keeps the redirect", LEASE_S + 2)
    assert in_flight.rest() == FIRST + REST
    once_more = here.attach("--for", "600ms")
    assert here.is_redirected()
    assert "its time is over" in left(once_more, 0)
    assert not here.is_redirected()


def test_clients_go_direct_when_the_proxy_hangs(here: Rig) -> None:
    watchdog = here.attach()
    assert here.is_redirected()
    hung = [here.proxy.process.pid, *children(here.proxy.process.pid)]
    for pid in hung:
        os.kill(pid, signal.SIGSTOP)
    try:
        said = left(watchdog, 1)
        assert "no answer through the proxy" in said
        assert f"port {here.port} goes direct again" in said
        assert not here.is_redirected()
    finally:
        for pid in reversed(hung):
            os.kill(pid, signal.SIGCONT)


@pytest.mark.slow
def test_a_watchdog_that_was_stopped_takes_up_again_what_the_lease_has_ended(here: Rig) -> None:
    watchdog = here.attach()
    watchdog.send_signal(signal.SIGSTOP)
    until(lambda: not here.is_redirected(), "the kernel keeps the redirect", LEASE_S + 5)
    watchdog.send_signal(signal.SIGCONT)
    until(here.is_redirected, "it does not go on")
    watchdog.terminate()
    assert "told to stop" in left(watchdog, 0)
    assert not here.is_redirected()


@pytest.mark.slow
def test_clients_go_direct_when_the_proxy_is_dead(tmp_path: Path) -> None:
    with rigged(tmp_path) as here:
        watchdog = here.attach()
        assert here.is_redirected()
        for pid in [here.proxy.process.pid, *children(here.proxy.process.pid)]:
            os.kill(pid, signal.SIGKILL)
        assert "nobody listens on port" in left(watchdog, 1)
        assert not here.is_redirected()


def test_a_proxy_on_loopback_gets_the_clients_of_its_host_only() -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        found, workers = found_proxy(AttachOptions(1, proxy.getsockname()[1]))
    assert (found.local, found.remote, found.own_uid, workers) == (("ipv4",), (), os.getuid(), 1)


def test_who_listens_on_every_address_gets_every_client() -> None:
    with socket.create_server(("0.0.0.0", 0)) as proxy:
        found, _ = found_proxy(AttachOptions(1, proxy.getsockname()[1]))
    assert (found.local, found.remote) == (("ipv4",), ("ipv4",))


def test_attach_refuses_what_cannot_serve_clients() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(UsageError, match="nobody listens on that port; start"):
        found_proxy(AttachOptions(1, port))
    with (
        socket.create_server(("127.0.0.2", 0)) as apart,
        pytest.raises(UsageError, match="at loopback or every address"),
    ):
        found_proxy(AttachOptions(1, apart.getsockname()[1]))
    with pytest.raises(UsageError, match="is the port that clients use"):
        _check(AttachOptions(8000, 8000))
    with pytest.raises(UsageError, match="need 3s at least"):
        _check(AttachOptions(8000, 8080, lease_s=1))


@pytest.mark.parametrize("status", [200, 404, 502])
def test_a_probe_is_good_when_the_upstream_was_reached(status: int) -> None:
    def answer(connection: socket.socket, _: bytes) -> None:
        connection.sendall(b"HTTP/1.1 %d x\r\nContent-Length: 0\r\n\r\n" % status)

    with scripted(answer) as url:
        port = int(url.rpartition(":")[2])
        if status == 502:
            with pytest.raises(NoAnswerError, match="does not reach its upstream"):
                probe(port, "/health")
        else:
            assert probe(port, "/health") == status


def test_a_probe_tells_who_is_gone_from_who_hangs() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(NoAnswerError) as hung:
            probe(port, "/health", timeout_s=0.05)
    with pytest.raises(NoAnswerError) as gone:
        probe(port, "/health")
    assert (hung.value.gone, gone.value.gone) == (False, True)


@pytest.mark.parametrize(
    ("address", "where"),
    [
        ("00000000", "any"),
        ("0100007F", "loopback"),
        ("0" * 32, "any"),
        ("00000000000000000000000001000000", "loopback"),
        ("0101A8C0", "else"),
    ],
)
def test_addresses_of_proc_are_read(address: str, where: str) -> None:
    assert _where(address) == where
