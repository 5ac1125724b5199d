"""What the proxy watches of its sockets: when they were read and written, per connection.

Stamps are taken in the transport's callback or at the write itself, before any task wakes.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any


class SocketStamps:
    """When one socket was last read, and when bytes of its current request were written.

    A chunk that is handled after the next read came carries that later stamp: never too early, and
    then seen as coalesced.
    """

    __slots__ = ("first_write_ns", "last_write_ns", "on_write", "read_ns", "requests")

    def __init__(self) -> None:
        self.first_write_ns = self.last_write_ns = self.read_ns = self.requests = 0
        self.on_write: Callable[[bytes], None] | None = None  # called once, with the next write

    def watch_reads(self, reader: Any) -> None:
        """Stamp what the transport feeds an asyncio StreamReader."""
        feed = reader.feed_data

        def stamped(data: bytes) -> None:
            self.read_ns = time.monotonic_ns()
            feed(data)

        reader.feed_data = stamped

    def watch_writes(self, writer: Any) -> None:
        """Stamp every write of an asyncio StreamWriter."""
        write = writer.write

        def stamped(data: bytes) -> None:
            now = time.monotonic_ns()
            if not self.first_write_ns:
                self.first_write_ns = now
            self.last_write_ns = now
            write(data)
            if self.on_write is not None:
                told, self.on_write = self.on_write, None
                with contextlib.suppress(Exception):  # traffic goes on whatever recording does
                    told(data)

        writer.write = stamped

    def reset(self) -> None:
        """The next write begins another request."""
        self.first_write_ns = self.last_write_ns = 0


class ClientConnection:
    """One client connection and the upstream sockets that mitmproxy opened for it."""

    __slots__ = ("connecting", "number", "socket", "upstreams")

    def __init__(self, number: int, io: Any) -> None:
        self.number = number
        self.socket = SocketStamps()
        self.socket.watch_reads(io.reader)
        self.socket.watch_writes(io.writer)
        self.upstreams: dict[str, SocketStamps] = {}
        self.connecting = False  # an upstream connection was asked for and is not there yet

    def connected(self, server_id: str, io: Any) -> None:
        """Watch a new upstream socket."""
        self.connecting = False
        stamps = self.upstreams[server_id] = SocketStamps()
        stamps.watch_writes(io.writer)
        stamps.watch_reads(io.reader)

    def next_request(self) -> None:
        """What an early reply left unsent of the request before belongs to nobody."""
        self.connecting = False
        for stamps in self.upstreams.values():
            stamps.reset()


def read_ns(stamps: SocketStamps | None) -> int:
    """The socket's last read, or now where the socket is not watched."""
    return stamps.read_ns if stamps and stamps.read_ns else time.monotonic_ns()
