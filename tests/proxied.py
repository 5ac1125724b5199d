"""A capture in a process of its own, and raw sockets around it, for tests."""

import contextlib
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokentape.traces import journal
from tokentape.traces.reader import open_tape
from tokentape.traces.recover import replay_journal


@dataclass
class Proxied:
    """A running `tokentape capture`; `stop` ends it and gives what it said."""

    process: subprocess.Popen[str]
    host: str
    port: int
    tape: Path
    heard: str = ""  # what it said before it listened

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def stop(self, number: int = signal.SIGTERM) -> str:
        """All that it said after it has sealed the tape; asserts that it ended well."""
        self.process.send_signal(number)
        result, progress = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, progress
        return result + progress

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the stopped capture, in order of arrival."""
        return list(open_tape(self.tape).read().to_pylist())


@contextlib.contextmanager
def capturing(
    upstream: str,
    tape: Path,
    *options: str,
    environment: dict[str, str] | None = None,
    listen: str = "127.0.0.1:0",
    through: Sequence[str] = (),
) -> Iterator[Proxied]:
    """`tokentape capture` in front of `upstream`, listening on a free port; run by `through`."""
    command = [*through, sys.executable, "-m", "tokentape", "capture", "--upstream", upstream]
    command += ["--tape", str(tape), "--listen", listen, *options]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | (environment or {}),
    )
    try:
        assert process.stderr is not None
        heard: list[str] = []
        while "listening on" not in (line := process.stderr.readline()):
            heard.append(line)
            assert line, "".join(heard)
        address = line.replace(upstream, "").split("://", 1)[1].split()[0].rstrip("/,;")
        host, _, port = address.rpartition(":")
        yield Proxied(process, host, int(port), tape, "".join(heard))
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def children(pid: int) -> list[int]:
    """Processes whose parent it is."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                found.append(int(stat.parent.name))
    return sorted(found)


def commands(pids: list[int], word: str) -> list[int]:
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def workers(proxy: Proxied) -> list[int]:
    return commands(children(proxy.process.pid), "tokentape.proxy.worker")


def writers(proxy: Proxied) -> list[int]:
    return [p for w in workers(proxy) for p in commands(children(w), "writer_process")]


def until(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


Script = Callable[[socket.socket, bytes], None]


@contextlib.contextmanager
def scripted(script: Script, host: str = "127.0.0.1") -> Iterator[str]:
    """A server that calls `script(connection, request)` for each whole request it reads."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                while request := read_request(self.request):
                    script(self.request, request)

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True
        request_queue_size = 128

    with Server((host, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield "http://{}:{}".format(*server.server_address[:2])
        finally:
            server.shutdown()
            thread.join()


def finished_rows(tape: Path) -> list[dict[str, Any]]:
    """Rows of a tape that are finished, sealed or not."""
    found = {r["request_id"].bytes: r for r in open_tape(tape).read().to_pylist()}
    for _, file in journal.leftovers(tape):
        with contextlib.suppress(FileNotFoundError):  # sealed meanwhile
            for row in replay_journal(file).finished:
                found.setdefault(row["request_id"], row)
    return list(found.values())


class Stage:
    """One proxy for many tests: each plays its own script at its own path.

    Rows are read from the journal as soon as they are there, so that no test waits for a seal.
    """

    def __init__(self, proxy: Proxied, upstream: str, scripts: dict[bytes, Script]) -> None:
        self.proxy = proxy
        self.host, self.port = proxy.host, proxy.port
        host, _, port = upstream.removeprefix("http://").rpartition(":")
        self.upstream = (host, int(port))
        self._scripts = scripts

    def play(self, script: Script) -> str:
        """The path at which `script` answers."""
        name = f"t{len(self._scripts)}"
        self._scripts[name.encode()] = script
        return f"/{name}/v1/completions"

    def rows(self, path: str, count: int = 1) -> list[dict[str, Any]]:
        """The rows of a path, in order of arrival, once there are `count`."""
        deadline = time.monotonic() + 20
        while True:
            rows = [r for r in self.finished() if r.get("endpoint") == path]
            if len(rows) >= count:
                assert len(rows) == count
                return sorted(rows, key=lambda r: int(r["arrival_ns"]))
            assert time.monotonic() < deadline, f"{len(rows)} of {count} rows at {path}"
            time.sleep(0.02)

    def finished(self) -> list[dict[str, Any]]:
        """Every row that is finished, sealed or not."""
        return finished_rows(self.proxy.tape)


@contextlib.contextmanager
def staged(tape: Path) -> Iterator[Stage]:
    """A proxy in front of a server that plays many scripts."""
    scripts: dict[bytes, Script] = {}

    def dispatch(connection: socket.socket, request: bytes) -> None:
        scripts[request.split(b" ", 2)[1].split(b"/", 2)[1]](connection, request)

    with scripted(dispatch) as upstream, capturing(upstream, tape) as proxy:
        yield Stage(proxy, upstream, scripts)
        said = proxy.stop()
        assert "nothing lost" in said
        assert "proxy:" not in said, said


def read_request(connection: socket.socket) -> bytes:
    """One request, head and Content-Length body; empty at the end of the connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return b""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def talk(host: str, port: int, request: bytes, until: bytes | None = None) -> bytes:
    """Send bytes; all that comes back until the peer closes, or until `until` was seen."""
    with socket.create_connection((host, port), timeout=20) as connection:
        connection.sendall(request)
        got = b""
        while until is None or until not in got:
            piece = connection.recv(65536)
            if not piece:
                break
            got += piece
        return got


def receive(connection: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes, fewer when the peer closes."""
    got = b""
    while len(got) < size and (piece := connection.recv(size - len(got))):
        got += piece
    return got


def post(path: str, body: bytes, *headers: str, close: bool = True) -> bytes:
    """A POST as bytes."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    if close:
        lines.append("Connection: close")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunk(data: bytes) -> bytes:
    """One HTTP/1.1 chunk."""
    return b"%x\r\n%s\r\n" % (len(data), data)
