"""A raw HTTP server for replay tests: it sends scripted bytes, and keeps what it was sent.

It runs on 127.0.0.1 in a thread of its own, so that the replay under test can own its event loop.
"""

import asyncio
import json
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from time import monotonic_ns
from typing import Any

Step = bytes | float | None  # send these bytes, wait so many seconds, or reset the connection


@dataclass
class Seen:
    """One request as it came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int
    at_ns: int

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


Script = Callable[[Seen], Sequence[Step]]


@dataclass
class Server:
    """A running server."""

    url: str
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0
    sent_ns: list[int] = field(default_factory=list)

    @property
    def generations(self) -> list[Seen]:
        """The requests that asked for more than one token: those of the run, not the probes."""
        posts = [s for s in self.seen if s.path.endswith("completions")]
        return [
            s for s in posts if s.json.get("max_tokens", s.json.get("max_completion_tokens")) != 1
        ]


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"


def event(value: object) -> bytes:
    """One SSE message as a chunk."""
    data = value if isinstance(value, str) else json.dumps(value)
    return chunk(f"data: {data}\n\n".encode())


def plain(status: int, value: object) -> list[Step]:
    """A whole JSON reply."""
    body = json.dumps(value).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return [head.encode() + b"\r\n\r\n" + body]


def streamed(seen: Seen, gap_s: float = 0.0, extra_prompt_tokens: int = 0) -> list[Step]:
    """A stream as an engine would send it: one word is one token, and usage at the end."""
    if not seen.path.endswith("completions"):
        return plain(404, {})
    asked = seen.json
    chat = seen.path.endswith("chat/completions")
    tokens = asked.get("max_tokens") or asked.get("max_completion_tokens") or 16
    prompt = asked["messages"][0]["content"] if chat else asked["prompt"]
    n_prompt = len(prompt.split() if isinstance(prompt, str) else prompt)
    n_prompt += extra_prompt_tokens if chat else 0
    kind = "chat.completion.chunk" if chat else "text_completion"
    base = {"id": "x", "object": kind, "model": asked["model"], "created": 1}
    steps: list[Step] = [HEAD]
    for i in range(tokens):
        piece = {"delta": {"content": f" w{i}"}} if chat else {"text": f" w{i}"}
        end = "length" if i == tokens - 1 else None
        steps += [event(base | {"choices": [{"index": 0, "finish_reason": end} | piece]}), gap_s]
    usage = {
        "prompt_tokens": n_prompt,
        "completion_tokens": tokens,
        "total_tokens": n_prompt + tokens,
    }
    return [*steps, event(base | {"choices": [], "usage": usage}) + event("[DONE]") + LAST]


def engine_like(seen: Seen) -> Sequence[Step]:
    """A candidate with one model that takes everything."""
    if seen.path.endswith("/models"):
        return plain(200, {"object": "list", "data": [{"id": "m"}]})
    return streamed(seen)


@contextmanager
def serve(script: Script = engine_like, certificate: Path | None = None) -> Iterator[Server]:
    """Serve a script on a free port until the block ends; with TLS where there is a certificate."""
    ready = threading.Event()
    server = Server("")
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    tls = None
    if certificate is not None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate)

    async def main() -> None:
        listener = await asyncio.start_server(
            lambda r, w: _connection(server, script, r, w), "127.0.0.1", 0, backlog=1024, ssl=tls
        )
        server.url = f"http{'s' if tls else ''}://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        ready.set()
        await stop.wait()
        listener.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the transports' last words

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


async def _connection(
    server: Server, script: Script, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    server.connections += 1
    number = server.connections
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            at_ns = monotonic_ns()
            first, *lines = head.split("\r\n")[:-2]
            method, path, _ = first.split(" ")
            headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            seen = Seen(method, path, headers, body, number, at_ns)
            server.seen.append(seen)
            for step in script(seen):
                if step is None:
                    reset = struct.pack("ii", 1, 0)
                    writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, reset)
                    writer.transport.abort()
                    return
                if isinstance(step, bytes):
                    server.sent_ns.append(monotonic_ns())
                    writer.write(step)
                    await writer.drain()
                else:
                    await asyncio.sleep(step)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        if writer.get_extra_info("ssl_object"):
            writer.transport.abort()  # a close would wait for the peer's
        else:
            writer.close()
