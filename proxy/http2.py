"""HTTP/2 on the listening side: many streams at once, and bounded memory for clients that stall.

mitmproxy buffers without bound what a client's flow-control window does not admit. Here, the
upstream connection of a stream (each has its own) is not read while too much waits for that stream,
so a client that stops reading slows its own streams and nothing else.
"""

import importlib
from typing import Any

UNSENT_BYTES = 64 << 10  # that wait for one stream's window before its upstream is not read
MAX_STREAMS = 1000  # at once on a connection; hyper-h2 allows 100, and ends a connection beyond

_held: dict[tuple[int, int], Any] = {}  # (connection, stream) -> the upstream transport


def apply() -> list[str]:
    """Install the patches; what this mitmproxy lacks for them, in which case nothing is done."""
    private: Any = importlib.import_module("mitmproxy.proxy.layers.http._http_h2")
    connection = private.BufferedH2Connection
    lacks = [n for n in ("stream_window_updated", "reset_stream") if not hasattr(connection, n)]
    lacks += [n for n in ("stream_buffers",) if n not in connection.__annotations__]
    if lacks or hasattr(connection, "tokentape"):
        return lacks
    connection.tokentape = True
    init, updated = connection.__init__, connection.stream_window_updated
    reset = connection.reset_stream

    def many_streams(self: Any, config: Any) -> None:
        init(self, config)
        self.local_settings.max_concurrent_streams = MAX_STREAMS
        self.local_settings.acknowledge()

    def window_updated(self: Any, stream_id: int) -> bool:
        sent = bool(updated(self, stream_id))
        if (id(self), stream_id) in _held and unsent_bytes(self, stream_id) <= UNSENT_BYTES // 2:
            release(self, stream_id)
        return sent

    def reset_stream(self: Any, stream_id: int, error_code: int = 0) -> None:
        release(self, stream_id)
        reset(self, stream_id, error_code)

    connection.__init__ = many_streams
    connection.stream_window_updated = window_updated
    connection.reset_stream = reset_stream
    return []


def unsent_bytes(h2_connection: Any, stream_id: int) -> int:
    """What waits for the window of a stream."""
    waiting = h2_connection.stream_buffers.get(stream_id)
    return sum(len(piece.data) for piece in waiting) if waiting else 0


def hold_back(h2_connection: Any, stream_id: int, transport: Any) -> None:
    """Stop reading a stream's upstream while its client does not take what came."""
    if unsent_bytes(h2_connection, stream_id) > UNSENT_BYTES and not transport.is_closing():
        _held[id(h2_connection), stream_id] = transport
        transport.pause_reading()


def release(h2_connection: Any, stream_id: int) -> None:
    """Read the stream's upstream again; nothing where it was read all the time."""
    transport = _held.pop((id(h2_connection), stream_id), None)
    if transport is not None and not transport.is_closing():
        transport.resume_reading()
