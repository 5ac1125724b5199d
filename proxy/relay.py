"""The fast path: interior chunks of a cleartext HTTP/1.1 reply go from socket to socket.

Between two clean points of mitmproxy's own machine (head sent, nothing buffered; terminal chunk or
error next) a reply is nothing but bytes to pass on. A `Relay` takes the upstream socket out of
asyncio's hands, is called by the selector itself, sends what came, then records it. The terminal
chunk, broken framing, errors and ends go back to mitmproxy, which sees a stream without a middle.

It must never hold bytes back, and never touch a stream whose state it does not know.
"""

import asyncio
import contextlib
import struct
from time import monotonic_ns
from typing import Any

from mitmproxy import http
from mitmproxy.proxy import layer
from mitmproxy.proxy import server as proxy_server
from mitmproxy.proxy.layers import http as http_layers

from tokentape.proxy.exact import RawChunkedReader
from tokentape.proxy.loop import RelaySelector
from tokentape.proxy.sockets import SocketStamps
from tokentape.traces.kernel_stamps import ANCILLARY_BYTES, LATE_NS, STAMP, stamp_of
from tokentape.traces.recording import Recorder

READ_BYTES = 64 << 10
UNSENT_BYTES = 64 << 10  # asyncio's own high-water mark: beyond it the upstream is not read
MAX_LAYERS = 10
ADDED_KEPT = 4096  # latest added latencies, for whoever watches
_unpack_stamp = STAMP.unpack


class Relays:
    """All relays of a worker.

    `reads` counts what took this path, `added_ns` holds the latest times from the kernel's receive
    stamp to the end of our send.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.enabled = not missing_parts()
        self.reads = self.armed = self.failures = 0
        self.added_ns = [0] * ADDED_KEPT
        self.open: set[Relay] = set()

    def keep_alive(self) -> None:
        """Tell mitmproxy's watchdogs, which see nothing of what passes here, now and then."""
        for relay in self.open:
            relay.handler.timeout_watchdog.register_activity()


class Relay:
    """One reply that may be relayed; `take` arms it at the first clean point."""

    __slots__ = (
        "_client_send",
        "_client_writer",
        "_clock",
        "_h1",
        "_out",
        "_paused_ns",
        "_reader",
        "_recvmsg",
        "_relays",
        "_scanner",
        "_selector",
        "_sock",
        "_stamps",
        "_stream",
        "_task",
        "_transport",
        "_unsent",
        "_upstream_state",
        "active",
        "backpressure_ns",
        "fd",
        "handler",
    )

    def __init__(
        self, relays: Relays, handler: Any, flow: http.HTTPFlow, stamps: SocketStamps, stream: int
    ) -> None:
        """AttributeError, KeyError or TypeError when mitmproxy is not as this file knows it."""
        self._relays = relays
        self._selector = relay_selector()
        self.handler = handler
        self._stamps = stamps
        self._stream = stream
        top = http_layer(handler.layer)
        connection = top.connections[flow.server_conn]
        self._h1 = getattr(connection, "child_layer", connection)
        self._upstream_state = next(s for s in top.streams.values() if s.flow is flow)
        upstream, client = handler.transports[flow.server_conn], handler.transports[handler.client]
        self._reader = upstream.reader
        self._transport = upstream.writer.transport
        self._client_writer = client.writer
        self._out = client.writer.transport
        self._unsent = self._out._buffer  # noqa: SLF001 - asked for every event: no call
        self._client_send = client.writer.get_extra_info("socket")._sock.send  # noqa: SLF001
        assert stamps.sock is not None
        self._sock = stamps.sock
        self._recvmsg = stamps.sock.recvmsg
        self._clock = stamps.clock
        self.fd = stamps.sock.fileno()
        self._scanner: Any = None
        self._task: asyncio.Task[None] | None = None
        self._paused_ns = self.backpressure_ns = 0
        self.active = False

    def take(self, data: bytes) -> bool:
        """Pass on a read that asyncio made, and all after it; False leaves it to mitmproxy.

        The stamps of the read are in the upstream's SocketStamps.
        """
        try:
            if not self._at_clean_point():
                return False
        except AttributeError:  # mitmproxy is not as this file knows it: its own way for all
            self._relays.enabled = False
            self._stamps.relay = None
            return False
        self._scanner = self._h1.body_reader.scanner
        self.active = True
        self._transport.pause_reading()
        self._selector.relay(self.fd, self.read)
        self._relays.open.add(self)
        self._relays.armed += 1
        self._pass_on(data, self._stamps.read_ns, self._stamps.lag_us)
        return True

    def _at_clean_point(self) -> bool:
        """Whether mitmproxy holds nothing of this reply, and would only pass on what comes now."""
        h1, stream = self._h1, self._upstream_state
        reader = h1.body_reader
        return (
            type(reader) is RawChunkedReader
            and not reader.scanner.stopped
            and not h1.buf
            and not self._reader._buffer  # noqa: SLF001
            and h1._paused is None  # noqa: SLF001
            and stream._paused is None  # noqa: SLF001
            and not self.handler._server_event_lock.locked()  # noqa: SLF001
            and stream.server_state == stream.state_stream_response_body
            and not self._transport.is_closing()
            and not self._out.is_closing()
            and not self._transport.get_write_buffer_size()
        )

    def read(self) -> None:
        """The upstream socket is readable. Each line here is paid for by every event."""
        try:
            data, ancillary, _, _ = self._recvmsg(READ_BYTES, ANCILLARY_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._sock.was_reset = True  # the error is read once: asyncio will see an end
            self.stop()
            return
        user_ns = monotonic_ns()
        if not data:
            self.stop()
            return
        stamps = self._stamps
        try:
            seconds, ns = _unpack_stamp(ancillary[0][2])
            late_ns = user_ns - seconds * 1_000_000_000 - ns + self._clock.offset_ns
        except (IndexError, struct.error):
            late_ns = -LATE_NS
        if 0 <= late_ns < LATE_NS:
            at_ns, lag_us = user_ns - late_ns, late_ns // 1000
        else:
            at_ns, lag_us = self._clock.place(stamp_of(ancillary), user_ns)
        stamps.read_ns, stamps.lag_us = at_ns, lag_us
        self._pass_on(data, at_ns, lag_us)

    def _pass_on(self, data: bytes, at_ns: int, lag_us: int) -> None:
        """Send the interior, record it, and give what follows it back to mitmproxy."""
        size = len(data)
        try:
            end = self._scanner.interior(data, size)
            piece = data if end == size else data[:end]
            if end:
                self._send(piece, end)
        except Exception:  # noqa: BLE001 - a defect here must not end every stream of the worker
            self._relays.failures += 1
            self._out.abort()  # what the client has of this one is not known
            return
        if end:
            relays = self._relays
            relays.added_ns[relays.reads & (ADDED_KEPT - 1)] = monotonic_ns() - at_ns
            relays.reads += 1
            try:
                relays.recorder.reply_chunked(self._stream, at_ns, piece, lag_us)
            except BaseException:  # noqa: BLE001 - traffic goes on whatever recording does
                relays.failures += 1
        if end < size:
            self.stop(data[end:])

    def _send(self, piece: bytes, size: int) -> None:
        """To the client's socket, or behind what already waits for it."""
        sent = 0
        if not self._unsent:
            try:
                sent = self._client_send(piece)
            except OSError:
                sent = 0  # full, or gone: asyncio deals with either
            if sent == size:
                return
        out = self._out
        self._selector.touched = True
        out.write(piece[sent:])
        if out.get_write_buffer_size() > UNSENT_BYTES and self._task is None:
            self._selector.unrelay(self.fd)
            self._paused_ns = monotonic_ns()
            self._task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        """Read on when the client has taken what waits for it."""
        with contextlib.suppress(OSError):
            await self._client_writer.drain()
        self._task = None
        self.backpressure_ns += monotonic_ns() - self._paused_ns
        if self.active:
            self._selector.relay(self.fd, self.read)

    def stop(self, rest: bytes = b"") -> None:
        """Give the stream back to mitmproxy, beginning with `rest`."""
        if not self.active:
            return
        self._let_go()
        self._selector.touched = True
        if rest:
            self._stamps.feed(rest)
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def _let_go(self) -> None:
        if self.active:
            self.active = False
            self._selector.unrelay(self.fd)
            self._relays.open.discard(self)
        self._stamps.relay = None

    def end(self) -> None:
        """The exchange is over, however it ended."""
        self._let_go()
        if self._task is not None:
            self.backpressure_ns += monotonic_ns() - self._paused_ns
            self._task.cancel()
            self._task = None


def relay_selector() -> RelaySelector:
    """The selector of the running loop; AttributeError when it is another's loop."""
    found = asyncio.get_running_loop().relay_selector  # type: ignore[attr-defined]
    assert isinstance(found, RelaySelector)
    return found


def relayable(flow: http.HTTPFlow, stamps: SocketStamps) -> bool:
    """Whether a reply's interior may be relayed at all: chunked HTTP/1.1 in clear on both sides."""
    response = flow.response
    return (
        response is not None
        and stamps.sock is not None
        and flow.request.http_version == response.http_version == "HTTP/1.1"
        and response.headers.get("transfer-encoding", "") == "chunked"
        and flow.request.method != "HEAD"
        and response.status_code >= 200
        and response.status_code not in (204, 304)
        and not flow.client_conn.tls
        and not flow.server_conn.tls
    )


def http_layer(top: Any) -> Any:
    """mitmproxy's HttpLayer below a connection's top layer; AttributeError when there is none."""
    for _ in range(MAX_LAYERS):
        if isinstance(top, http_layers.HttpLayer):
            return top
        top = getattr(top, "child_layer", None) or top.layer
    raise AttributeError("no HttpLayer below the connection")


def missing_parts() -> list[str]:
    """What this mitmproxy or Python lacks for the fast path; then everything goes the stock way."""
    lacks = []
    annotated = {**layer.Layer.__annotations__, **proxy_server.ConnectionHandler.__annotations__}
    lacks += [
        n for n in ("_paused", "transports", "timeout_watchdog", "layer") if n not in annotated
    ]
    code = proxy_server.ConnectionHandler.__init__.__code__
    lacks += [n for n in ("_server_event_lock",) if n not in code.co_names]
    for owner, names in (
        (http_layers.HttpStream, ("state_stream_response_body",)),
        (proxy_server.TimeoutWatchdog, ("register_activity",)),
        (asyncio.StreamReader, ("feed_data",)),
        (asyncio.ReadTransport, ("pause_reading", "resume_reading")),
    ):
        lacks += [f"{owner.__name__}.{name}" for name in names if not hasattr(owner, name)]
    if "_buffer" not in asyncio.StreamReader.__init__.__code__.co_names:
        lacks.append("StreamReader._buffer")
    return lacks
