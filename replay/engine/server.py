"""The engine over HTTP: OpenAI chat and completions, /tokenize, /health and /metrics, as vLLM does.

`serve` blocks until a signal; `start` runs in the caller's event loop. The server never checks keys
or model names: it is a stand-in for any server. It listens only where it is told to.
"""

import asyncio
import errno
import gc
import resource
import signal
import socket
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress

import msgspec
from aiohttp import HttpVersion11, web

from tokentape.replay.engine.asks import Ask, RefusedError, read_ask, read_tokenize
from tokentape.replay.engine.counters import Counters
from tokentape.replay.engine.profile import Profile
from tokentape.replay.engine.replies import Reply, error_body
from tokentape.replay.engine.steps import StepLoop
from tokentape.replay.engine.streams import EventStream, WholeReply, bare, chunk
from tokentape.traces.clock import wall_unix_ns
from tokentape.traces.errors import UsageError

BODY_LIMIT_BYTES = 256 * 1024 * 1024
BACKLOG = 4096  # connections that may wait to be accepted: a replay opens its pool at once
ACCEPTED_AT_ONCE = 16  # in one turn of the loop, so that steps go on meanwhile
# The kernel's own buffer grows to megabytes otherwise, and a slow reader is seen only after it.
SEND_BUFFER_BYTES = 128 * 1024
LAST_PORT = 65_535  # getaddrinfo wraps larger ones silently
SHUTDOWN_S = 0.05  # for replies under way, twice; 0 would wait without end
STREAM_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Server": "tokentape-engine"}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Routes:
    """The HTTP handlers; one per engine."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.counters = Counters()
        self.steps = StepLoop(profile, self.counters)
        self._started_unix_s = wall_unix_ns() // 10**9

    def application(self) -> web.Application:
        """An application with all routes."""
        app = web.Application(client_max_size=BODY_LIMIT_BYTES, middlewares=[_answer_errors])
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/tokenize", self.tokenize)
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.metrics)
        return app

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        return await self._generate(request, chat=True)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        return await self._generate(request, chat=False)

    async def models(self, _: web.Request) -> web.Response:
        """GET /v1/models."""
        model = {
            "id": self.profile.model,
            "object": "model",
            "created": self._started_unix_s,
            "owned_by": "tokentape",
            "root": self.profile.model,
            "parent": None,
            "max_model_len": self.profile.max_model_tokens,
        }
        return _json(msgspec.json.encode({"object": "list", "data": [model]}))

    async def tokenize(self, request: web.Request) -> web.Response:
        """POST /tokenize."""
        tokens = read_tokenize(await request.read())
        limit = self.profile.max_model_tokens
        reply = {"count": len(tokens), "max_model_len": limit, "tokens": tokens, "token_strs": None}
        return _json(msgspec.json.encode(reply))

    async def health(self, _: web.Request) -> web.Response:
        """GET /health: 200 with an empty body."""
        return web.Response()

    async def metrics(self, _: web.Request) -> web.Response:
        """GET /metrics: the Prometheus page."""
        page = self.counters.page(self.steps.batch, self.profile)
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=page.encode(), headers=headers)

    async def _generate(self, request: web.Request, *, chat: bool) -> web.StreamResponse:
        body = await request.read()
        arrived_ns = time.monotonic_ns()
        ask = read_ask(body, chat=chat, profile=self.profile)
        reply = Reply(
            ask,
            uuid.uuid4().hex[:16],
            wall_unix_ns() // 10**9,
            with_metrics=self.profile.per_request_metrics,
        )
        if ask.stream:
            return await self._stream(request, ask, reply, arrived_ns)
        sequence, listener = ask.sequence(arrived_ns), WholeReply(reply)
        self.steps.submit(sequence, listener)
        try:
            await listener.done
        finally:
            self.steps.abort(sequence)
        return _json(reply.whole(sequence))

    async def _stream(
        self, request: web.Request, ask: Ask, reply: Reply, arrived_ns: int
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=STREAM_HEADERS)
        chunked = request.version >= HttpVersion11
        if chunked:
            response.enable_chunked_encoding()
        await response.prepare(request)
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client left before its reply began")
        frame, limit_bytes = chunk if chunked else bare, self.profile.stream_buffer_bytes
        listener = EventStream(reply, transport, frame, limit_bytes)
        sequence = ask.sequence(arrived_ns)
        self.steps.submit(sequence, listener)
        try:
            await listener.done
        finally:
            self.steps.abort(sequence)
            self.counters.slow_readers += listener.slow
        return response


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except RefusedError as error:
        return _json(error_body(str(error), 400, error.param), 400)
    except web.HTTPException as error:
        return _json(error_body(error.reason, error.status), error.status)


def _json(body: bytes, status: int = 200) -> web.Response:
    headers = {"Content-Type": "application/json", "Server": "tokentape-engine"}
    return web.Response(body=body, status=status, headers=headers)


class RunningEngine:
    """An engine that serves at `url`; `close` ends its open streams and frees its port."""

    def __init__(self, url: str, routes: Routes, runner: web.AppRunner) -> None:
        self.url = url
        self.counters = routes.counters
        self._routes = routes
        self._runner = runner

    async def close(self) -> None:
        """Stop at once: replies under way are cut."""
        self._routes.steps.close()
        await self._runner.cleanup()


async def start(listen: str, profile: Profile) -> RunningEngine:
    """Serve in the running event loop at HOST:PORT (port 0: any).

    Raises UsageError that names the address when it cannot be listened on.
    """
    sock = _listening_socket(listen)
    routes = Routes(profile)
    runner = web.AppRunner(
        routes.application(),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=SHUTDOWN_S,
    )
    await runner.setup()
    await web.SockSite(runner, sock, backlog=ACCEPTED_AT_ONCE).start()
    sock.listen(BACKLOG)  # asyncio has one number for both
    host, port = sock.getsockname()[:2]
    return RunningEngine(f"http://{f'[{host}]' if ':' in host else host}:{port}", routes, runner)


def serve(listen: str, profile: Profile, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; `on_ready` gets the URL when requests can be sent.

    Raises UsageError as `start` does. Raises the process's limit of open files as far as allowed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(_serve(listen, profile, on_ready))


async def _serve(listen: str, profile: Profile, on_ready: Callable[[str], None]) -> None:
    engine = await start(listen, profile)
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    gc.collect()
    gc.freeze()  # a full collection would stop all streams for the vocabulary's sake
    try:
        on_ready(engine.url)
        await stopped.wait()
    finally:
        await engine.close()


def _listening_socket(listen: str) -> socket.socket:
    host, colon, port_text = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    digits = port_text.isascii() and port_text.isdigit()
    if not colon or not host or not digits or int(port_text) > LAST_PORT:
        raise UsageError(f"{listen!r} is not an address to listen on: give HOST:PORT")
    try:
        found = socket.getaddrinfo(host, int(port_text), type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"cannot listen on {listen}: {error}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # inherited
        sock.setblocking(False)
        sock.bind(address)
    except OSError as error:
        sock.close()
        busy = error.errno == errno.EADDRINUSE
        reason = "the port is in use; choose another or 0 for any" if busy else error
        raise UsageError(f"cannot listen on {listen}: {reason}") from None
    return sock
