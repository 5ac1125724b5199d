"""HTTP/2 on the listening side: many streams at once, and bounded memory for clients that stall.

mitmproxy buffers without bound what a client's flow-control window does not admit. Here, the
upstream connection of a stream (each has its own) is not read while too much waits for that stream,
so a client that stops reading slows its own streams and nothing else.
"""

import importlib
from typing import Any

import h2.events

UNSENT_BYTES = 64 << 10  # that wait for one stream's window before its upstream is not read
MAX_STREAMS = 1000  # at once on a connection; hyper-h2 allows 100, and ends a connection beyond


def apply() -> list[str]:
    """Install the patches; what this mitmproxy lacks for them, in which case nothing is done."""
    private: Any = importlib.import_module("mitmproxy.proxy.layers.http._http_h2")
    connection = private.BufferedH2Connection
    needs = ("stream_window_updated", "reset_stream", "receive_data")
    lacks = [n for n in needs if not hasattr(connection, n)]
    lacks += [n for n in ("stream_buffers",) if n not in connection.__annotations__]
    if lacks or hasattr(connection, "tokentape"):
        return lacks
    connection.tokentape = True
    init, updated = connection.__init__, connection.stream_window_updated
    reset, receive = connection.reset_stream, connection.receive_data

    def many_streams(self: Any, config: Any) -> None:
        init(self, config)
        self.tokentape_held = {}  # stream -> the upstream transport; goes with the connection
        self.local_settings.max_concurrent_streams = MAX_STREAMS
        self.local_settings.acknowledge()

    def window_updated(self: Any, stream_id: int) -> bool:
        sent = bool(updated(self, stream_id))
        if stream_id in self.tokentape_held and unsent_bytes(self, stream_id) <= UNSENT_BYTES // 2:
            release(self, stream_id)
        return sent

    def reset_stream(self: Any, stream_id: int, error_code: int = 0) -> None:
        release(self, stream_id)
        reset(self, stream_id, error_code)

    def receive_data(self: Any, data: bytes) -> Any:
        told = receive(self, data)
        for event in told:
            if isinstance(event, h2.events.StreamReset):
                release(self, event.stream_id)
        return told

    connection.__init__ = many_streams
    connection.stream_window_updated = window_updated
    connection.reset_stream = reset_stream
    connection.receive_data = receive_data
    return []


def unsent_bytes(h2_connection: Any, stream_id: int) -> int:
    """What waits for the window of a stream."""
    waiting = h2_connection.stream_buffers.get(stream_id)
    return sum(len(piece.data) for piece in waiting) if waiting else 0


def hold_back(h2_connection: Any, stream_id: int, transport: Any) -> None:
    """Stop reading a stream's upstream while its client does not take what came."""
    if unsent_bytes(h2_connection, stream_id) > UNSENT_BYTES and not transport.is_closing():
        h2_connection.tokentape_held[stream_id] = transport
        transport.pause_reading()


def release(h2_connection: Any, stream_id: int) -> None:
    """Read the stream's upstream again; nothing where it was read all the time."""
    transport = h2_connection.tokentape_held.pop(stream_id, None)
    if transport is not None and not transport.is_closing():
        transport.resume_reading()
