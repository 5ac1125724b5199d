"""mitmproxy set up for LLM streams: its own Master, listener, options, drain.

Why each option: the comment beside it. Never mitmdump: its other add-ons double the cost
of a request. HTTP/2 on the listening side is offered only when asked for (`http2.py`).
"""

import asyncio
import fcntl
import gc
import logging
import os
import socket
import sys
import tempfile
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mitmproxy import master, options
from mitmproxy.addons import core, disable_h2c, errorcheck, next_layer, proxyserver, tlsconfig
from mitmproxy.proxy import layers, mode_servers, mode_specs
from mitmproxy.proxy import server as mitmproxy_server

from tokentape.proxy import exact, http2, quick, release, steps, traps
from tokentape.proxy.addon import Capture
from tokentape.proxy.options import BACKLOG, CaptureOptions
from tokentape.proxy.relay import missing_parts
from tokentape.proxy.sockets import StampedAsyncio, StampedSocket
from tokentape.traces.crash import told
from tokentape.traces.errors import TokentapeError
from tokentape.traces.recording import say

DRAIN_POLL_S = 0.05
# A client that was read or written to so lately, or has not asked yet, may be about to ask; that is
# respected for a while only, since some clients never are quiet.
QUIET_S, PATIENT_S = 0.25, 1.0
SAID_ERRORS = 5  # further ones are only counted


class TapeMode(mode_specs.ReverseMode):
    """Reverse mode under a name of its own, as mitmproxy allows one listener class per mode."""


class TapeInstance(mode_servers.AsyncioServerInstance[TapeMode]):
    """Listens on a socket that was bound before mitmproxy started."""

    bound: socket.socket

    def make_top_layer(self, context: Any) -> Any:
        """Every connection is a reverse-proxied one."""
        return layers.modes.ReverseProxy(context)

    async def listen(self, host: str, port: int) -> list[Any]:
        """Serve the bound socket."""
        stamped = StampedSocket(fileno=self.bound.detach())
        return [await asyncio.start_server(self.handle_stream, sock=stamped, backlog=BACKLOG)]


class ErrorCounter(logging.Handler):
    """Counts errors that mitmproxy logs; without a handler of ours they vanish in its own."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count, and say the first ones."""
        self.count += 1
        if self.count <= SAID_ERRORS:
            # No more of it: what follows may quote what a client sent.
            what = record.getMessage().partition("\n")[0].partition(":")[0].rstrip("!")
            error = record.exc_info[1] if record.exc_info else None
            say(f"proxy: {what}: {told(error)}" if error else f"proxy: {what}")


def build(
    wanted: CaptureOptions, upstream: str, bound: socket.socket, capture: Capture
) -> master.Master:
    """A Master with exactly the add-ons that a streaming reverse proxy needs."""
    TapeInstance.bound = bound
    host, port = bound.getsockname()[:2]
    spec = f"tape:{upstream}@{'[' + host + ']' if ':' in host else host}:{port}"
    m = master.Master(options.Options(mode=[spec], confdir=str(_confdir())))
    m.addons.add(
        core.Core(),
        proxyserver.Proxyserver(),
        next_layer.NextLayer(),
        tlsconfig.TlsConfig(),
        disable_h2c.DisableH2C(),
        errorcheck.ErrorCheck(),
    )
    m.options.update(
        connection_strategy="lazy",  # eager gives the client an empty reply when upstream is down
        keep_host_header=True,  # the request head then reaches upstream byte for byte
        tcp_timeout=86400,  # stock kills a connection after 600 s of silence: a long prefill
        validate_inbound_headers=False,  # odd but working traffic is not ours to refuse
        http2=wanted.http2,
        certs=[f"*={wanted.certificate}"] if wanted.certificate else [],
        ssl_verify_upstream_trusted_ca=str(wanted.upstream_ca) if wanted.upstream_ca else None,
        http3=False,
        store_streamed_bodies=False,
    )
    m.addons.add(capture)
    return m


def _confdir() -> Path:
    """Where mitmproxy keeps its certificate authority; made once, since keys are slow to make."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "tokentape" / "mitmproxy"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or none that may be written
        return Path(tempfile.mkdtemp(prefix="tokentape-"))
    return folder


async def serve(
    wanted: CaptureOptions,
    upstream: str,
    bound: socket.socket,
    capture: Capture,
    stop: asyncio.Event,
    on_ready: Callable[[], None],
) -> int:
    """Proxy until `stop`, then drain; returns the number of errors that mitmproxy logged."""
    errors = ErrorCounter()
    logging.getLogger().addHandler(errors)
    logging.getLogger().setLevel(logging.WARNING)
    for name in traps.apply(capture.note, capture.refused):
        say(f"this mitmproxy does not allow the remedy {name!r}")
    for name in exact.apply(capture.was_reset) + http2.apply() + missing_parts():
        say(f"this mitmproxy lacks {name}: heads or chunks may be written anew, and more slowly")
    vars(mitmproxy_server)["asyncio"] = StampedAsyncio()
    m = build(wanted, upstream, bound, capture)
    for part, applied in [("look-ups", quick.apply()), ("steps", steps.apply(m))]:
        if not applied:
            say(f"this mitmproxy is not one that was tested: requests take its own, slower {part}")
        elif part == "steps":
            release.apply()
    running = asyncio.ensure_future(m.run())
    proxy = m.addons.get("proxyserver")
    while not running.done() and not any(s.is_running for s in proxy.servers):  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    if running.done():
        await running  # it says what is wrong
        raise TokentapeError("the proxy did not start")
    gc.collect()
    gc.freeze()
    # Small young collections, 3 ms each; of what outlives them only after 2 M more objects, where
    # stock thresholds pause 355 ms at 2,000 streams. release.py leaves them little to find.
    gc.set_threshold(4_000, 500, 100)
    on_ready()
    await asyncio.wait([running, asyncio.ensure_future(stop.wait())], return_when="FIRST_COMPLETED")
    if not running.done():
        await drain(proxy, capture, stop, wanted.drain_s)
        m.shutdown()
    await running
    logging.getLogger().removeHandler(errors)
    return errors.count


async def drain(proxy: Any, capture: Capture, stop: asyncio.Event, drain_s: float) -> None:
    """Refuse new connections, let what is in flight end; a second stop ends it at once.

    A connection is idle when no request is on it, nothing is unread and, at first, when it has been
    quiet: a request that a client sends just as we hang up has no answer.
    """
    await asyncio.sleep(DRAIN_POLL_S)  # who is in the backlog is let in
    for server in proxy.servers:
        await server.stop()
    stop.clear()
    loop = asyncio.get_running_loop()
    deadline, patient = loop.time() + drain_s, loop.time() + PATIENT_S
    while proxy.connections and not stop.is_set() and loop.time() < deadline:
        busy = {flow.client_conn.id for flow in capture.open_flows.values()}
        for client_id, handler in list(proxy.connections.items()):
            io = handler.transports.get(handler.client)
            if client_id in busy or io is None or _unsent_bytes(io.writer):
                continue
            if loop.time() < patient and capture.quiet_s(client_id) < QUIET_S:
                continue
            if not _unread_bytes(io.writer):
                io.handler.cancel("idle while draining")
        await asyncio.sleep(DRAIN_POLL_S)
    capture.cut_open()


def _unread_bytes(writer: Any) -> int:
    """What a client has sent and nobody has read."""
    number = writer.get_extra_info("socket").fileno()
    return int.from_bytes(fcntl.ioctl(number, termios.FIONREAD, bytes(4)), sys.byteorder)


def _unsent_bytes(writer: Any) -> int:
    """What a slow client has yet to take."""
    return int(writer.transport.get_write_buffer_size())
