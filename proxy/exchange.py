"""One exchange: what the add-on keeps of a flow, and what columns can be read off it.

How an exchange ended is told apart here: who left, who refused, which step failed.
"""

from collections.abc import Callable
from typing import Any

from mitmproxy import http
from mitmproxy.connection import ConnectionState

from tokentape.proxy.relay import Relay
from tokentape.proxy.sockets import ClientConnection, SocketStamps, read_stamp
from tokentape.traces.blocks import MAX_BODY_BYTES, NO_STAMP


class Exchange:
    """What the add-on keeps of one flow while it runs; `reply` holds the end of an early reply."""

    __slots__ = (
        "client",
        "closed",
        "deviations",
        "relay",
        "reply",
        "request_ended",
        "request_left",
        "stream",
        "upstream",
    )

    def __init__(self, stream: int, client: ClientConnection | None) -> None:
        self.stream = stream
        self.client = client
        self.upstream: SocketStamps | None = None
        self.deviations: list[str] = []
        self.closed = self.request_ended = False
        self.reply: Callable[[], None] | None = None
        self.relay: Relay | None = None
        self.request_left = MAX_BODY_BYTES  # what of the request's body is still kept

    @property
    def client_stamp(self) -> tuple[int, int]:
        """(monotonic ns, lateness in us) of the client socket's last read."""
        return read_stamp(self.client.socket if self.client else None)


def path_columns(flow: http.HTTPFlow, exchange: Exchange) -> dict[str, Any]:
    """What the upstream connection tells; its set-up times are differences of wall stamps."""
    conn = flow.server_conn
    stamps = exchange.client.upstreams.get(conn.id) if exchange.client else None
    if stamps is None:
        return {}
    columns: dict[str, Any] = {"upstream_reused": stamps.requests > 0}
    if stamps.first_write_ns:
        columns |= {"send_ns": stamps.first_write_ns, "send_end_ns": stamps.last_write_ns}
    if stamps.requests == 0 and conn.timestamp_start and conn.timestamp_tcp_setup:
        columns["connect_ns"] = int((conn.timestamp_tcp_setup - conn.timestamp_start) * 1e9)
        if conn.timestamp_tls_setup:
            columns["tls_ns"] = int((conn.timestamp_tls_setup - conn.timestamp_tcp_setup) * 1e9)
    stamps.requests += 1
    return columns


def why_no_reply(flow: http.HTTPFlow, client: ClientConnection | None) -> tuple[str, str]:
    """(outcome, error type) of an exchange that mitmproxy ended before any reply."""
    if client is not None and flow.request.is_http2:  # whose upstreams are opened side by side
        told = flow.error.msg if flow.error is not None else ""
        if step := client.failed.get(told):
            return "connect_error", step
        connected = flow.server_conn.timestamp_tcp_setup is not None
    elif client is not None and client.tls_failed:
        return "connect_error", "tls"
    elif client is not None and client.connecting:
        client.connecting -= 1
        return "connect_error", "connect"
    else:
        connected = client is not None and bool(client.upstreams)
    # what mitmproxy would not pass on never had an upstream
    return ("upstream_abort", "no_reply") if connected else ("http_error", "refused")


def has_body(request: http.Request) -> bool:
    """Whether to stream the request: a body is announced, and it is not empty."""
    if "transfer-encoding" in request.headers:
        return True
    return bool(request.headers.get("content-length", "0") != "0")


def client_left(flow: http.HTTPFlow) -> bool:
    if not flow.client_conn.state & ConnectionState.CAN_READ:
        return True
    told = flow.error.msg if flow.error is not None else ""
    return flow.request.is_http2 and told.startswith("stream reset by client")


def clock_of(client: ClientConnection | None, lag_us: int) -> str:
    if client is None:
        return "coroutine"
    return "callback" if lag_us == NO_STAMP else "kernel"
