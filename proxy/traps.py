"""Remedies for the places where stock mitmproxy breaks LLM traffic; each has its test.

Every patch touches private parts of mitmproxy, so `apply` checks that they are there: a missing one
switches that remedy off and is named, it never stops traffic.
"""

import asyncio
import collections
from collections.abc import Callable
from typing import Any

import h11
from h11._readers import ChunkedReader
from mitmproxy.proxy import events, server
from mitmproxy.proxy.layers.http import _http1

Note = Callable[[str], None]

_PERMITS = 1 << 20  # parallel upstream connections per client and address; stock: 5


class LaxChunkedReader(ChunkedReader):
    """Drops HTTP/1.1 trailers, on which stock mitmproxy crashes and hangs the client."""

    note: Note = staticmethod(lambda _: None)

    def __call__(self, buf: Any) -> Any:
        event = super().__call__(buf)
        if isinstance(event, h11.EndOfMessage) and event.headers:
            self.note("trailers")
            return h11.EndOfMessage()
        return event


def apply(note: Note) -> list[str]:
    """Install the remedies; returns the names of those that this mitmproxy does not allow.

    `note` is called with "trailers" or "interim" when one of them altered a reply.
    """
    missing = []
    for name, install in (("trailers", _accept_trailers), ("interim", _drop_interim)):
        try:
            install(note)
        except AttributeError:
            missing.append(name)
    if not hasattr(server.ConnectionHandler, "open_connection"):
        missing.append("permits")
    return missing


def widen_permits(handler: server.ConnectionHandler) -> None:
    """Let one client connection hold more than five upstream connections (HTTP/2 clients)."""
    handler.max_conns = collections.defaultdict(lambda: asyncio.Semaphore(_PERMITS))


def _accept_trailers(note: Note) -> None:
    LaxChunkedReader.note = staticmethod(note)
    make = _http1.make_body_reader
    if getattr(make, "lax", False):
        return

    def make_body_reader(expected_size: int | None) -> Any:
        return LaxChunkedReader() if expected_size is None else make(expected_size)

    make_body_reader.lax = True  # type: ignore[attr-defined]
    _http1.make_body_reader = make_body_reader


_interim_note: list[Note] = []


def _drop_interim(note: Note) -> None:
    """Drop complete 1xx heads (not 101), which stock mitmproxy takes for the final response."""
    first = not _interim_note
    _interim_note[:] = [note]
    if not first:
        return
    original = _http1.Http1Client.read_headers

    def read_headers(self: Any, event: events.ConnectionEvent) -> Any:
        if isinstance(event, events.DataReceived) and self.request:
            while _begins_with_interim(bytes(self.buf)[:13]):
                if not self.buf.maybe_extract_lines():
                    return  # the interim head is not complete yet
                _interim_note[0]("interim")
        yield from original(self, event)

    _http1.Http1Client.read_headers = read_headers  # type: ignore[method-assign]


def _begins_with_interim(start: bytes) -> bool:
    """`HTTP/1.x 1yz`, but not 101, which really is the last response of its kind."""
    return (
        len(start) == 13
        and start[:7] == b"HTTP/1."
        and start[9:10] == b"1"
        and start[9:12] != b"101"
    )
