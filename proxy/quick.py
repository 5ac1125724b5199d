"""The same answers sooner: small functions of mitmproxy that each request calls many times.

Looking a header up, reading an option, forking a context or numbering a flow does, in mitmproxy,
more than these callers need. Each replacement answers as the original does, is tested against it,
and takes its place only where the original's source text is the one it was written for.
"""

import asyncio
import dataclasses
import functools
import hashlib
import inspect
import itertools
from types import SimpleNamespace
from typing import Any

from mitmproxy import flow, hooks, http, optmanager
from mitmproxy.coretypes import multidict
from mitmproxy.proxy import context, layer, server

_IMMUTABLE = (bool, int, float, str, type(None))
_current_copy = optmanager._Option.current  # noqa: SLF001
_handle_paused = layer.Layer.handle_event
_drain_all = server.ConnectionHandler.drain_writers

# What the replacements were written from: another source text of any of these, and none is used.
ORIGINALS: tuple[Any, ...] = (
    http.Headers.get_all,
    http.Headers._reduce_values,  # noqa: SLF001
    multidict._MultiDict.get_all,  # noqa: SLF001
    multidict._MultiDict.__getitem__,  # noqa: SLF001
    context.Context.__init__,
    context.Context.fork,
    optmanager._Option.current,  # noqa: SLF001
    hooks.Hook.args,
    layer.Layer.handle_event,
    server.ConnectionHandler.drain_writers,
    flow.Flow.__init__,
)
KNOWN_SOURCES = {
    "75349139c0da9aa6": "12.2.3"
}  # beginning of their sha256, by the version of mitmproxy


def apply() -> bool:
    """Put the replacements in place, once; False for sources that are not the known ones."""
    if digest() not in KNOWN_SOURCES:
        return False
    for owner, attribute, replacement in (
        (http.Headers, "get", _headers_get),
        (http.Headers, "__contains__", _headers_contains),
        (context.Context, "fork", _fork),
        (optmanager._Option, "current", _current),  # noqa: SLF001
        (hooks.Hook, "args", _args),
        (layer.Layer, "handle_event", _handle_event),
        (server.ConnectionHandler, "drain_writers", _drain_writers),
    ):
        setattr(owner, attribute, replacement)
    # Flows are told apart by number: random ids are dear, and nobody outside sees them.
    vars(flow)["uuid"] = SimpleNamespace(uuid4=itertools.count(1).__next__)
    return True


def digest() -> str:
    """What tells these sources from those of another version."""
    texts = "".join(inspect.getsource(original) for original in ORIGINALS)
    return hashlib.sha256(texts.encode()).hexdigest()[:16]


def _headers_get(self: http.Headers, key: str | bytes, default: Any = None) -> Any:
    """As Mapping.get: all values of a name, folded, or the default."""
    name = (key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key).lower()
    found = [value for field, value in self.fields if field.lower() == name]
    if not found:
        return default
    return ", ".join([value.decode("utf-8", "surrogateescape") for value in found])


def _headers_contains(self: http.Headers, key: str | bytes) -> bool:
    """As Mapping.__contains__, for names."""
    name = (key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key).lower()
    return any([field.lower() == name for field, _ in self.fields])  # noqa: C419 - a list is faster


def _fork(self: context.Context) -> context.Context:
    """As Context.fork, without making a server connection first that is thrown away."""
    fork = context.Context.__new__(context.Context)
    fork.client, fork.options, fork.server = self.client, self.options, self.server
    fork.layers = self.layers.copy()
    return fork


def _current(self: Any) -> Any:
    """As _Option.current; what cannot change needs no copy."""
    value = self._default if self.value is optmanager.unset else self.value
    return value if isinstance(value, _IMMUTABLE) else _current_copy(self)


@functools.cache
def _fields_of(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def _args(self: Any) -> list[Any]:
    """As Hook.args; the fields of each kind are looked up once."""
    kind: Any = type(self)
    return [getattr(self, name) for name in _fields_of(kind)]


def _handle_event(self: layer.Layer, event: Any) -> Any:
    """As Layer.handle_event where nothing waits and nobody debugs, which is nearly always."""
    if self._paused or self.debug is not None:
        yield from _handle_paused(self, event)
        return
    steps = self._handle_event(event)
    for command in steps:
        if command.blocking is True:
            command.blocking = self
            self._paused = layer.Paused(command, steps)
            yield command
            return
        yield command


async def _drain_writers(self: Any) -> None:
    """As ConnectionHandler.drain_writers, which need not be asked when nothing waits to be sent."""
    for io in self.transports.values():
        writer = io.writer
        if writer is not None and (
            not isinstance(writer, asyncio.StreamWriter)
            or writer.transport.is_closing()
            or writer.transport.get_write_buffer_size()
        ):
            await _drain_all(self)  # type: ignore[no-untyped-call]
            return
