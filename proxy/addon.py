"""mitmproxy's hooks to raw records: opens, stamps and closes one record per request.

Nothing here raises into a flow: hooks are `guarded`, and the stream callables guard themselves,
since a callable that raises would lose its chunk. A record is closed exactly once, when request and
reply have both ended, or when either broke off.
"""

import asyncio
import collections
import functools
import platform
import time
from collections.abc import Callable
from typing import Any

from mitmproxy import ctx, http, tcp
from mitmproxy.connection import Client
from mitmproxy.proxy.server_hooks import ServerConnectionHookData
from mitmproxy.tls import TlsData

from tokentape.proxy import http2
from tokentape.proxy.exact import raw_scanner
from tokentape.proxy.exchange import (
    Exchange,
    client_left,
    clock_of,
    has_body,
    path_columns,
    why_no_reply,
)
from tokentape.proxy.relay import Relay, Relays, http_layer, relayable
from tokentape.proxy.sockets import ClientConnection, SocketStamps, read_stamp
from tokentape.traces.crash import told
from tokentape.traces.kernel_stamps import KernelClock
from tokentape.traces.recording import Recorder, say

_STATE = "tokentape"


def guarded(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook of Capture whose failure is counted, and said once: traffic goes on.

    mitmproxy would guard it as well, but takes an error while it starts for a reason to exit.
    """

    @functools.wraps(hook)
    def call(self: "Capture", *args: Any) -> None:
        try:
            hook(self, *args)
        except BaseException as error:  # noqa: BLE001 - traffic goes on whatever recording does
            self.failed(hook.__name__, error)

    return call


class Capture:
    """The add-on: `open_flows` are in flight, `errors` counts what went wrong in recording.

    `stock_reads` counts the pieces of replies that took mitmproxy's own way, `relays.reads` the
    rest.
    """

    def __init__(self, recorder: Recorder, worker: str) -> None:
        self._recorder = recorder
        self.clock = KernelClock()
        self.relays = Relays(recorder)
        self.stock_reads = 0
        self._worker = worker
        self._host = platform.node()
        self._connections = 0
        self._clients: dict[str, ClientConnection] = {}
        self._notes: dict[str, list[str]] = {}
        self._upstreams: dict[str, SocketStamps] = {}
        self.open_flows: dict[str, http.HTTPFlow] = {}
        self.errors = 0
        self._told_tls = False

    def note(self, connection_id: str, deviation: str) -> None:
        """A remedy of traps.py altered what passed on a connection."""
        self._notes.setdefault(connection_id, []).append(deviation)

    def refused(self, connection_id: str) -> None:
        """mitmproxy answered a request head that does not parse with 400; there is no flow."""
        try:
            client = self._clients.get(connection_id)
            now, lag_us = read_stamp(client.socket if client else None)
            row = self._arrival(client, now, lag_us)
            stream = self._recorder.open(now, row, (b"", b"", []), lag_us)
            end: dict[str, Any] = {
                "outcome": "http_error",
                "origin": "proxy",
                "error_type": "refused",
            }
            end |= {"http_status": 400, "deviations": ["refused"]}
            self._recorder.close(stream, time.monotonic_ns(), end)
        except BaseException as error:  # noqa: BLE001 - traffic goes on whatever recording does
            self.failed("refused", error)

    def failed(self, where: str, error: BaseException) -> None:
        """Recording failed: count it, say the first one."""
        self.errors += 1
        if self.errors == 1:
            say(f"recording failed in {where}: {told(error)}; traffic goes on")

    def quiet_s(self, client_id: str) -> float:
        """How long nothing was read from a client connection or written to it, but by a relay.

        0 for one that has not asked yet: it came to ask.
        """
        client = self._clients.get(client_id)
        if client is None or not client.socket.read_ns:
            return 0.0
        last_ns = max(client.socket.read_ns, client.socket.last_write_ns)
        return (time.monotonic_ns() - last_ns) / 1e9

    def was_reset(self, connection_id: str) -> bool:
        """Whether the peer of an upstream connection reset it."""
        stamps = self._upstreams.get(connection_id)
        return stamps is not None and stamps.sock is not None and stamps.sock.was_reset

    # -- connections ----------------------------------------------------------------------------

    @guarded
    def client_connected(self, client: Client) -> None:
        """Number the connection and watch its socket."""
        self._connections += 1
        handler = _handler(client.id)
        if handler is not None:
            io = handler.transports[client]
            self._clients[client.id] = ClientConnection(self._connections, self.clock, io)
            # Stock allows five upstream connections to each client connection: HTTP/2 streams wait.
            handler.max_conns = collections.defaultdict(lambda: asyncio.Semaphore(1 << 20))

    @guarded
    def client_disconnected(self, client: Client) -> None:
        """Close what still waits for this client, forget the connection."""
        for flow in [f for f in self.open_flows.values() if f.client_conn.id == client.id]:
            exchange = flow.metadata[_STATE]
            if exchange.reply is not None:
                exchange.reply()
        self._clients.pop(client.id, None)
        self._notes.pop(client.id, None)

    @guarded
    def server_connect(self, data: ServerConnectionHookData) -> None:
        """An upstream connection is about to be opened."""
        if (client := self._clients.get(data.client.id)) is not None:
            client.connecting += 1
        data.server.alpn_offers = (b"http/1.1",)  # an upstream connection for each HTTP/2 stream

    @guarded
    def server_connected(self, data: ServerConnectionHookData) -> None:
        """Watch the upstream socket."""
        client, handler = self._clients.get(data.client.id), _handler(data.client.id)
        if client is not None and handler is not None and data.server in handler.transports:
            stamps = client.connected(data.server.id, handler.transports[data.server])
            self._upstreams[data.server.id] = stamps

    @guarded
    def server_connect_error(self, data: ServerConnectionHookData) -> None:
        """An upstream connection could not be opened."""
        if (client := self._clients.get(data.client.id)) is not None and data.server.error:
            client.failed[data.server.error] = "connect"

    @guarded
    def tls_established_server(self, data: TlsData) -> None:
        """The handshake's writes are not the request's."""
        client = self._clients.get(data.context.client.id)
        if client is not None and data.conn.id in client.upstreams:
            client.upstreams[data.conn.id].reset()

    @guarded
    def tls_failed_server(self, data: TlsData) -> None:
        """The upstream's certificate is not to be trusted, or it does not speak TLS."""
        client = self._clients.get(data.context.client.id)
        if client is not None:
            client.tls_failed = True
            client.failed[str(data.conn.error)] = "tls"
        if not self._told_tls:
            self._told_tls = True
            say(f"upstream: {data.conn.error}; --upstream-ca names the authority to trust")

    @guarded
    def server_disconnected(self, data: ServerConnectionHookData) -> None:
        """Forget the upstream socket."""
        self._notes.pop(data.server.id, None)
        self._upstreams.pop(data.server.id, None)
        if (client := self._clients.get(data.client.id)) is not None:
            client.upstreams.pop(data.server.id, None)

    # -- one request ----------------------------------------------------------------------------

    @guarded
    def requestheaders(self, flow: http.HTTPFlow) -> None:
        """The head is complete: this is the arrival."""
        if has_body(flow.request):
            flow.request.stream = True  # also when recording fails below
        exchange = self._open(flow)
        if flow.request.headers.get("expect", "").lower() == "100-continue":
            exchange.deviations.append("continue")
        if has_body(flow.request):
            flow.request.stream = self._request_callable(exchange)

    def _open(self, flow: http.HTTPFlow) -> Exchange:
        client = self._clients.get(flow.client_conn.id)
        request = flow.request
        if client is not None and not request.is_http2:  # whose requests are not one by one
            client.next_request()
        exchange = Exchange(0, client)
        now, lag_us = exchange.client_stamp
        row = self._arrival(client, now, lag_us)
        head = (request.data.method, request.data.path, list(request.headers.fields))
        flow.metadata[_STATE] = exchange
        self.open_flows[flow.id] = flow
        try:
            exchange.stream = self._recorder.open(now, row, head, lag_us)
        except BaseException as error:  # noqa: BLE001 - the exchange goes on, unrecorded
            self.failed("open", error)
        return exchange

    def _arrival(self, client: ClientConnection | None, now: int, lag_us: int) -> dict[str, Any]:
        return {
            "arrival_ns": now,
            "arrival_clock": clock_of(client, lag_us),
            "host": self._host,
            "worker": self._worker,
            "conn_id": client.number if client else None,
            "attempt": 1,
        }

    @guarded
    def request(self, flow: http.HTTPFlow) -> None:
        """The request is complete; streamed ones were stamped by their callable."""
        if (exchange := flow.metadata.get(_STATE)) is not None:
            self._end_request(exchange)

    @guarded
    def responseheaders(self, flow: http.HTTPFlow) -> None:
        """The reply's head is here: stamp what was sent before it, stream what follows."""
        exchange = flow.metadata.get(_STATE)
        if flow.response is not None and flow.response.status_code != 101:
            flow.response.stream = True  # also when recording fails below
        if exchange is None or flow.response is None:
            return
        if exchange.client is not None:
            exchange.upstream = exchange.client.upstreams.get(flow.server_conn.id)
        stamps = exchange.upstream
        if stamps is not None and stamps.first_write_ns:
            self._recorder.mark(exchange.stream, "send_ns", stamps.first_write_ns)
        fields = list(flow.response.headers.fields)
        status = flow.response.status_code
        at_ns, lag_us = read_stamp(stamps)
        self._recorder.reply_head(exchange.stream, at_ns, status, fields, lag_us)
        if status != 101:  # 101 switches protocols: there is no body
            flow.response.stream = self._reply_callable(flow, exchange)
            self._offer_relay(flow, exchange)

    def _offer_relay(self, flow: http.HTTPFlow, exchange: Exchange) -> None:
        """Let the fast path have the reply's interior, where it may."""
        stamps = exchange.upstream
        if not self.relays.enabled or stamps is None or not relayable(flow, stamps):
            return
        try:
            handler = _handler(flow.client_conn.id)
            exchange.relay = Relay(self.relays, handler, flow, stamps, exchange.stream)
        except (AttributeError, KeyError, TypeError, StopIteration):
            self.relays.enabled = False  # not as it was when it was written: mitmproxy's own way
        else:
            stamps.relay = exchange.relay

    @guarded
    def response(self, flow: http.HTTPFlow) -> None:
        """The reply is complete; the row waits for the rest of a request that is still coming."""
        exchange = flow.metadata.get(_STATE)
        if exchange is None:
            return
        end_ns, _ = read_stamp(exchange.upstream)
        exchange.reply = lambda: self._close(flow, "ok", {"origin": "upstream", "end_ns": end_ns})
        if exchange.request_ended:
            exchange.reply()

    @guarded
    def error(self, flow: http.HTTPFlow) -> None:
        """The exchange ended early, on either side, or was refused by mitmproxy itself."""
        exchange = flow.metadata.get(_STATE) or self._open(flow)
        if exchange.reply is not None:
            exchange.reply()
        elif client_left(flow):
            self._close(flow, "client_abort", {"origin": "upstream" if flow.response else None})
        elif flow.response is not None:
            if self.was_reset(flow.server_conn.id) and exchange.client is not None:
                exchange.client.socket.reset_at_close()
            columns = {"origin": "upstream", "error_type": "reply_cut"}
            self._close(flow, "upstream_abort", columns)
        else:
            self._close_with_page(flow, exchange)

    def _close_with_page(self, flow: http.HTTPFlow, exchange: Exchange) -> None:
        """No reply came: the row closes with the page that mitmproxy writes next, if it does."""
        client = exchange.client
        outcome, why = why_no_reply(flow, client)

        def close(page: bytes = b"") -> None:
            columns: dict[str, Any] = {"origin": "proxy", "error_type": why}
            if page[:7] == b"HTTP/1." and page[9:12].isdigit():
                columns["http_status"] = int(page[9:12])
                exchange.deviations.append("upstream_failure_page")
            self._close(flow, outcome, columns)

        if flow.client_conn.tls:  # the page is not to be read in what is written
            close(b"HTTP/1.1 400" if why == "refused" else b"HTTP/1.1 502")
            return
        exchange.reply = close
        if client is not None:
            client.socket.on_write = close
        else:
            close()

    def cut_open(self) -> None:
        """What our own end cuts off is nobody's failure."""
        for flow in list(self.open_flows.values()):
            self._cut(flow)

    @guarded
    def _cut(self, flow: http.HTTPFlow) -> None:
        self._close(flow, "cut", {})

    # -- what is passed on and not kept ---------------------------------------------------------

    def websocket_message(self, flow: http.HTTPFlow) -> None:
        """mitmproxy would keep every message of the connection."""
        if flow.websocket is not None:
            flow.websocket.messages.clear()

    def tcp_message(self, flow: tcp.TCPFlow) -> None:
        """mitmproxy would keep every piece of an upgraded connection."""
        flow.messages.clear()

    # -- pieces ---------------------------------------------------------------------------------

    def _request_callable(self, exchange: Exchange) -> Callable[[bytes], bytes]:
        recorder = self._recorder

        def piece(data: bytes) -> bytes:
            try:
                if not data:
                    self._end_request(exchange)
                    return data
                at_ns, lag_us = exchange.client_stamp
                exchange.request_left -= len(data)
                if exchange.request_left >= 0:
                    recorder.request_body(exchange.stream, at_ns, data, lag_us)
                else:
                    recorder.unkept(exchange.stream, at_ns, len(data), reply=False)
            except BaseException as error:  # noqa: BLE001 - traffic goes on whatever recording does
                self.failed("a piece", error)
            return data

        return piece

    def _reply_callable(self, flow: http.HTTPFlow, exchange: Exchange) -> Callable[[bytes], bytes]:
        stream, upstream, recorder = exchange.stream, exchange.upstream, self._recorder
        hold_back = _holder(flow)

        def piece(data: bytes) -> bytes:
            try:
                if data:
                    self.stock_reads += 1
                    at_ns, lag_us = read_stamp(upstream)
                    if raw_scanner(flow.response) is not None:
                        recorder.reply_chunked(stream, at_ns, data, lag_us)
                    else:
                        recorder.reply_data(stream, at_ns, data, lag_us)
                    if hold_back is not None:
                        hold_back()
            except BaseException as error:  # noqa: BLE001 - traffic goes on whatever recording does
                self.failed("a piece", error)
            return data

        return piece

    def _end_request(self, exchange: Exchange) -> None:
        if exchange.request_ended:
            return
        exchange.request_ended = True
        at_ns, lag_us = exchange.client_stamp
        self._recorder.mark(exchange.stream, "request_end_ns", at_ns, lag_us)
        if exchange.reply is not None:
            exchange.reply()

    def _close(self, flow: http.HTTPFlow, outcome: str, columns: dict[str, Any]) -> None:
        self.open_flows.pop(flow.id, None)
        exchange = flow.metadata[_STATE]
        if exchange.closed:
            return
        exchange.closed = True
        exchange.reply = None
        for connection in (flow.client_conn.id, flow.server_conn.id):
            exchange.deviations += self._notes.pop(connection, [])
        columns["outcome"] = outcome
        columns["deviations"] = exchange.deviations or None
        columns["send_clock"] = "callback"
        if exchange.relay is not None:
            exchange.relay.end()
            columns["backpressure_ns"] = exchange.relay.backpressure_ns
            exchange.relay = None  # it knows the stream, which knows the flow, which knows us
        columns |= path_columns(flow, exchange)
        self._recorder.close(exchange.stream, time.monotonic_ns(), columns)


def _holder(flow: http.HTTPFlow) -> Callable[[], None] | None:
    """What keeps an HTTP/2 client that does not read from filling our memory; None for HTTP/1."""
    handler = _handler(flow.client_conn.id)
    if not flow.request.is_http2 or handler is None or flow.server_conn not in handler.transports:
        return None
    top = http_layer(handler.layer)
    connection = top.connections[flow.client_conn].h2_conn
    stream_id = next(n for n, s in top.streams.items() if s.flow is flow)
    transport = handler.transports[flow.server_conn].writer.transport
    return functools.partial(http2.hold_back, connection, stream_id, transport)


def _handler(client_id: str) -> Any:
    return ctx.master.addons.get("proxyserver").connections.get(client_id)
