"""mitmproxy's hooks to raw records: opens, stamps and closes one record per request.

Nothing here raises into a flow: mitmproxy guards hooks, and the stream callables guard themselves,
since a callable that raises would lose its chunk. A record is closed exactly once, from `response`
or from `error`, whichever comes first.
"""

import platform
import time
from collections.abc import Callable
from typing import Any

from mitmproxy import ctx, http
from mitmproxy.connection import Client
from mitmproxy.proxy.server_hooks import ServerConnectionHookData
from mitmproxy.tls import TlsData

from tokentape.proxy import traps
from tokentape.traces.recording import Recorder

_STATE = "tokentape"
_CLIENT_GONE = "Client disconnected."


class SocketStamps:
    """When one socket was last read, and when bytes of its current request were written.

    Read stamps are taken in the transport's callback, before any task wakes. A chunk that is
    handled after the next read came carries that later stamp: never too early, and then seen as
    coalesced.
    """

    __slots__ = ("first_write_ns", "last_write_ns", "read_ns", "requests")

    def __init__(self) -> None:
        self.first_write_ns = self.last_write_ns = self.read_ns = self.requests = 0

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

        writer.write = stamped

    def reset(self) -> None:
        """The next write begins another request."""
        self.first_write_ns = self.last_write_ns = 0


class Exchange:
    """What the add-on keeps of one flow while it runs."""

    __slots__ = ("client", "closed", "deviations", "request_ended", "stream", "upstream")

    def __init__(self, stream: int, client: SocketStamps | None) -> None:
        self.stream = stream
        self.client = client
        self.upstream: SocketStamps | None = None
        self.closed = False
        self.request_ended = False
        self.deviations: list[str] = []


class Capture:
    """The add-on: `open_flows` are in flight, `errors` counts what went wrong in recording."""

    def __init__(self, recorder: Recorder, worker: str) -> None:
        self._recorder = recorder
        self._worker = worker
        self._host = platform.node()
        self._conn_ids: dict[str, int] = {}
        self._conns = 0
        self._client_stamps: dict[str, SocketStamps] = {}
        self._stamps: dict[str, SocketStamps] = {}
        self.open_flows: dict[str, http.HTTPFlow] = {}
        self.errors = 0
        self._noted: list[str] = []

    def note(self, deviation: str) -> None:
        """A remedy of traps.py altered a reply; the flow whose hook comes next is the one."""
        self._noted.append(deviation)

    # -- connections ----------------------------------------------------------------------------

    def client_connected(self, client: Client) -> None:
        """Number the connection, watch its reads, widen mitmproxy's limit of five upstreams."""
        self._conns += 1
        self._conn_ids[client.id] = self._conns
        handler = _handler(client.id)
        if handler is not None:
            traps.widen_permits(handler)
            stamps = self._client_stamps[client.id] = SocketStamps()
            stamps.watch_reads(handler.transports[client].reader)

    def client_disconnected(self, client: Client) -> None:
        """Forget the connection's number."""
        self._conn_ids.pop(client.id, None)
        self._client_stamps.pop(client.id, None)

    def server_connected(self, data: ServerConnectionHookData) -> None:
        """Watch the upstream socket."""
        handler = _handler(data.client.id)
        if handler is None or (io := handler.transports.get(data.server)) is None:
            return
        stamps = self._stamps[data.server.id] = SocketStamps()
        stamps.watch_writes(io.writer)
        stamps.watch_reads(io.reader)

    def tls_established_server(self, data: TlsData) -> None:
        """The handshake's writes are not the request's."""
        if (stamps := self._stamps.get(data.conn.id)) is not None:
            stamps.reset()

    def server_disconnected(self, data: ServerConnectionHookData) -> None:
        """Forget the upstream socket."""
        self._stamps.pop(data.server.id, None)

    # -- one request ----------------------------------------------------------------------------

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        """The head is complete: this is the arrival."""
        client = self._client_stamps.get(flow.client_conn.id)
        now = client.read_ns if client else time.monotonic_ns()
        request = flow.request
        row = {
            "arrival_ns": now,
            "arrival_clock": "callback" if client else "coroutine",
            "host": self._host,
            "worker": self._worker,
            "conn_id": self._conn_ids.get(flow.client_conn.id),
            "attempt": 1,
        }
        head = (request.data.method, request.data.path, list(request.headers.fields))
        exchange = Exchange(self._recorder.open(now, row, head), client)
        flow.metadata[_STATE] = exchange
        self.open_flows[flow.id] = flow
        if request.headers.get("expect", "").lower() == "100-continue":
            exchange.deviations.append("continue")
        if _has_body(request):
            request.stream = self._request_callable(exchange)

    def request(self, flow: http.HTTPFlow) -> None:
        """The request is complete; streamed ones were stamped by their callable."""
        if (exchange := flow.metadata.get(_STATE)) is not None:
            self._end_request(exchange)

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        """The reply's head is here: stamp what was sent before it, stream what follows."""
        exchange = flow.metadata.get(_STATE)
        assert flow.response is not None
        if exchange is None:
            return
        exchange.deviations += self._noted
        self._noted.clear()
        stamps = exchange.upstream = self._stamps.get(flow.server_conn.id)
        if stamps is not None and stamps.first_write_ns:
            self._recorder.mark(exchange.stream, "send_ns", stamps.first_write_ns)
        now = stamps.read_ns if stamps else time.monotonic_ns()
        fields = list(flow.response.headers.fields)
        self._recorder.reply_head(exchange.stream, now, flow.response.status_code, fields)
        if flow.response.status_code != 101:
            flow.response.stream = self._reply_callable(exchange)

    def response(self, flow: http.HTTPFlow) -> None:
        """The reply is complete."""
        self._close(flow, "ok", {"origin": "upstream"})

    def error(self, flow: http.HTTPFlow) -> None:
        """The exchange ended early, on either side."""
        assert flow.error is not None
        if flow.error.msg == _CLIENT_GONE:
            self._close(flow, "client_abort", {"origin": "upstream" if flow.response else None})
            return
        columns: dict[str, Any] = {"origin": "upstream", "error_type": "reply_cut"}
        if flow.response is None:
            # the client gets a page that mitmproxy made
            columns = {"origin": "proxy", "error_type": "no_reply", "http_status": 502}
            flow.metadata[_STATE].deviations.append("upstream_failure_page")
        if flow.server_conn.timestamp_tcp_setup is None:
            self._close(flow, "connect_error", columns | {"error_type": "connect"})
        else:
            self._close(flow, "upstream_abort", columns)

    # -- pieces ---------------------------------------------------------------------------------

    def _request_callable(self, exchange: Exchange) -> Callable[[bytes], bytes]:
        recorder = self._recorder

        def piece(data: bytes) -> bytes:
            try:
                if data:
                    recorder.request_body(exchange.stream, _read_ns(exchange.client), data)
                else:
                    self._end_request(exchange)
            except BaseException:  # noqa: BLE001 - traffic goes on whatever recording does
                self.errors += 1
            return data

        return piece

    def _reply_callable(self, exchange: Exchange) -> Callable[[bytes], bytes]:
        record, stream, upstream = self._recorder.reply_data, exchange.stream, exchange.upstream

        def piece(data: bytes) -> bytes:
            try:
                if data:
                    record(stream, _read_ns(upstream), data)
            except BaseException:  # noqa: BLE001 - traffic goes on whatever recording does
                self.errors += 1
            return data

        return piece

    def _end_request(self, exchange: Exchange) -> None:
        if not exchange.request_ended:
            exchange.request_ended = True
            self._recorder.mark(exchange.stream, "request_end_ns", _read_ns(exchange.client))

    def _close(self, flow: http.HTTPFlow, outcome: str, columns: dict[str, Any]) -> None:
        self.open_flows.pop(flow.id, None)
        exchange = flow.metadata.get(_STATE)
        if exchange is None or exchange.closed:
            return
        exchange.closed = True
        if self._noted:
            exchange.deviations += self._noted
            self._noted.clear()
        columns["outcome"] = outcome
        columns["deviations"] = exchange.deviations or None
        columns["send_clock"] = "callback"
        columns["event_clock"] = "callback" if exchange.upstream else "coroutine"
        # a whole reply ended with its last read; whatever broke off ends when we are told
        now = _read_ns(exchange.upstream) if outcome == "ok" else time.monotonic_ns()
        columns |= self._path_columns(flow)
        self._recorder.close(exchange.stream, now, columns)

    def _path_columns(self, flow: http.HTTPFlow) -> dict[str, Any]:
        """What the upstream connection tells; its set-up times are differences of wall stamps."""
        conn = flow.server_conn
        stamps = self._stamps.get(conn.id)
        if stamps is None:
            return {}
        columns: dict[str, Any] = {"upstream_reused": stamps.requests > 0}
        if stamps.first_write_ns:
            columns |= {"send_ns": stamps.first_write_ns, "send_end_ns": stamps.last_write_ns}
        if stamps.requests == 0 and conn.timestamp_start and conn.timestamp_tcp_setup:
            columns["connect_ns"] = int((conn.timestamp_tcp_setup - conn.timestamp_start) * 1e9)
            if conn.timestamp_tls_setup:
                tls_s = conn.timestamp_tls_setup - conn.timestamp_tcp_setup
                columns["tls_ns"] = int(tls_s * 1e9)
        stamps.requests += 1
        stamps.reset()
        return columns


def _read_ns(stamps: SocketStamps | None) -> int:
    """The socket's last read, or now where the socket is not watched."""
    return stamps.read_ns if stamps else time.monotonic_ns()


def _has_body(request: http.Request) -> bool:
    """Whether to stream the request: a body is announced, and it is not empty."""
    if "transfer-encoding" in request.headers:
        return True
    return bool(request.headers.get("content-length", "0") != "0")


def _handler(client_id: str) -> Any:
    return ctx.master.addons.get("proxyserver").connections.get(client_id)
