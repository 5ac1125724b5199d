"""The proxy's sockets: when the kernel got what was read, and when bytes were written.

Reads carry the kernel's receive stamp (SO_TIMESTAMPNS, CLOCK_REALTIME), converted to the monotonic
clock at once, with the process's own lateness beside it; without one, the stamp is that of the
transport's callback. Writes are stamped at the write. Nothing here waits or raises into traffic.
"""

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
import time
from collections.abc import Callable
from time import monotonic_ns
from typing import Any

from tokentape.traces.blocks import NO_STAMP
from tokentape.traces.kernel_stamps import (
    ANCILLARY_BYTES,
    SO_TIMESTAMPNS,
    KernelClock,
    stamp_of,
)

RESET_POLL_S = 0.001
RESET_AFTER_NS = 5_000_000_000  # whatever a client has not taken by then
_LINGER_NOT = struct.pack("@ii", 1, 0)


class StampedSocket(socket.socket):
    """A socket whose reads note the kernel's stamp in `kernel_unix_ns`; 0 when there was none.

    `was_reset` says that the peer reset the connection, where asyncio tells only of its end.
    """

    __slots__ = ("kernel_unix_ns", "was_reset")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kernel_unix_ns = 0
        self.was_reset = False
        with contextlib.suppress(OSError):  # without it, stamps are those of the callback
            self.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)

    def recv(self, size: int, flags: int = 0) -> bytes:
        """As socket.recv; asyncio's transport calls it."""
        try:
            data, ancillary, _, _ = self.recvmsg(size, ANCILLARY_BYTES, flags)
        except ConnectionResetError:
            self.was_reset = True
            raise
        self.kernel_unix_ns = stamp_of(ancillary)
        return data

    def accept(self) -> tuple[socket.socket, Any]:
        """As socket.accept, for a connection that is stamped as well."""
        fd, address = self._accept()  # type: ignore[attr-defined]
        return StampedSocket(self.family, self.type, self.proto, fileno=fd), address


async def open_connection(
    host: str, port: int, *, local_addr: Any = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As asyncio.open_connection, on a StampedSocket; OSError of the last address that failed."""
    loop = asyncio.get_running_loop()
    failed: OSError = OSError(f"no address for {host}")
    for family, kind, proto, _, address in await _addresses(loop, host, port):
        sock = StampedSocket(family, kind, proto)
        try:
            sock.setblocking(False)
            if local_addr is not None:
                sock.bind(local_addr)
            await loop.sock_connect(sock, address)
        except OSError as error:
            sock.close()
            failed = error
        except BaseException:
            sock.close()
            raise
        else:
            return await asyncio.open_connection(sock=sock)
    raise failed


async def _addresses(loop: asyncio.AbstractEventLoop, host: str, port: int) -> Any:
    """What getaddrinfo says; an address in digits asks nobody."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            socket.inet_pton(family, host)
            return [(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port))]
    return await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)


class StampedAsyncio:
    """The module `asyncio` for mitmproxy's server, but for connections on StampedSockets."""

    open_connection = staticmethod(open_connection)

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)


class SocketStamps:
    """When one socket was last read, and when bytes of its current request were written.

    A chunk that is handled after the next read came carries that later stamp: never too early, and
    then seen as coalesced. `lag_us` is how late the last read was; NO_STAMP where the kernel had
    no stamp for it.
    """

    __slots__ = (
        "clock",
        "feed",
        "first_write_ns",
        "lag_us",
        "last_write_ns",
        "on_write",
        "read_ns",
        "relay",
        "requests",
        "sock",
    )

    def __init__(self, clock: KernelClock, io: Any) -> None:
        self.clock = clock
        self.first_write_ns = self.last_write_ns = self.read_ns = self.requests = 0
        self.lag_us = NO_STAMP
        self.on_write: Callable[[bytes], None] | None = None  # called once, with the next write
        self.sock = stamped_socket(io.writer)
        self.relay: Any = None  # what may take a read before mitmproxy sees it
        self.feed = io.reader.feed_data
        self._watch_reads(io.reader)
        self._watch_writes(io.writer)

    def note_read(self) -> None:
        """The transport has just read: keep when the kernel had it."""
        user_ns = monotonic_ns()
        kernel_unix_ns = self.sock.kernel_unix_ns if self.sock is not None else 0
        self.read_ns, self.lag_us = self.clock.place(kernel_unix_ns, user_ns)

    def _watch_reads(self, reader: Any) -> None:
        """Stamp what the transport feeds an asyncio StreamReader."""

        def stamped(data: bytes) -> None:
            self.note_read()
            if self.relay is None or not self.relay.take(data):
                self.feed(data)

        reader.feed_data = stamped

    def _watch_writes(self, writer: Any) -> None:
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

    def reset_at_close(self) -> None:
        """End the connection as its other side ended: by a reset, not by an end of file.

        A reset discards what is still on its way, so it follows when all has been taken.
        """
        if self.sock is not None:
            with contextlib.suppress(OSError):
                held = self.sock.dup()  # keeps the connection when its own descriptor is closed
                _reset_when_taken(self.sock, held, monotonic_ns() + RESET_AFTER_NS)

    def reset(self) -> None:
        """The next write begins another request."""
        self.first_write_ns = self.last_write_ns = 0


def _reset_when_taken(closing: socket.socket, held: socket.socket, deadline_ns: int) -> None:
    left = struct.unpack("i", fcntl.ioctl(held.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
    if (left or closing.fileno() >= 0) and monotonic_ns() < deadline_ns:
        loop = asyncio.get_running_loop()
        loop.call_later(RESET_POLL_S, _reset_when_taken, closing, held, deadline_ns)
        return
    held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    held.close()


def stamped_socket(writer: Any) -> StampedSocket | None:
    """The StampedSocket under an asyncio StreamWriter; None where the stream has another."""
    wrapped = writer.get_extra_info("socket")
    sock = getattr(wrapped, "_sock", wrapped)
    return sock if isinstance(sock, StampedSocket) else None


class ClientConnection:
    """One client connection and the upstream sockets that mitmproxy opened for it."""

    __slots__ = ("clock", "connecting", "failed", "number", "socket", "tls_failed", "upstreams")

    def __init__(self, number: int, clock: KernelClock, io: Any) -> None:
        self.number = number
        self.clock = clock
        self.socket = SocketStamps(clock, io)
        self.upstreams: dict[str, SocketStamps] = {}
        self.connecting = 0  # upstream connections that were asked for and are not there yet
        self.failed: dict[
            str, str
        ] = {}  # what was said when one could not be opened: at which step
        self.tls_failed = False

    def connected(self, server_id: str, io: Any) -> SocketStamps:
        """Watch a new upstream socket."""
        self.connecting = max(0, self.connecting - 1)
        stamps = self.upstreams[server_id] = SocketStamps(self.clock, io)
        return stamps

    def next_request(self) -> None:
        """What an early reply left unsent of the request before belongs to nobody."""
        self.connecting = 0
        self.tls_failed = False
        for stamps in self.upstreams.values():
            stamps.reset()


def read_stamp(stamps: SocketStamps | None) -> tuple[int, int]:
    """(monotonic ns, lateness in us) of a socket's last read; now, where it is not watched."""
    return (
        (stamps.read_ns, stamps.lag_us) if stamps and stamps.read_ns else (monotonic_ns(), NO_STAMP)
    )
