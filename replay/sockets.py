"""Our own transport under aiohttp: each read with the kernel's stamp, each request's way out too.

asyncio's transports do not hand the kernel's receive stamp on, and uvloop's read inside libuv. This
one reads with `recvmsg`, in either loop, and below TLS as well. TX stamps, by which the kernel says
when a request left and when the peer had it, come through a socket's error queue, which libuv takes
for a broken socket: so the sockets have an epoll of their own, which the loop watches as one.
Source: Linux, Documentation/networking/timestamping.rst.
"""

import asyncio
import contextlib
import os
import select
import socket
import ssl
import struct
from asyncio import sslproto
from collections.abc import Callable
from time import monotonic_ns
from typing import Any, Protocol, cast

from tokentape.traces.blocks import NO_STAMP
from tokentape.traces.kernel_stamps import (
    LATE_NS,
    SO_TIMESTAMPNS,
    STAMP,
    KernelClock,
    stamp_of,
)

READY_AT_ONCE = 256  # sockets served before the loop's timers get their turn
READ_BYTES = 64 << 10  # malloc maps larger ones anew each time
# Both messages of a socket with receive and send stamps; with less the second one is cut off.
ANCILLARY_BYTES = 128
SO_TIMESTAMPING = 37
_TX_SOFTWARE, _SOFTWARE, _OPT_ID, _TX_ACK, _OPT_TSONLY = 2, 16, 128, 512, 2048
_SOCKET_FLAGS = _SOFTWARE | _OPT_ID | _OPT_TSONLY
_ON_THIS_WRITE = [(socket.SOL_SOCKET, SO_TIMESTAMPING, struct.pack("@I", _TX_SOFTWARE | _TX_ACK))]
_ERROR = struct.Struct("@IBBBBII")  # sock_extended_err: errno, origin, type, code, pad, info, data
_IS_ERROR = ((socket.IPPROTO_IP, 11), (socket.IPPROTO_IPV6, 25))  # IP_RECVERR, IPV6_RECVERR
_SENT, _ACKED = 0, 2  # of `info`
_ERROR_QUEUE = 0x2000  # MSG_ERRQUEUE
_unpack_stamp = STAMP.unpack_from


class Stamped(Protocol):
    """A protocol that wants to know when its bytes came and went (monotonic ns)."""

    read_ns: int
    lag_us: int

    def sending(self) -> bool:
        """Bytes are about to be written; whether stamps of their way out are wanted."""

    def sent(self) -> None:
        """The socket has taken all that was written."""

    def left(self, at_ns: int) -> None:
        """The kernel has given the last bytes written to the network."""

    def acked(self, at_ns: int) -> None:
        """The peer's kernel has acknowledged them."""


def stamped_socket(address: Any) -> socket.socket:
    """A socket for `aiohttp.TCPConnector(socket_factory=...)` whose reads carry stamps."""
    family, kind, proto, *_ = address
    sock = socket.socket(family, kind, proto)
    with contextlib.suppress(OSError):  # without it, stamps are those of the callback
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    return sock


class Poller:
    """Tells transports that their sockets are ready; `close` it with its last transport."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._ready_calls: dict[int, Callable[[int], None]] = {}
        loop.add_reader(self._epoll.fileno(), self._ready)

    def watch(self, fd: int, mask: int, ready: Callable[[int], None]) -> None:
        """Call `ready` with what is so, whenever any of `mask` is; errors are always asked for."""
        if fd in self._ready_calls:
            self._epoll.modify(fd, mask)
        else:
            self._epoll.register(fd, mask)
        self._ready_calls[fd] = ready

    def forget(self, fd: int) -> None:
        """Call nobody any more."""
        if self._ready_calls.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _ready(self) -> None:
        for fd, mask in self._epoll.poll(0, READY_AT_ONCE):
            ready = self._ready_calls.get(fd)
            if ready is None:
                continue
            try:
                ready(mask)
            except Exception as error:  # noqa: BLE001 - as in asyncio: the other sockets go on
                self._loop.call_exception_handler(
                    {"message": "reading a socket", "exception": error}
                )

    def close(self) -> None:
        """Let go of the epoll."""
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()


class KernelTransport(asyncio.Transport):
    """A connected socket as a transport; writes never pause their writer, a request is bounded."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        protocol: asyncio.BaseProtocol,
        stamped: Stamped,
        clock: KernelClock,
        poller: Poller,
    ) -> None:
        """`protocol` gets the bytes (TLS, or `stamped` itself), `stamped` the stamps."""
        about: dict[str, Any] = {"socket": sock, "sockname": sock.getsockname()}
        with contextlib.suppress(OSError):
            about["peername"] = sock.getpeername()
        super().__init__(about)
        sock.setblocking(False)
        with contextlib.suppress(OSError):  # not TCP
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING, _SOCKET_FLAGS)
            self._tx_stamps = True
        except OSError:
            self._tx_stamps = False
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()
        self._recvmsg = sock.recvmsg
        self._stamped = stamped
        self._clock = clock
        self._poller = poller
        self._unsent = bytearray()
        self._closing = self._lost = self._paused = self._ended = self._wants_stamps = False
        self.set_protocol(protocol)
        protocol.connection_made(self)
        self._watch()

    def _watch(self) -> None:
        """Ask for what is wanted now."""
        mask = 0 if self._paused or self._closing or self._ended else select.EPOLLIN
        mask |= select.EPOLLOUT if self._unsent else 0
        if self._lost or (self._closing and not mask):
            self._poller.forget(self._fd)
        else:
            self._poller.watch(self._fd, mask, self._ready)

    def _ready(self, mask: int) -> None:
        if mask == select.EPOLLIN:
            self._readable()
            return
        if mask & select.EPOLLERR and self._tx_stamps:
            self._read_errors()
        if mask & select.EPOLLOUT and not self._lost:
            self._writable()
        if mask & ~(select.EPOLLOUT | select.EPOLLERR) and not self._lost:
            self._readable()
        elif mask & select.EPOLLERR and not self._lost:
            self._broken()

    def _broken(self) -> None:
        """An error that is no stamp ends the connection."""
        number = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            self._end(OSError(number, os.strerror(number)))

    # -- reading ----------------------------------------------------------------------------------

    def _readable(self) -> None:
        """Each line here is paid for by every read."""
        try:
            data, ancillary, _, _ = self._recvmsg(READ_BYTES, ANCILLARY_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(error)
            return
        user_ns = monotonic_ns()
        if not data:
            self._end_of_file()
            return
        stamped, clock = self._stamped, self._clock
        try:
            seconds, ns = _unpack_stamp(ancillary[0][2])
            late_ns = user_ns - seconds * 1_000_000_000 - ns + clock.offset_ns
        except (IndexError, struct.error):
            late_ns = -LATE_NS
        if 0 <= late_ns < LATE_NS:
            stamped.read_ns, stamped.lag_us = user_ns - late_ns, late_ns // 1000
        else:
            stamped.read_ns, stamped.lag_us = clock.place(stamp_of(ancillary), user_ns)
        self._feed(data)

    def _end_of_file(self) -> None:
        self._stamped.read_ns, self._stamped.lag_us = monotonic_ns(), NO_STAMP
        if not cast("asyncio.Protocol", self._protocol).eof_received():
            self.close()
        elif not self._lost:
            self._ended = True  # it would be readable for ever
            self._watch()

    def _read_errors(self) -> None:
        """Take the stamps of what was sent off the error queue; it wakes us until it is empty."""
        for _ in range(16):
            try:
                _, ancillary, _, _ = self._recvmsg(0, 512, _ERROR_QUEUE)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._end(error)
                return
            self._take_tx_stamp(ancillary)

    def _take_tx_stamp(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        at_ns, what = 0, -1
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPING):
                seconds, ns = _unpack_stamp(data)
                at_ns = seconds * 1_000_000_000 + ns - self._clock.offset_ns
            elif (level, kind) in _IS_ERROR and len(data) >= _ERROR.size:
                what = _ERROR.unpack_from(data)[5]
        if at_ns and what == _SENT:
            self._stamped.left(at_ns)
        elif at_ns and what == _ACKED:
            self._stamped.acked(at_ns)

    def pause_reading(self) -> None:
        """As in asyncio."""
        if not (self._paused or self._closing):
            self._paused = True
            self._watch()

    def resume_reading(self) -> None:
        """As in asyncio."""
        if self._paused and not self._closing:
            self._paused = False
            self._watch()

    def is_reading(self) -> bool:
        """As in asyncio."""
        return not (self._paused or self._closing)

    # -- writing ----------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send what the socket takes, keep the rest."""
        if self._lost or not data:
            return
        self._wants_stamps = self._stamped.sending() and self._tx_stamps
        if self._unsent:
            self._unsent += data
            return
        taken = self._send(data)
        if taken == len(data):
            self._stamped.sent()
        elif not self._lost:
            self._unsent += memoryview(data)[taken:]
            self._watch()

    def _send(self, data: bytes | bytearray | memoryview) -> int:
        try:
            if self._wants_stamps:
                return self._sock.sendmsg([data], _ON_THIS_WRITE)
            return self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._end(error)
            return 0

    def _writable(self) -> None:
        taken = self._send(self._unsent)
        if self._lost:
            return
        del self._unsent[:taken]
        if not self._unsent:
            self._watch()
            self._stamped.sent()
            if self._closing:
                self._end(None)

    def writelines(self, list_of_data: Any) -> None:
        """Head and body leave in one send."""
        self.write(b"".join(list_of_data))

    def get_write_buffer_size(self) -> int:
        """Bytes that the socket has not taken yet."""
        return len(self._unsent)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Without effect: nobody is ever paused."""

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """As in asyncio."""
        return (0, 0)

    def can_write_eof(self) -> bool:
        """A half-closed client is none that servers expect."""
        return False

    # -- the end ----------------------------------------------------------------------------------

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """As in asyncio."""
        self._protocol = protocol
        if isinstance(protocol, asyncio.BufferedProtocol):
            self._feed: Callable[[bytes], None] = self._feed_buffered
        else:
            self._feed = cast("asyncio.Protocol", protocol).data_received

    def _feed_buffered(self, data: bytes) -> None:
        protocol = cast("asyncio.BufferedProtocol", self._protocol)
        while data and not self._lost:
            into = memoryview(protocol.get_buffer(len(data)))
            size = min(len(into), len(data))
            into[:size] = data[:size]
            protocol.buffer_updated(size)
            data = data[size:]

    def get_protocol(self) -> asyncio.BaseProtocol:
        """As in asyncio."""
        return self._protocol

    def is_closing(self) -> bool:
        """As in asyncio."""
        return self._closing

    def close(self) -> None:
        """Read no more; end when what was written has left."""
        if self._closing:
            return
        self._closing = True
        if self._unsent:
            self._watch()
        else:
            self._end(None)

    def abort(self) -> None:
        """End at once."""
        self._end(None)

    def _force_close(self, error: Exception | None) -> None:
        """By this name asyncio's TLS ends a transport."""
        self._end(error)

    def _end(self, error: Exception | None) -> None:
        if self._lost:
            return
        self._closing = self._lost = True
        self._poller.forget(self._fd)
        self._unsent.clear()
        self._loop.call_soon(self._connection_lost, error)

    def _connection_lost(self, error: Exception | None) -> None:
        try:
            self._protocol.connection_lost(error)
        finally:
            self._sock.close()


async def connect_stamped(
    loop: asyncio.AbstractEventLoop,
    sock: socket.socket,
    protocol: Any,
    clock: KernelClock,
    poller: Poller,
    context: ssl.SSLContext | None,
    server_hostname: str | None,
) -> asyncio.Transport:
    """The transport that `protocol` writes to, on a connected socket; TLS is up where asked for.

    Raises OSError and its ssl kin where TLS fails. `protocol` is a Stamped one.
    """
    if context is None:
        return KernelTransport(loop, sock, protocol, protocol, clock, poller)
    up = loop.create_future()
    tls = sslproto.SSLProtocol(
        loop, protocol, context, up, server_side=False, server_hostname=server_hostname
    )
    below = KernelTransport(loop, sock, tls, protocol, clock, poller)
    try:
        await up
    except BaseException:
        below.abort()
        raise
    return cast("asyncio.Transport", tls._app_transport)  # noqa: SLF001 - tried by self_check
