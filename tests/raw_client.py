"""An HTTP/1.1 client that keeps every socket read and its instant, and decodes afterwards.

It must never look at a byte before the reply has ended: what it stamps is recv and nothing else.
"""

import bisect
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from recordings import Recording


@dataclass(frozen=True)
class RawReply:
    """Reads of one reply, (CLOCK_MONOTONIC ns, bytes), and when the request began to be sent."""

    send_ns: int
    reads: list[tuple[int, bytes]]

    @property
    def raw(self) -> bytes:
        """All bytes of the reply, head and transfer framing included."""
        return b"".join(data for _, data in self.reads)

    @property
    def head(self) -> list[str]:
        """Status line and header lines."""
        return self.raw.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")

    @property
    def status(self) -> int:
        """Status code, 0 where there was no head."""
        return int(self.head[0].split()[1]) if self.raw else 0

    @property
    def headers(self) -> dict[str, str]:
        """Header values by lower-case name."""
        pairs = (line.partition(":") for line in self.head[1:])
        return {name.lower(): value.strip() for name, _, value in pairs}

    @property
    def parts(self) -> list[tuple[int, bytes]]:
        """Each chunk of the body, or the whole body, with the instant of its last byte."""
        ends, instants, position = [], [], 0
        for t_ns, data in self.reads:
            position += len(data)
            ends.append(position)
            instants.append(t_ns)
        spans = _spans(self.raw, chunked="transfer-encoding" in self.headers)
        return [(instants[bisect.bisect_left(ends, end)], self.raw[a:end]) for a, end in spans]

    @property
    def body(self) -> bytes:
        """The body without its transfer framing."""
        return b"".join(data for _, data in self.parts)

    @property
    def complete(self) -> bool:
        """The reply ended as its framing promised."""
        if "transfer-encoding" in self.headers:
            return self.raw.endswith(b"\r\n0\r\n\r\n")
        return len(self.body) == int(self.headers.get("content-length", "-1"))


def _spans(raw: bytes, *, chunked: bool) -> list[tuple[int, int]]:
    start = raw.find(b"\r\n\r\n") + 4
    if not chunked:
        return [(start, len(raw))] if len(raw) > start else []
    spans = []
    while (line_end := raw.find(b"\r\n", start)) > 0:
        size = int(raw[start:line_end].split(b";")[0], 16)
        end = line_end + 2 + size
        if size == 0 or end > len(raw):
            break
        spans.append((line_end + 2, end))
        start = end + 2
    return spans


def post(url: str, body: bytes, headers: dict[str, str]) -> RawReply:
    """Posts on a connection of its own and reads until the server closes it."""
    parts = urlsplit(url)
    lines = [
        f"POST {parts.path} HTTP/1.1",
        f"Host: {parts.netloc}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    reads = []
    with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=60) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        send_ns = time.monotonic_ns()
        client.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        while data := client.recv(1 << 16):
            reads.append((time.monotonic_ns(), data))
    return RawReply(send_ns, reads)


def body_for(recording: Recording, *, stream: bool = True) -> bytes:
    """A request body that could have led to a recording."""
    words = " ".join(["word"] * recording.prompt_words)
    body: dict[str, Any] = {"model": "m", "max_tokens": recording.output_tokens, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    if "chat" in recording.path:
        body["messages"] = [{"role": "user", "content": words}]
    else:
        body["prompt"] = words
    return json.dumps(body).encode()


def play(url: str, recording: Recording, *, stream: bool = True, fault: str = "") -> RawReply:
    """Asks for one recording."""
    headers = {"x-playback": recording.rid} | ({"x-fault": fault} if fault else {})
    return post(url + recording.path, body_for(recording, stream=stream), headers)


def play_all(url: str, recordings: list[Recording], *, stream: bool = True) -> list[RawReply]:
    """Asks for many at once, a thread each."""
    with ThreadPoolExecutor(len(recordings)) as threads:
        return list(threads.map(lambda r: play(url, r, stream=stream), recordings))
