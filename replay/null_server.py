"""A server that answers at once and does no work: what a replay measures on it is the replay.

It streams completions at a fixed pace over loopback and keeps the instant just before each send, so
the client's error is a subtraction. One thread on bare sockets, in a process of its own; it knows
just enough HTTP for tokentape's own requests, and must never be aimed at anything else.
    python -m tokentape.replay.null_server FIRST_NS GAP_NS LONGEST_NS LOG
prints its port, serves until its standard input closes, and then writes LOG (see `read_log`).
"""

import contextlib
import gc
import heapq
import re
import select
import socket
import sys
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic_ns

import numpy as np
from numpy.typing import NDArray

READ_BYTES = 1 << 18
_LENGTH = re.compile(rb"content-length: *([0-9]+)", re.IGNORECASE)
_LIMIT = re.compile(rb'"max_tokens":([0-9]+)')
_CHAT = b'"chat.completion.chunk"', b'"delta":{"content":" w"}'
_PLAIN = b'"text_completion"', b'"text":" w"'
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass
class Stream:
    """One request that is being answered; `sent_ns` has one entry per event."""

    number: int
    sock: socket.socket
    tokens: int
    gap_ns: int
    event: bytes
    full_ns: int
    sent_ns: "array[int]" = field(default_factory=lambda: array("q"))


class NullServer:
    """Serves until `stop_fd` is readable."""

    def __init__(self, first_ns: int, gap_ns: int, longest_ns: int) -> None:
        self._pace = first_ns, gap_ns, longest_ns
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        self._poll = select.epoll()
        self._poll.register(self._listener, select.EPOLLIN)
        self._open: dict[int, tuple[socket.socket, bytearray]] = {}
        self._due: list[tuple[int, int, Stream]] = []
        self.streams: list[Stream] = []

    def serve(self, stop_fd: int) -> None:
        """Read requests and send what is due."""
        self._poll.register(stop_fd, select.EPOLLIN | select.EPOLLHUP)
        while True:
            wait_ns = self._due[0][0] - monotonic_ns() if self._due else -1
            for fd, _ in self._poll.poll(max(0.0, wait_ns / 1e9) if self._due else None):
                if fd == stop_fd:
                    return
                if fd == self._listener.fileno():
                    self._accept()
                else:
                    self._read(fd)
            now = monotonic_ns()
            while self._due and self._due[0][0] <= now:
                self._step(heapq.heappop(self._due)[2])

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _ = self._listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._open[sock.fileno()] = sock, bytearray()
                self._poll.register(sock, select.EPOLLIN)

    def _read(self, fd: int) -> None:
        sock, buffer = self._open[fd]
        try:
            data = sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(sock)
            return
        buffer += data
        head_end = buffer.find(b"\r\n\r\n") + 4
        length = _LENGTH.search(buffer, 0, max(head_end, 0))
        if head_end >= 4 and length and len(buffer) >= head_end + int(length[1]):
            self._begin(sock, buffer, monotonic_ns())
            buffer.clear()

    def _begin(self, sock: socket.socket, request: bytearray, now_ns: int) -> None:
        """A request is complete. Its limit stands behind the prompt."""
        first_ns, gap_ns, longest_ns = self._pace
        limit = _LIMIT.search(request, max(0, request.rfind(b'"max_tokens"')))
        tokens = max(1, int(limit[1]) if limit else 1)
        kind, piece = _CHAT if b"/chat/" in request[:200] else _PLAIN
        number = len(self.streams)
        event = b'data: {"id":"null-%08d","object":%b,"created":1,"model":"null",' % (number, kind)
        event += b'"choices":[{"index":0,%b,"finish_reason":null}]}\n\n' % piece
        gap_ns = min(gap_ns, longest_ns // tokens)
        stream = Stream(number, sock, tokens, gap_ns, event, now_ns)
        self.streams.append(stream)
        heapq.heappush(self._due, (now_ns + first_ns, number, stream))

    def _step(self, stream: Stream) -> None:
        """Send the next event; head and end leave together with the first and the last one."""
        data = _chunk(stream.event)
        if len(stream.sent_ns) + 1 == stream.tokens:
            data = _chunk(stream.event.replace(b"null}", b'"length"}')) + _END
        if not stream.sent_ns:
            data = _HEAD + data
        stream.sent_ns.append(monotonic_ns())
        if self._send(stream.sock, data) and len(stream.sent_ns) < stream.tokens:
            due_ns = stream.full_ns + self._pace[0] + stream.gap_ns * len(stream.sent_ns)
            heapq.heappush(self._due, (due_ns, stream.number, stream))

    def _send(self, sock: socket.socket, data: bytes) -> bool:
        while data:
            try:
                data = data[sock.send(data) :]
            except BlockingIOError:
                select.select([], [sock], [], 1.0)
            except OSError:
                self._drop(sock)
                return False
        return True

    def _drop(self, sock: socket.socket) -> None:
        if sock.fileno() in self._open:
            del self._open[sock.fileno()]
            self._poll.unregister(sock)
            sock.close()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


_END = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


@dataclass(frozen=True)
class Truth:
    """What the server knows: full_ns[number], and the stamps of its events from first[number]."""

    full_ns: NDArray[np.int64]
    counts: NDArray[np.int64]
    sent_ns: NDArray[np.int64]

    @property
    def first(self) -> NDArray[np.int64]:
        """Where the events of each request begin."""
        return np.cumsum(self.counts) - self.counts


def write_log(path: Path, streams: list[Stream]) -> None:
    """int64 each: number of requests, when each was complete, events of each, all stamps."""
    whole = array("q", [len(streams)])
    whole.extend(s.full_ns for s in streams)
    whole.extend(len(s.sent_ns) for s in streams)
    for stream in streams:
        whole.extend(stream.sent_ns)
    path.write_bytes(whole.tobytes())


def read_log(path: Path) -> Truth:
    """What `write_log` wrote; CLOCK_MONOTONIC ns."""
    whole = np.fromfile(path, np.int64)
    count = int(whole[0])
    return Truth(whole[1 : 1 + count], whole[1 + count : 1 + 2 * count], whole[1 + 2 * count :])


def main() -> None:
    """Serve; see the top of this file."""
    first_ns, gap_ns, longest_ns = (int(word) for word in sys.argv[1:4])
    server = NullServer(first_ns, gap_ns, longest_ns)
    sys.stdout.write(f"{server.port}\n")
    sys.stdout.flush()
    gc.disable()
    server.serve(sys.stdin.fileno())
    write_log(Path(sys.argv[4]), server.streams)


if __name__ == "__main__":
    main()
