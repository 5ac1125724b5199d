"""Remedies for the places where stock mitmproxy breaks LLM traffic; each has its test.

Every patch touches private parts of mitmproxy or h11, so each is tried: one that cannot be
installed is named and left out, and traffic goes on without it.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import h11
from mitmproxy.proxy import events

_HTTP1 = "mitmproxy.proxy.layers.http._http1"
Note = Callable[[str, str], None]  # (connection id, what was altered on it)
Refused = Callable[[str], None]  # (id of a client connection whose request head was none)


class _Patches:
    """What the patched functions share: who is told, and whose head is being read right now."""

    note: Note = staticmethod(lambda _connection, _what: None)
    refused: Refused = staticmethod(lambda _connection: None)
    connection = ""
    installed: tuple[str, ...] = ()


def apply(note: Note, refused: Refused) -> list[str]:
    """Install the remedies; returns the names of those that this mitmproxy does not allow.

    `note` is told of every reply or request that one of them altered: "trailers" or "interim".
    `refused` is told of request heads that mitmproxy answers with 400 and says nothing of.
    """
    _Patches.note, _Patches.refused = staticmethod(note), staticmethod(refused)
    missing = []
    for name, install in (
        ("trailers", _accept_trailers),
        ("interim", _drop_interim),
        ("refused", _tell_refused),
    ):
        if name in _Patches.installed:
            continue
        try:
            install()
            _Patches.installed += (name,)
        except (AttributeError, ImportError):
            missing.append(name)
    return missing


def _accept_trailers() -> None:
    """Drop HTTP/1.1 trailers, on which stock mitmproxy crashes and hangs the client."""
    private: Any = importlib.import_module(_HTTP1)
    chunked_reader: Any = importlib.import_module("h11._readers").ChunkedReader

    class LaxChunkedReader(chunked_reader):  # type: ignore[misc]
        def __init__(self, connection: str) -> None:
            super().__init__()
            self._connection = connection

        def __call__(self, buf: Any) -> Any:
            event = super().__call__(buf)
            if isinstance(event, h11.EndOfMessage) and event.headers:
                _Patches.note(self._connection, "trailers")
                return h11.EndOfMessage()
            return event

    make = private.make_body_reader

    def make_body_reader(expected_size: int | None) -> Any:
        return (
            LaxChunkedReader(_Patches.connection) if expected_size is None else make(expected_size)
        )

    _watch_heads(private.Http1Client)
    _watch_heads(private.Http1Server)
    private.make_body_reader = make_body_reader


def _watch_heads(connection_class: Any) -> None:
    """Let make_body_reader know whose head it follows; it runs in the same step as read_headers."""
    original = connection_class.read_headers

    def read_headers(self: Any, event: Any) -> Any:
        commands = original(self, event)
        answer = None
        while True:
            _Patches.connection = self.conn.id
            try:
                command = commands.send(answer)
            except StopIteration as stop:
                return stop.value
            answer = yield command

    connection_class.read_headers = read_headers


def _tell_refused() -> None:
    """Tell of a request head that does not parse: it gets no flow, so no hook sees it."""
    server: Any = importlib.import_module(_HTTP1).Http1Server
    original, done = server.read_headers, server.done

    def read_headers(self: Any, event: Any) -> Iterator[Any]:
        yield from original(self, event)
        is_data = isinstance(event, events.DataReceived)
        ended = self.request is None and getattr(self.state, "__func__", None) is done
        if is_data and ended and not hasattr(self, "tokentape_refused"):
            self.tokentape_refused = True  # pipelined heads are read within one another
            _Patches.refused(self.conn.id)

    server.read_headers = read_headers


def _drop_interim() -> None:
    """Drop complete 1xx heads (not 101), which stock mitmproxy takes for the final response."""
    private: Any = importlib.import_module(_HTTP1)
    original = private.Http1Client.read_headers

    def read_headers(self: Any, event: Any) -> Any:
        if isinstance(event, events.DataReceived) and self.request:
            while _begins_with_interim(bytes(self.buf)[:13]):
                if not self.buf.maybe_extract_lines():
                    return ()  # the interim head is not complete yet
                _Patches.note(self.conn.id, "interim")
        return original(self, event)

    private.Http1Client.read_headers = read_headers


def _begins_with_interim(start: bytes) -> bool:
    """`HTTP/1.x 1yz`, but not 101, which really is the last response of its kind."""
    return (
        len(start) == 13
        and start[:7] == b"HTTP/1."
        and start[9:10] == b"1"
        and start[9:12] != b"101"
    )
