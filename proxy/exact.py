"""What mitmproxy would write anew passes as it came: heads, and the chunk framing of replies.

mitmproxy parses a head and writes its own from the parts, and takes a chunked body apart to frame
it again. Here it goes on parsing, but what it sends are the bytes that came, as long as no part of
it has altered the message. Touches private parts of mitmproxy and h11; `apply` names a missing one.
"""

import importlib
from collections.abc import Callable
from typing import Any

import h11
from mitmproxy import http
from mitmproxy.proxy import commands, events

from tokentape.traces.chunked import ChunkScanner

_HTTP1 = "mitmproxy.proxy.layers.http._http1"
_NO_BODY = (204, 304)
_HEAD, _CHUNKS = "tokentape_head", "tokentape_chunks"  # what is kept on mitmproxy's messages


class _Now:
    """Whose head was cut out of its buffer last, and whether the patches are in place.

    mitmproxy parses it, announces it and chooses its body reader before any other head is read.
    """

    reading: Any = None
    head = b""
    installed = False
    was_reset: Callable[[str], bool] = staticmethod(lambda _connection: False)


class RawChunkedReader:
    """A body reader for h11's place: chunked data with its framing, up to its very end."""

    def __init__(self) -> None:
        self.scanner = ChunkScanner()

    def __call__(self, buf: Any) -> Any:
        """The next piece with its framing, the end of the message, or None to wait for more."""
        scanner = self.scanner
        if scanner.complete:
            return h11.EndOfMessage()
        data = bytes(buf)
        if not data:
            return None
        taken = 0 if scanner.stopped else scanner.interior(data, len(data))
        if scanner.stopped:
            taken += scanner.tail(data[taken:])
        return h11.Data(data=buf.maybe_extract_at_most(taken))

    def read_eof(self) -> Any:
        """The connection ended before the message did."""
        raise h11.RemoteProtocolError("peer closed connection without sending the whole body")


def raw_scanner(response: http.Response | None) -> ChunkScanner | None:
    """The scanner of a reply whose chunk framing passes as it came; None for any other reply."""
    return getattr(response, _CHUNKS, None)


def apply(was_reset: Callable[[str], bool]) -> list[str]:
    """Install the patches; returns what this mitmproxy lacks for them, and then does nothing.

    `was_reset` tells of a connection id whether the peer reset it: a body that lasts until the end
    of its connection is then not whole, which mitmproxy cannot see.
    """
    _Now.was_reset = staticmethod(was_reset)
    if _Now.installed:
        return []
    try:
        private: Any = importlib.import_module(_HTTP1)
        buffer: Any = importlib.import_module("h11._receivebuffer").ReceiveBuffer
        buffer().maybe_extract_lines()
        parts = [
            (private.Http1Connection, ("__init__", "buf")),
            (private.Http1Server, ("send", "wait", "read_headers", "mark_done")),
            (private.Http1Client, ("read_headers",)),
            (private.http1, ("assemble_request_head", "assemble_response_head")),
            (private.http1, ("read_request_head", "read_response_head")),
            (private, ("make_body_reader", "ResponseData", "ResponseEndOfMessage")),
            (private, ("ReceiveHttp", "RequestProtocolError", "ErrorCode")),
        ]
    except (AttributeError, ImportError) as error:
        return [str(error)]
    lacks = [
        f"{owner.__name__}.{name}"
        for owner, names in parts
        for name in names
        if not hasattr(owner, name) and name not in getattr(owner, "__annotations__", {})
    ]
    if not lacks:
        _keep_heads(private, buffer)
        _read_raw(private)
        _write_raw(private)
        _Now.installed = True
    return lacks


def _keep_heads(private: Any, receive_buffer: Any) -> None:
    """Keep each head's bytes on its message, and send them while the message is what was parsed."""

    class HeadBuffer(receive_buffer):  # type: ignore[misc]
        """Tells of each head's bytes, and whose they are."""

        def __init__(self, owner: Any) -> None:
            super().__init__()
            self._owner = owner

        def skip_blank_lines(self) -> None:
            """What some clients send after a body; stock would take the head for incomplete."""
            while self._blank():
                super().maybe_extract_lines()

        def maybe_extract_lines(self) -> Any:
            held = bytes(self)
            lines = super().maybe_extract_lines()
            if lines:
                _Now.reading, _Now.head = self._owner, held[: len(held) - len(self)]
            return lines

        def _blank(self) -> bool:
            start = bytes(self._data[:2])
            return start[:1] == b"\n" or start == b"\r\n"

    original = private.Http1Connection.__init__

    def init(self: Any, *args: Any) -> None:
        original(self, *args)
        self.buf = HeadBuffer(self)

    private.Http1Connection.__init__ = init
    private.http1 = _Heads(private.http1)


class _Heads:
    """mitmproxy's `http1` module, but for heads that can pass as they came."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def read_request_head(self, lines: list[bytes]) -> Any:
        """A request that knows its bytes; ValueError when it is none."""
        return _with_head(self._module.read_request_head(lines))

    def read_response_head(self, lines: list[bytes]) -> Any:
        """A response that knows its bytes; ValueError when it is none."""
        return _with_head(self._module.read_response_head(lines))

    def assemble_request_head(self, request: http.Request) -> bytes:
        """The head as it came, or mitmproxy's own of a request that was altered."""
        return _kept_head(request) or bytes(self._module.assemble_request_head(request))

    def assemble_response_head(self, response: http.Response) -> bytes:
        """The head as it came, or mitmproxy's own of a response that was altered."""
        return _kept_head(response) or bytes(self._module.assemble_response_head(response))


def _with_head(message: Any) -> Any:
    setattr(message, _HEAD, (_Now.head, message.headers.fields))
    return message


def _kept_head(message: Any) -> bytes | None:
    kept = getattr(message, _HEAD, None)
    if kept is None or kept[1] is not message.headers.fields:
        return None
    return bytes(kept[0])


def _read_raw(private: Any) -> None:
    """Read chunked replies with their framing."""
    for connection_class in (private.Http1Server, private.Http1Client):
        _skip_blank_lines(connection_class)
    make = private.make_body_reader

    def make_body_reader(expected_size: int | None) -> Any:
        reading = _Now.reading
        if expected_size is None and isinstance(reading, private.Http1Client):
            request, response = reading.request, reading.response
            if not (request.is_http2 or request.is_http3):
                raw = RawChunkedReader()
                setattr(response, _CHUNKS, raw.scanner)
                return raw
        reader = make(expected_size)
        if expected_size == -1 and isinstance(reading, private.Http1Client):
            _refuse_reset(reader, reading.conn.id)
        return reader

    private.make_body_reader = make_body_reader


def _skip_blank_lines(connection_class: Any) -> None:
    original: Callable[..., Any] = connection_class.read_headers

    def read_headers(self: Any, event: Any) -> Any:
        self.buf.skip_blank_lines()
        return original(self, event)

    connection_class.read_headers = read_headers


def _refuse_reset(reader: Any, connection_id: str) -> None:
    read_eof = reader.read_eof

    def read_whole_eof() -> Any:
        if _Now.was_reset(connection_id):
            raise h11.RemoteProtocolError("peer reset the connection")
        return read_eof()

    reader.read_eof = read_whole_eof


def _write_raw(private: Any) -> None:
    """Let Http1Server send raw chunks as they are, and never a terminal chunk of its own after."""
    send, wait = private.Http1Server.send, private.Http1Server.wait

    def send_raw(self: Any, event: Any) -> Any:
        if isinstance(event, private.ResponseData) and raw_scanner(self.response) is not None:
            yield commands.SendData(self.conn, event.data)
        elif isinstance(event, private.ResponseEndOfMessage) and (
            raw_scanner(self.response) is not None or self.response.status_code in _NO_BODY
        ):
            yield from self.mark_done(response=True)
        else:
            yield from send(self, event)

    def wait_raw(self: Any, event: Any) -> Any:
        """A reply whose framing broke lasts until its connection ends; a new request is in vain."""
        scanner = raw_scanner(self.response)
        if scanner is not None and scanner.broken and isinstance(event, events.DataReceived):
            yield commands.CloseConnection(self.conn)
            gone = private.ErrorCode.CLIENT_DISCONNECTED
            yield private.ReceiveHttp(
                private.RequestProtocolError(self.stream_id, "reply has no end", code=gone)
            )
        else:
            yield from wait(self, event)

    private.Http1Server.send = send_raw
    private.Http1Server.wait = wait_raw
