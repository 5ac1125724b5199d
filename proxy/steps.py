"""Fewer steps for each of mitmproxy's events: hooks are called where they arise.

Stock starts a task for each hook, asks every add-on twice whether it wants it, and comes back to
the stream a turn of the event loop later: four times for each request. Here the functions that want
a hook are looked up once, and called in place; what follows is the same. The loop below is that of
one version of mitmproxy: with any other source text nothing is patched.
"""

import collections
import functools
import hashlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

from mitmproxy import http
from mitmproxy.master import Master
from mitmproxy.proxy import commands, events, server
from mitmproxy.utils import asyncio_utils

# sha256 of the source of ConnectionHandler.server_event, by the versions that it was read in.
KNOWN_SOURCES = {"a2b42657ebe8bf6d": "12.2.3"}


def apply(master: Master) -> bool:
    """Patch this process for a master whose add-ons are complete; False for an unknown source."""
    handler: Any = server.ConnectionHandler
    original = getattr(handler.server_event, "stock", handler.server_event)
    digest = hashlib.sha256(inspect.getsource(original).encode()).hexdigest()[:16]
    if digest not in KNOWN_SOURCES:
        return False
    functions = _lookup(master)

    @functools.wraps(original)
    async def server_event(self: Any, event: events.Event) -> None:
        async with self._server_event_lock:  # no await beyond this point
            self.timeout_watchdog.register_activity()
            queue = collections.deque([event])
            unsent = _Unsent(self.transports)
            try:
                while queue:
                    for command in self.layer.handle_event(queue.popleft()):
                        if isinstance(command, commands.SendData):
                            unsent.add(command.connection, command.data)
                            continue
                        unsent.send()  # traffic first
                        if isinstance(command, commands.StartHook):
                            _call(functions(command.name), command)
                            if command.blocking:
                                queue.append(events.HookCompleted(command))
                        elif not isinstance(command, commands.Log) or command.level > logging.INFO:
                            _carry_out(self, command)
                unsent.send()
            except Exception:  # noqa: BLE001 - as stock: this connection's trouble, and nobody else's
                unsent.send()
                self.log("mitmproxy has crashed!", logging.ERROR, exc_info=True)

    server_event.stock = original  # type: ignore[attr-defined]
    handler.server_event = server_event
    _replace_rest(handler, functions)
    return True


def _replace_rest(handler: Any, functions: Callable[[str], Any]) -> None:
    for subclass in handler.__subclasses__():
        for own in (handler, subclass, *subclass.__subclasses__()):  # the live ones have their own
            own.handle_hook = _handle_hook(functions)
    for kind in (http.MessageData, http.RequestData, http.ResponseData):
        if "__post_init__" in dir(kind):  # checks the type of each field of each message
            kind.__post_init__ = lambda _self: None  # type: ignore[method-assign]


class _Unsent:
    """Pieces for one connection that follow each other directly: a head and its body are one write.

    Each write is a system call, and wakes whoever reads.
    """

    __slots__ = ("_connection", "_pieces", "_transports")

    def __init__(self, transports: Any) -> None:
        self._transports = transports
        self._connection: Any = None
        self._pieces: list[bytes] = []

    def add(self, connection: Any, data: bytes) -> None:
        """Send it with what comes next; first what is for another connection."""
        if connection is not self._connection:
            self.send()
            self._connection = connection
        self._pieces.append(data)

    def send(self) -> None:
        """Write what there is."""
        pieces = self._pieces
        if not pieces:
            return
        io = self._transports.get(self._connection)
        if io is not None and io.writer is not None and not io.writer.is_closing():
            io.writer.write(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        pieces.clear()


def _lookup(master: Master) -> Callable[[str], tuple[Callable[[Any], Any], ...]]:
    """What finds the functions that want a hook, each name once."""
    found: dict[str, tuple[Callable[[Any], Any], ...]] = {}
    addons = [a for a in master.addons.chain if a is not None]

    def functions(name: str) -> tuple[Callable[[Any], Any], ...]:
        if name not in found:
            wanting = (getattr(addon, name, None) for addon in addons)
            found[name] = tuple(f for f in wanting if callable(f))
        return found[name]

    return functions


def _call(wanting: tuple[Callable[[Any], Any], ...], hook: commands.StartHook) -> None:
    """Call what wants a hook; an add-on that fails is logged, as stock does."""
    for function in wanting:
        try:
            function(*hook.args())
        except Exception:
            logging.getLogger(__name__).exception("add-on failed in %s", hook.name)


def _handle_hook(functions: Callable[[str], tuple[Callable[[Any], Any], ...]]) -> Any:
    async def handle_hook(_self: Any, hook: commands.StartHook) -> None:
        _call(functions(hook.name), hook)

    return handle_hook


def _carry_out(self: Any, command: commands.Command) -> None:
    """One command of a layer, but SendData, as ConnectionHandler.server_event carries it out."""
    if isinstance(command, commands.OpenConnection):
        handler = asyncio_utils.create_task(
            self.open_connection(command),
            name=f"server connection handler {command.connection.address}",
            keep_ref=False,
            client=self.client.peername,
        )
        self.transports[command.connection] = server.ConnectionIO(handler=handler)
    elif isinstance(command, commands.RequestWakeup):
        task = asyncio_utils.create_task(
            self.wakeup(command),
            name=f"wakeup timer ({command.delay:.1f}s)",
            keep_ref=False,
            client=self.client.peername,
        )
        self.wakeup_timer.add(task)
    elif isinstance(command, commands.ConnectionCommand):
        if command.connection not in self.transports:
            return  # the connection has already been closed
        if isinstance(command, commands.CloseTcpConnection):
            self.close_connection(command.connection, command.half_close)
        elif isinstance(command, commands.CloseConnection):
            self.close_connection(command.connection, False)
        else:
            raise TypeError(f"Unexpected command: {command}")
    elif isinstance(command, commands.Log):
        self.log(command.message, command.level)
    else:
        raise TypeError(f"Unexpected command: {command}")
