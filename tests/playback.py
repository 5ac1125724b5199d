"""Serves recorded LLM streams byte for byte at their recorded times, from a process of its own.

    cd tests; python -m playback --listen 127.0.0.1:0 data/vllm-h100-slice.jsonl.gz

Header `x-playback: RID` names the recording; without it the k-th request to a path gets the k-th
recording of that path. Header `x-fault: NAME [CHUNKS]` makes the server misbehave, see FAULTS.
`GET /__log` tells what was received and when each chunk was handed to the socket.
It uses one blocking thread per connection, so its clock is a sleep and a send and nothing else.
It must never add a byte to a recorded body.
"""

import argparse
import contextlib
import gc
import hashlib
import json
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recordings import DONE, SLICE, Recording, load

FAULTS = {
    "close-before-headers": "reads the request and closes",
    "close-mid": "closes (FIN) after CHUNKS chunks, in the middle of the body",
    "reset-mid": "resets the connection (RST) after CHUNKS chunks",
    "error-503": "answers 503 with a JSON error",
    "not-json": "answers 200 and calls JSON what is none",
    "stall": "sends nothing more after CHUNKS chunks, until the client leaves",
    "gzip": "compresses the stream, flushed after each chunk",
    "no-done": "leaves out the [DONE] message",
}
CHUNKS_BEFORE_FAULT = 3


@dataclass
class Served:
    """What the log says of one request; instants are CLOCK_MONOTONIC ns of this host."""

    rid: str
    path: str
    connection: int
    fault: str
    head: list[str]
    body_bytes: int
    body_sha256: str
    request_ns: int
    headers_ns: int | None = None
    chunks_ns: list[int] = field(default_factory=list)
    end_ns: int | None = None


@dataclass(frozen=True)
class Playback:
    """A running playback server, as the tests see it."""

    url: str
    recordings: dict[str, Recording]

    def log(self) -> list[Served]:
        """Every request served so far, in order of arrival."""
        with urllib.request.urlopen(f"{self.url}/__log", timeout=10) as reply:
            return [Served(**entry) for entry in json.load(reply)]


@contextlib.contextmanager
def playback(files: list[Path] | None = None) -> Iterator[Playback]:
    """Runs a server in a process of its own; it ends with the block, or with this process."""
    files = files or [SLICE]
    command = [sys.executable, "-m", "playback", "--until-stdin-closes", *map(str, files)]
    with subprocess.Popen(
        command, cwd=Path(__file__).parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, "the playback server did not start"
        yield Playback(url, load(files))
        process.stdin.close()


class Server:
    """Accepts connections and gives each a thread."""

    def __init__(self, recordings: dict[str, Recording], listener: socket.socket) -> None:
        self.recordings = recordings
        self.listener = listener
        self.served: list[Served] = []
        self._turns: dict[str, int] = {}
        self._lock = threading.Lock()

    def run(self) -> None:
        """Accept for ever."""
        connection = 0
        while True:
            client, _ = self.listener.accept()
            connection += 1
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._talk, args=(client, connection), daemon=True).start()

    def _talk(self, client: socket.socket, connection: int) -> None:
        with contextlib.suppress(ConnectionError), client, client.makefile("rb") as reader:
            while (request := _read_request(reader, client)) is not None:
                if not self._answer(client, request, connection):
                    break

    def _answer(self, client: socket.socket, request: "Request", connection: int) -> bool:
        """Answers one request; False when the connection must end."""
        if request.path == "/__log":
            log = json.dumps([vars(entry) for entry in self.served]).encode()
            client.sendall(_whole_reply(200, (("Content-Type", "application/json"),), log))
            return True
        recording = self._choose(request)
        if recording is None:
            client.sendall(_whole_reply(404, (), b"no recording for this request\n"))
            return True
        fault, _, after = request.headers.get("x-fault", "").partition(" ")
        served = Served(
            rid=recording.rid,
            path=request.path,
            connection=connection,
            fault=fault,
            head=request.head,
            body_bytes=len(request.body),
            body_sha256=hashlib.sha256(request.body).hexdigest(),
            request_ns=request.end_ns,
        )
        with self._lock:
            self.served.append(served)
        reply = Reply(client, recording, served, int(after or CHUNKS_BEFORE_FAULT))
        keep = reply.stream() if request.wants_stream else reply.whole()
        return keep and request.headers.get("connection", "").lower() != "close"

    def _choose(self, request: "Request") -> Recording | None:
        rid = request.headers.get("x-playback")
        if rid is not None:
            return self.recordings.get(rid)
        same_path = [r for r in self.recordings.values() if r.path == request.path]
        with self._lock:
            turn = self._turns.get(request.path, 0)
            self._turns[request.path] = turn + 1
        return same_path[turn % len(same_path)] if same_path else None


@dataclass(frozen=True)
class Request:
    """A request as it was received; `headers` has lower-case names."""

    path: str
    head: list[str]
    headers: dict[str, str]
    body: bytes
    end_ns: int

    @property
    def wants_stream(self) -> bool:
        """What the body says under "stream"."""
        try:
            return bool(json.loads(self.body).get("stream"))
        except ValueError:
            return False


def _read_request(reader: Any, client: socket.socket) -> Request | None:
    head: list[str] = []
    while (line := reader.readline()) not in (b"", b"\r\n"):
        head.append(line.decode("latin-1").rstrip("\r\n"))
    if not head:
        return None
    headers = {
        name.lower(): value.strip() for name, _, value in (h.partition(":") for h in head[1:])
    }
    if headers.get("expect", "").lower() == "100-continue":
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = b"".join(_request_chunks(reader))
    else:
        body = reader.read(int(headers.get("content-length", 0)))
    return Request(head[0].split()[1], head, headers, body, time.monotonic_ns())


def _request_chunks(reader: Any) -> Iterator[bytes]:
    while size := int(reader.readline().split(b";")[0], 16):
        yield reader.read(size)
        reader.readline()
    while reader.readline() not in (b"", b"\r\n"):
        pass


@dataclass
class Reply:
    """One reply on its way; each method answers whether the connection may go on."""

    client: socket.socket
    recording: Recording
    served: Served
    fault_after: int

    def stream(self) -> bool:
        """The recorded stream at its recorded times, or what the fault makes of it."""
        early = self._early_fault()
        if early is not None:
            return early
        fault, headers = self.served.fault, self.recording.headers
        squeeze = zlib.compressobj(wbits=31) if fault == "gzip" else None
        if squeeze:
            headers = (*headers, ("Content-Encoding", "gzip"))
        self.served.headers_ns = self._send_at(self.recording.headers_ns, _head(200, headers))
        for number, (due_ns, data) in enumerate(self.recording.chunks):
            if number == self.fault_after and fault in ("close-mid", "reset-mid", "stall"):
                return self._break_off()
            if fault == "no-done" and data == DONE:
                continue
            sent = squeeze.compress(data) + squeeze.flush(zlib.Z_SYNC_FLUSH) if squeeze else data
            self.served.chunks_ns.append(self._send_at(due_ns, _chunk(sent)))
        rest = _chunk(squeeze.flush()) if squeeze else b""
        self.served.end_ns = self._send_at(self.recording.end_ns, rest + b"0\r\n\r\n")
        return True

    def whole(self) -> bool:
        """The completion as one JSON body, when the recorded stream ended."""
        early = self._early_fault()
        if early is not None:
            return early
        kept = [
            h for h in self.recording.headers if h[0] not in ("Content-Type", "Transfer-Encoding")
        ]
        headers = (*kept, ("Content-Type", "application/json"))
        data = _whole_reply(200, headers, self.recording.whole)
        self.served.headers_ns = self._send_at(self.recording.end_ns, data)
        self.served.chunks_ns.append(self.served.headers_ns)
        self.served.end_ns = self.served.headers_ns
        return True

    def _early_fault(self) -> bool | None:
        """Faults in place of a reply; None when there is none of these."""
        json_type = (("Content-Type", "application/json"),)
        if self.served.fault == "close-before-headers":
            return False
        if self.served.fault == "error-503":
            error = b'{"error": {"message": "overloaded", "type": "server_error", "code": 503}}'
            self.client.sendall(_whole_reply(503, json_type, error))
            return True
        if self.served.fault == "not-json":
            self.client.sendall(_whole_reply(200, json_type, b"<html>this is not JSON</html>\n"))
            return True
        return None

    def _break_off(self) -> bool:
        if self.served.fault == "stall":
            self.client.recv(1)
        if self.served.fault == "reset-mid":
            on_with_no_wait = struct.pack("ii", 1, 0)
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, on_with_no_wait)
        return False

    def _send_at(self, due_ns: int, data: bytes) -> int:
        """Waits until due_ns after the request; returns the instant just before the send."""
        wait_ns = self.served.request_ns + due_ns - time.monotonic_ns()
        if wait_ns > 0:
            time.sleep(wait_ns / 1e9)
        now = time.monotonic_ns()
        self.client.sendall(data)
        return now


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _head(status: int, headers: tuple[tuple[str, str], ...]) -> bytes:
    reason = {200: "OK", 404: "Not Found", 503: "Service Unavailable"}[status]
    lines = [
        f"HTTP/1.1 {status} {reason}",
        *(f"{name}: {value}" for name, value in headers),
        "",
        "",
    ]
    return "\r\n".join(lines).encode("latin-1")


def _whole_reply(status: int, headers: tuple[tuple[str, str], ...], body: bytes) -> bytes:
    return _head(status, (*headers, ("Content-Length", str(len(body))))) + body


def main() -> None:
    """Serves until it is killed, or until stdin closes when asked to."""
    parser = argparse.ArgumentParser(prog="playback", description="Serve recorded streams.")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--listen", default="127.0.0.1:0")
    parser.add_argument("--until-stdin-closes", action="store_true")
    options = parser.parse_args()
    host, _, port = options.listen.rpartition(":")
    listener = socket.create_server((host, int(port)), backlog=1024)
    server = Server(load(options.files), listener)
    gc.collect()
    gc.freeze()
    sys.stdout.write(f"http://{host}:{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    if not options.until_stdin_closes:
        server.run()
    threading.Thread(target=server.run, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
