"""What a client sees through the proxy is what it sees without it, to the byte.

Differences are a closed list, each counted on the tape: interim responses are dropped, and where
the upstream gives no usable head the proxy answers with a page of its own. EXCHANGE=number repeats
one exchange.
"""

import collections
import concurrent.futures
import contextlib
import os
import re
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from exchanges import Exchange, generate
from proxied import Proxied, capturing, read_request
from tokentape.traces.check import check
from tokentape.traces.reader import open_tape

SEED = 20261123
COUNT = 2000
AT_ONCE = 8
PAGE = re.compile(rb"HTTP/1\.1 502 .*", re.DOTALL)
Seen = tuple[bytes, str]  # what came, and how it ended: "keep", "close", "reset"


class Upstream(socketserver.ThreadingTCPServer):
    """Plays exchanges by the number in the path; keeps the requests as they came."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = 256

    def __init__(self, exchanges: dict[int, Exchange]) -> None:
        self.exchanges = exchanges
        self.heard: dict[int, list[bytes]] = collections.defaultdict(list)
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(socketserver.BaseRequestHandler):
    server: Upstream

    def handle(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):
            while request := read_request(self.request):
                number = int(request.split(b"/x/", 1)[1].split(b"?")[0])
                self.server.heard[number].append(request)
                exchange = self.server.exchanges[number]
                for piece in exchange.pieces:
                    self.request.sendall(piece)
                if exchange.ends == "reset":
                    self.wait_taken()
                    linger = struct.pack("ii", 1, 0)
                    self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.request.close()
                if exchange.ends != "keep":
                    return

    def wait_taken(self) -> None:
        """A reset overtakes what the peer has not read: wait until it was acknowledged."""
        while struct.unpack("i", self.ioctl_outq())[0]:
            pass

    def ioctl_outq(self) -> bytes:
        import fcntl
        import termios

        return fcntl.ioctl(self.request.fileno(), termios.TIOCOUTQ, b"\0" * 4)


@contextlib.contextmanager
def playing(exchanges: dict[int, Exchange]) -> Iterator[Upstream]:
    with Upstream(exchanges) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(host: str, port: int, exchange: Exchange, want: int | None) -> Seen:
    """Send the request; read `want` bytes and then for an end, or all until the end."""
    with socket.create_connection((host, port), timeout=5) as client:
        client.sendall(exchange.request)
        got = bytearray()
        try:
            while want is None or len(got) < want:
                piece = client.recv(1 << 20)
                if not piece:
                    return bytes(got), "close"
                got += piece
            client.settimeout(0.0)
            with contextlib.suppress(BlockingIOError):
                got += client.recv(1 << 20)
        except ConnectionResetError:
            return bytes(got), "reset"
        except TimeoutError:
            return bytes(got), "hang"
        return bytes(got), "keep"


def without_interim(exchange: Exchange, seen: bytes) -> bytes:
    for head in exchange.interim:
        assert head in seen
        seen = seen.replace(head, b"", 1)
    return seen


def compare(proxy: Proxied, upstream: Upstream, exchange: Exchange) -> str | None:
    """What differs, or None."""
    host, port = upstream.server_address[:2]
    want = len(exchange.final) if exchange.ends == "keep" else None
    direct, direct_end = ask(str(host), int(port), exchange, want)
    expected = without_interim(exchange, direct)
    want = len(expected) if want is not None else None
    through, through_end = ask(proxy.host, proxy.port, exchange, want)
    sent, passed = upstream.heard[exchange.number]
    if sent != passed:
        return f"the upstream got {passed[:300]!r} for {sent[:300]!r}"
    if exchange.page:
        return None if PAGE.fullmatch(through) else f"no page: {through[:200]!r}"
    if through != expected:
        at = next((i for i, (a, b) in enumerate(zip(through, expected, strict=False)) if a != b), 0)
        return (
            f"{len(through)} bytes for {len(expected)}; at {at}: "
            f"{through[max(0, at - 40) : at + 80]!r} for {expected[max(0, at - 40) : at + 80]!r}"
        )
    return None if through_end == direct_end else f"ended by {through_end} for {direct_end}"


def test_two_thousand_exchanges_look_the_same_through_the_proxy(tmp_path: Path) -> None:
    only = os.environ.get("EXCHANGE")
    numbers = [int(only)] if only else range(COUNT)
    exchanges = {n: generate(n, SEED) for n in numbers}
    tape = tmp_path / "a.tape"
    with playing(exchanges) as upstream:
        url = "http://{}:{}".format(*upstream.server_address[:2])
        with capturing(url, tape) as proxy:
            with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
                found = pool.map(lambda e: compare(proxy, upstream, e), exchanges.values())
                wrong = {n: w for n, w in zip(exchanges, found, strict=True) if w}
            said = proxy.stop()
    kinds = collections.Counter(exchanges[n].kind for n in wrong)
    told = "\n".join(f"EXCHANGE={n} ({exchanges[n].kind}): {w}" for n, w in wrong.items())
    if wrong:
        pytest.fail(f"{len(wrong)} differ {dict(kinds)}\n{told[:6000]}")
    assert "nothing lost" in said
    assert "proxy errors" not in said
    assert [f for f in check(open_tape(tape)) if f.severity == "error"] == []
    rows = proxy.rows()
    assert len(rows) == len(exchanges)
    deviations = collections.Counter(d for r in rows for d in r["deviations"] or ())
    expected = collections.Counter(
        {
            "interim": sum(len(e.interim) for e in exchanges.values()),
            "upstream_failure_page": sum(e.page for e in exchanges.values()),
        }
    )
    assert deviations == +expected
