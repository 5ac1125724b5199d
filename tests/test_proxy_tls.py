"""TLS on either side, and HTTP/2 on the listening one."""

import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import h2.config
import h2.connection
import h2.events
import pytest
from mitmproxy.proxy.layers.http._http_h2 import BufferedH2Connection

from certificates import Authority
from proxied import Proxied, Script, capturing, chunk, post, read_request, scripted, talk
from tokentape.proxy import http2
from tokentape.proxy.options import CaptureOptions, check_tls
from tokentape.traces.errors import UsageError

BODY = json.dumps({"model": "m", "prompt": "a b", "stream": True}).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"data: [DONE]\n\n"


def event(n: int) -> bytes:
    return b'data: {"id":"c","model":"m","choices":[{"index":0,"text":"t%d"}]}\n\n' % n


EVENTS = b"".join(event(n) for n in range(5)) + END
WHOLE = HEAD + b"".join(chunk(event(n)) for n in range(5)) + chunk(END) + b"0\r\n\r\n"


def whole(connection: Any, _: bytes) -> None:
    connection.sendall(WHOLE)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@contextlib.contextmanager
def tls_server(certificate: Path, name: str = "127.0.0.1") -> Iterator[str]:
    """An HTTPS server that answers each request with WHOLE."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.set_alpn_protocols(["h2", "http/1.1"])
    stop = threading.Event()

    def serve(listener: socket.socket) -> None:
        listener.settimeout(0.1)
        while not stop.is_set():
            with contextlib.suppress(OSError):
                plain, _ = listener.accept()
                plain.settimeout(10)
                with context.wrap_socket(plain, server_side=True) as connection:
                    assert connection.selected_alpn_protocol() == "http/1.1"
                    while request := read_request(connection):
                        whole(connection, request)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield f"https://{name}:{listener.getsockname()[1]}"
        finally:
            stop.set()
            thread.join()


def test_an_https_upstream_is_recorded_when_its_authority_is_given(
    tmp_path: Path, authority: Authority
) -> None:
    with (
        tls_server(authority.issue("127.0.0.1")) as upstream,
        capturing(upstream, tmp_path / "a.tape", "--upstream-ca", str(authority.ca)) as proxy,
    ):
        assert talk(proxy.host, proxy.port, post("/v1/completions", BODY)) == WHOLE
        proxy.stop()
    (row,) = proxy.rows()
    assert row["outcome"] == "ok"
    assert len(row["off_us"]) == 5
    assert row["event_clock"] == "kernel"
    assert row["tls_ns"] > 0
    assert row["connect_ns"] > 0


@pytest.mark.parametrize("wrong", ["authority", "name", "expired"])
def test_an_upstream_that_cannot_be_trusted_gets_no_request(
    tmp_path: Path, authority: Authority, wrong: str
) -> None:
    other = Authority(tmp_path, "another one")
    trusted = other if wrong == "authority" else authority
    certificate = authority.issue(
        "elsewhere" if wrong == "name" else "127.0.0.1", days=-1 if wrong == "expired" else 30
    )
    with (
        tls_server(certificate) as upstream,
        capturing(upstream, tmp_path / "a.tape", "--upstream-ca", str(trusted.ca)) as proxy,
    ):
        got = talk(proxy.host, proxy.port, post("/v1/completions", BODY))
        assert got.startswith(b"HTTP/1.1 502 ")
        said = proxy.stop()
    (row,) = proxy.rows()
    assert (row["outcome"], row["error_type"], row["origin"]) == ("connect_error", "tls", "proxy")
    assert said.count("--upstream-ca names the authority") == 1


def client_context(authority: Authority, *protocols: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.ca))
    context.set_alpn_protocols(list(protocols))
    return context


@contextlib.contextmanager
def tls_proxy(
    tape: Path, authority: Authority, *options: str, script: Script = whole
) -> Iterator[Proxied]:
    certificate = str(authority.issue("127.0.0.1"))
    with (
        scripted(script) as upstream,
        capturing(upstream, tape, "--cert", certificate, *options) as proxy,
    ):
        yield proxy


def test_clients_may_speak_tls_to_the_proxy(tmp_path: Path, authority: Authority) -> None:
    context = client_context(authority, "h2", "http/1.1")
    with tls_proxy(tmp_path / "a.tape", authority) as proxy:
        with (
            socket.create_connection((proxy.host, proxy.port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=proxy.host) as client,
        ):
            assert client.selected_alpn_protocol() == "http/1.1"
            client.sendall(post("/v1/completions", BODY))
            got = b""
            while piece := client.recv(65536):
                got += piece
        assert got == WHOLE
        proxy.stop()
    (row,) = proxy.rows()
    assert len(row["off_us"]) == 5


class H2Client:
    """A client of many streams; `replies` holds each stream's body so far."""

    def __init__(self, proxy: Proxied, authority: Authority, *, window: int = 65535) -> None:
        plain = socket.create_connection((proxy.host, proxy.port), timeout=30)
        context = client_context(authority, "h2")
        self.sock = context.wrap_socket(plain, server_hostname=proxy.host)
        assert self.sock.selected_alpn_protocol() == "h2"
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.local_settings.initial_window_size = window
        self.h2.initiate_connection()
        self.h2.increment_flow_control_window(1 << 28)  # of the connection: streams have their own
        self.authority = f"{proxy.host}:{proxy.port}"
        self.replies: dict[int, bytes] = {}
        self.statuses: dict[int, Any] = {}
        self.ended: set[int] = set()
        self.reset: set[int] = set()
        self.acknowledges: Callable[[int], bool] = lambda _: True
        self.sock.sendall(self.h2.data_to_send())

    def ask(self, path: str) -> int:
        stream: int = self.h2.get_next_available_stream_id()
        head = [(":method", "POST"), (":path", path), (":scheme", "https")]
        head += [(":authority", self.authority), ("content-length", str(len(BODY)))]
        self.h2.send_headers(stream, head)
        self.h2.send_data(stream, BODY, end_stream=True)
        self.replies[stream] = b""
        self.sock.sendall(self.h2.data_to_send())
        return stream

    def read_until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline, (len(self.ended), len(self.replies))
            data = self.sock.recv(65536)
            assert data, "the proxy hung up"
            for event in self.h2.receive_data(data):
                self._take(event)
            self.sock.sendall(self.h2.data_to_send())

    def _take(self, event: Any) -> None:
        if isinstance(event, h2.events.ResponseReceived):
            self.statuses[event.stream_id] = dict(event.headers)[":status"]  # type: ignore[index]
        elif isinstance(event, h2.events.DataReceived):
            self.replies[event.stream_id] += event.data
            if self.acknowledges(event.stream_id):
                size = event.flow_controlled_length
                self.h2.acknowledge_received_data(size, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            self.ended.add(event.stream_id)
        elif isinstance(event, h2.events.StreamReset):
            self.reset.add(event.stream_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


def test_two_hundred_streams_of_one_connection_run_at_once(
    tmp_path: Path, authority: Authority
) -> None:
    count = 200
    together = threading.Barrier(count, timeout=60)

    def script(connection: socket.socket, _: bytes) -> None:
        together.wait()  # breaks unless all of them have come through
        connection.sendall(WHOLE)

    tape = tmp_path / "a.tape"
    with tls_proxy(tape, authority, "--http2", script=script) as proxy:
        with H2Client(proxy, authority) as client:
            streams = [client.ask(f"/v1/completions?n={n}") for n in range(count)]
            client.read_until(lambda: len(client.ended) == count)
        assert set(client.statuses.values()) == {"200"}
        assert all(client.replies[s] == EVENTS for s in streams)
        said = proxy.stop()
    assert "nothing lost" in said
    rows = proxy.rows()
    assert len(rows) == count
    assert {(r["outcome"], len(r["off_us"]), r["conn_id"]) for r in rows} == {("ok", 5, 1)}


def test_an_http2_client_that_stops_reading_one_stream_holds_back_that_one_only(
    tmp_path: Path, authority: Authority
) -> None:
    flood = chunk(b": " + b"x" * 65_000 + b"\n\n")
    sent = [0]
    stalled = threading.Event()

    def script(connection: socket.socket, request: bytes) -> None:
        if b"flood" not in request.split(b"\r\n", 1)[0]:
            connection.sendall(WHOLE)
            return
        connection.sendall(HEAD)
        connection.settimeout(1.0)
        for _number in range(1000):
            try:
                connection.sendall(flood)
            except TimeoutError:
                stalled.set()
                return
            sent[0] += len(flood)

    tape = tmp_path / "a.tape"
    with tls_proxy(tape, authority, "--http2", script=script) as proxy:
        with H2Client(proxy, authority) as client:
            flooded = client.ask("/flood")
            client.acknowledges = lambda stream: stream != flooded
            for _ in range(20):
                asked = client.ask("/v1/completions")
                client.read_until(lambda asked=asked: asked in client.ended)  # type: ignore[misc]
                assert client.replies[asked] == EVENTS
            assert stalled.wait(30), f"the upstream was never held back: {sent[0]} bytes"
        proxy.stop()
    assert sent[0] < 16 << 20
    outcomes = [r["outcome"] for r in proxy.rows()]
    assert outcomes.count("ok") == 20
    assert len(outcomes) == 21


def test_curl_speaks_http2_and_upgrades_in_vain(tmp_path: Path, authority: Authority) -> None:
    curl = shutil.which("curl")
    if curl is None or b"HTTP2" not in subprocess.check_output([curl, "-V"]):
        pytest.skip("needs a curl with HTTP/2")
    common = [curl, "-sS", "-N", "--http2", "-w", "%{stderr}%{http_version}", "-d", BODY.decode()]
    with tls_proxy(tmp_path / "a.tape", authority, "--http2") as proxy:
        url = f"https://{proxy.host}:{proxy.port}/v1/completions"
        done = subprocess.run(
            [*common, "--cacert", str(authority.ca), url],
            capture_output=True,
            timeout=30,
            check=False,
        )
        assert (done.stdout, done.stderr) == (EVENTS, b"2")
        proxy.stop()
    with scripted(whole) as upstream, capturing(upstream, tmp_path / "b.tape") as proxy:
        done = subprocess.run(
            [*common, f"{proxy.url}/v1/completions"], capture_output=True, timeout=30, check=False
        )
        assert (done.stdout, done.stderr) == (EVENTS, b"1.1")
        proxy.stop()


def test_files_that_are_no_certificates_are_named(tmp_path: Path, authority: Authority) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("hello")

    def refused(**options: Any) -> str:
        with pytest.raises(UsageError) as caught:
            check_tls(CaptureOptions("http://x", tmp_path / "a.tape", **options))
        return str(caught.value)

    assert "No such file" in refused(certificate=tmp_path / "none.pem")
    assert "private key" in refused(certificate=nonsense)
    assert "private key" in refused(certificate=authority.ca)
    assert "certificates" in refused(upstream_ca=nonsense)
    assert "--cert" in refused(http2=True)
    check_tls(CaptureOptions("http://x", tmp_path, certificate=authority.issue("a")))


@pytest.mark.parametrize("listens", [True, False])
def test_parallel_http2_streams_without_a_reply_are_rows_that_say_why(
    tmp_path: Path, authority: Authority, listens: bool
) -> None:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.shutdown(socket.SHUT_RDWR)

    certificate = str(authority.issue("127.0.0.1"))
    with contextlib.ExitStack() as held:
        upstream = held.enter_context(scripted(script))
        if not listens:
            held.close()
        proxy = held.enter_context(
            capturing(upstream, tmp_path / "a.tape", "--cert", certificate, "--http2")
        )
        with H2Client(proxy, authority) as client:
            for _ in range(3):
                client.ask("/v1/completions")
            client.read_until(lambda: len(client.ended) == 3)
            assert set(client.statuses.values()) == {"502"}
        proxy.stop()
    found = [(r["outcome"], r["error_type"], r["http_status"]) for r in proxy.rows()]
    why = ("upstream_abort", "no_reply") if listens else ("connect_error", "connect")
    assert found == [(*why, 502)] * 3
    assert {str(r["deviations"]) for r in proxy.rows()} == {"['upstream_failure_page']"}


def test_a_failure_page_is_on_the_row_when_the_client_speaks_tls(
    tmp_path: Path, authority: Authority
) -> None:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.shutdown(socket.SHUT_RDWR)

    with tls_proxy(tmp_path / "a.tape", authority, script=script) as proxy:
        context = client_context(authority, "http/1.1")
        with (
            socket.create_connection((proxy.host, proxy.port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=proxy.host) as client,
        ):
            client.sendall(post("/v1/completions", BODY))
            assert client.recv(65536).startswith(b"HTTP/1.1 502")
        proxy.stop()
    (row,) = proxy.rows()
    assert (row["http_status"], row["deviations"]) == (502, ["upstream_failure_page"])


def test_a_stream_that_its_client_resets_holds_no_upstream_back() -> None:
    class Transport:
        reading = True

        def is_closing(self) -> bool:
            return False

        def pause_reading(self) -> None:
            self.reading = False

        def resume_reading(self) -> None:
            self.reading = True

    assert http2.apply() == []
    transport = Transport()
    client = h2.connection.H2Connection(h2.config.H2Configuration())
    server = BufferedH2Connection(h2.config.H2Configuration(client_side=False))
    client.initiate_connection()
    server.initiate_connection()
    client.send_headers(
        1, [(":method", "GET"), (":path", "/"), (":scheme", "https"), (":authority", "x")]
    )
    server.receive_data(client.data_to_send())
    server.send_headers(1, [(":status", "200")])
    server.send_data(1, b"x" * (66_000 + http2.UNSENT_BYTES))
    http2.hold_back(server, 1, transport)
    assert not transport.reading
    client.receive_data(server.data_to_send())
    client.reset_stream(1)
    server.receive_data(client.data_to_send())
    assert transport.reading
