"""The wire of a replay: aiohttp, with stamps taken in the transport and body bytes kept out of it.

aiohttp keeps what it is good at: connections and their pool, TLS, request serialization, response
heads, end of body. Every read is stamped at the first statement of `data_received`, every request
at its first and last `write`; body pieces go straight to the recorder and wake no coroutine.
It must never retry a request, and never follow a redirect. Private points of aiohttp that it leans
on are tried by `self_check` before every run.
"""

import asyncio
import functools
import itertools
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from errno import errorcode
from time import monotonic_ns
from typing import Any, Protocol, cast

import aiohttp
from aiohttp import payload
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest
from aiohttp.http import RawResponseMessage
from aiohttp.streams import StreamReader
from aiohttp.tracing import Trace
from yarl import URL

from tokentape.traces.errors import TokentapeError

NO_TIMEOUT = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None)
NO_REPLY = (aiohttp.ClientError, OSError)  # what a failed request raises
SKIPPED_HEADERS = ("Accept-Encoding", "User-Agent")  # a compressed reply could not be read at ease
WARM_AT_ONCE = 64  # connects in flight while warming: below the usual listen backlog of 128
SPARE_FILES = 128  # descriptors left for everything that is not a connection


class Reply(Protocol):
    """Where a reply's head and body go; traces' Recorder is one."""

    def reply_head(
        self, stream: int, t_ns: int, status: int, headers: list[tuple[bytes, bytes]]
    ) -> None:
        """Status and headers of the reply."""

    def reply_data(self, stream: int, t_ns: int, data: bytes) -> None:
        """A piece of the body; pieces of one read share its stamp."""


class Exchange:
    """One request on the wire. The transport fills in the stamps (monotonic ns; 0 is never)."""

    __slots__ = (
        "conn_id",
        "connect_ns",
        "end_ns",
        "error_type",
        "head_ns",
        "launch_ns",
        "outcome",
        "recorder",
        "reused",
        "send_end_ns",
        "send_ns",
        "status",
        "stream",
    )

    def __init__(self, recorder: Reply) -> None:
        self.recorder = recorder
        self.stream: int | None = None
        self.launch_ns = 0
        self.connect_ns: int | None = None  # None: a connection was waiting
        self.send_ns = self.send_end_ns = self.head_ns = self.end_ns = 0
        self.status = 0
        self.conn_id: int | None = None
        self.reused = False
        self.outcome = "cut"
        self.error_type: str | None = None


_CURRENT: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


class Sink(StreamReader):
    """A reply body whose pieces go to the recorder; only its end wakes the coroutine."""

    __slots__ = ()

    def feed_data(self, data: bytes, size: int = 0) -> bool:
        """Hand a piece on, with the stamp of the read that brought it."""
        protocol = cast("StampedProtocol", self._protocol)
        exchange = protocol.exchange
        assert exchange is not None
        assert exchange.stream is not None
        exchange.recorder.reply_data(exchange.stream, protocol.read_ns, data)
        return False

    def feed_eof(self) -> None:
        """Stamp the end, then let aiohttp release the connection."""
        protocol = cast("StampedProtocol", self._protocol)
        if protocol.exchange is not None:
            protocol.exchange.end_ns = protocol.read_ns
        super().feed_eof()

    def begin_http_chunk_receiving(self) -> None:
        """Keep no chunk boundaries: the stock method would pause reading after many."""

    def end_http_chunk_receiving(self) -> None:
        """See begin_http_chunk_receiving."""


class StampedTransport:
    """asyncio's transport with a stamp on each write; everything else is the transport itself."""

    def __init__(self, inner: asyncio.Transport, protocol: "StampedProtocol") -> None:
        self._inner = inner
        self._protocol = protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def write(self, data: bytes) -> None:
        """Stamp, write, and stamp the end if nothing stayed behind."""
        self._protocol.bind_writer()
        self._inner.write(data)
        self._protocol.wrote(self._inner.get_write_buffer_size())

    def writelines(self, pieces: list[bytes]) -> None:
        """As `write`, head and body in one."""
        self.write(b"".join(pieces))


class StampedProtocol(ResponseHandler):
    """aiohttp's client protocol of one connection, which knows the exchange that it carries."""

    def __init__(self, loop: asyncio.AbstractEventLoop, numbers: "itertools.count[int]") -> None:
        super().__init__(loop)
        self.conn_id = next(numbers)
        self.carried = 0
        self.exchange: Exchange | None = None
        self.read_ns = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Put the stamping transport in; a full buffer of one byte tells when the last one left."""
        inner = cast("asyncio.Transport", transport)
        # TLS transports of asyncio pause at once and for ever when the limit is 0.
        inner.set_write_buffer_limits(high=1 if inner.get_extra_info("ssl_object") else 0, low=0)
        super().connection_made(cast("asyncio.Transport", StampedTransport(inner, self)))

    def bind_writer(self) -> None:
        """The request whose task writes now is what this connection carries."""
        exchange = _CURRENT.get()
        if exchange is not None and self.exchange is not exchange:
            self.exchange = exchange
            exchange.conn_id = self.conn_id
            exchange.reused = self.carried > 0
            self.carried += 1
            exchange.send_ns = monotonic_ns()

    def wrote(self, left_bytes: int) -> None:
        """Stamp the request's end, unless the socket took only a part."""
        if self.exchange is not None and left_bytes == 0:
            self.exchange.send_end_ns = monotonic_ns()

    def resume_writing(self) -> None:
        """The last byte of a large request has left."""
        self.wrote(0)
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Stamp the read before anything else is done with it."""
        self.read_ns = monotonic_ns()
        super().data_received(data)

    def feed_data(self, data: tuple[RawResponseMessage, StreamReader], size: int = 0) -> None:
        """A response head was read: record it, and turn its body to the recorder."""
        message, body = data
        exchange = self.exchange
        if exchange is not None and message.code >= 200 and not exchange.head_ns:
            exchange.head_ns = self.read_ns
            exchange.status = message.code
            assert exchange.stream is not None
            exchange.recorder.reply_head(
                exchange.stream, self.read_ns, message.code, list(message.raw_headers)
            )
            self._divert(body, exchange)
        super().feed_data(data, size)

    def _divert(self, body: StreamReader, exchange: Exchange) -> None:
        """Send on what came with the head, and swap the body's class so that the rest follows."""
        if type(body) is not StreamReader:
            exchange.end_ns = self.read_ns  # aiohttp's one shared empty body
            return
        assert exchange.stream is not None
        for piece in body._buffer:  # noqa: SLF001 - tried by self_check
            exchange.recorder.reply_data(exchange.stream, self.read_ns, piece)
        body._buffer.clear()  # noqa: SLF001
        body._size = 0  # noqa: SLF001
        body.__class__ = Sink
        if body.is_eof():
            exchange.end_ns = self.read_ns
        if self._reading_paused:  # the stock body had many chunks in the read that brought its head
            self._loop.call_soon(self.resume_reading)

    def set_exception(self, exc: BaseException, *cause: Any) -> None:
        """Fail the body too: aiohttp's parser forgets it when the framing breaks in the middle."""
        super().set_exception(exc, *cause)
        body = self._payload
        if body is not None and not body.is_eof() and body.exception() is None:
            body.set_exception(aiohttp.ClientPayloadError(), *cause)

    def connection_lost(self, exc: BaseException | None) -> None:
        """A body that ends with its connection ends now; aiohttp takes a reset for such an end."""
        self.read_ns = monotonic_ns()
        exchange = self.exchange
        if exc is not None and exchange is not None and not exchange.end_ns:
            exchange.error_type = _error_type(exc)
        super().connection_lost(exc)


class StampedConnector(aiohttp.TCPConnector):
    """aiohttp's pool with our protocol, no limit, and connections opened ahead of need."""

    def __init__(self) -> None:
        super().__init__(limit=0, keepalive_timeout=None, ttl_dns_cache=None)
        assert isinstance(self._factory, functools.partial), "TCPConnector._factory"
        factory = functools.partial(StampedProtocol, self._loop, itertools.count(1))
        self._factory = cast("functools.partial[ResponseHandler]", factory)

    async def _create_connection(
        self,
        req: ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109
    ) -> ResponseHandler:
        began_ns = monotonic_ns()
        protocol = await super()._create_connection(req, traces, timeout)
        if (exchange := _CURRENT.get()) is not None:
            exchange.connect_ns = monotonic_ns() - began_ns
        return protocol

    async def warm(self, url: URL, count: int) -> int:
        """Open connections and leave them in the pool; the number of them.

        The first one resolves the name, and raises one of NO_REPLY when the peer does not take it;
        a peer that takes no more after that gets no more.
        """
        request = ClientRequest("GET", url, loop=self._loop)
        opened = [await self.connect(request, [], NO_TIMEOUT)]
        while len(opened) < count:
            few = range(min(WARM_AT_ONCE, count - len(opened)))
            batch = await asyncio.gather(
                *(self.connect(request, [], NO_TIMEOUT) for _ in few), return_exceptions=True
            )
            opened += [c for c in batch if isinstance(c, aiohttp.connector.Connection)]
            if any(isinstance(c, BaseException) for c in batch):
                break
        for connection in opened:
            connection.release()
        return len(opened)


class Body(payload.BytesPayload):
    """A request body; the stock class warns about bodies past 1 MB, which long prompts are."""

    def __init__(self, data: bytes) -> None:
        payload.Payload.__init__(self, data, content_type="application/json")
        self._size = len(data)


class Client:
    """Sends exchanges over one pool."""

    def __init__(self, session: aiohttp.ClientSession, connector: StampedConnector) -> None:
        self._session = session
        self.connector = connector

    async def perform(
        self,
        exchange: Exchange,
        url: URL,
        headers: dict[str, str],
        body: bytes,
        timeout_s: float | None = None,
    ) -> None:
        """Send a request and follow its reply to the end; the outcome is left in the exchange.

        Run it in a task of its own: the task's context tells the transport whose bytes it writes.
        """
        _CURRENT.set(exchange)
        try:
            async with asyncio.timeout(timeout_s):
                await self._round_trip(url, headers, body)
            exchange.outcome = "upstream_abort" if exchange.error_type else "ok"
        except TimeoutError:
            exchange.outcome = "timeout"
        except NO_REPLY as error:
            exchange.outcome = "upstream_abort" if exchange.send_ns else "connect_error"
            exchange.error_type = _error_type(error)
        finally:
            exchange.end_ns = exchange.end_ns or monotonic_ns()

    async def _round_trip(self, url: URL, headers: dict[str, str], body: bytes) -> None:
        response = await self._session.post(
            url, data=Body(body), headers=headers, allow_redirects=False
        )
        try:
            if (error := response.content.exception()) is not None:
                raise error
            await response.content.wait_eof()
        finally:
            response.close()  # no effect once the body has ended: the connection is back by then


def _error_type(error: BaseException) -> str:
    number = getattr(error, "errno", None)
    return errorcode.get(number or 0) or type(error).__name__


@asynccontextmanager
async def open_client() -> AsyncIterator[Client]:
    """A client whose connections close with the block."""
    connector = StampedConnector()
    async with aiohttp.ClientSession(
        connector=connector,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=SKIPPED_HEADERS,
        timeout=NO_TIMEOUT,
        trust_env=False,
    ) as session:
        yield Client(session, connector)


async def fetch(
    method: str, url: str, headers: dict[str, str], body: bytes | None, timeout_s: float
) -> tuple[int, str, bytes]:
    """One plain request outside a run: (status, content type, body).

    Raises TimeoutError, or one of NO_REPLY when there is no reply.
    """
    async with (
        aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=timeout_s), skip_auto_headers=SKIPPED_HEADERS
        ) as session,
        session.request(method, url, headers=headers, data=body, allow_redirects=False) as reply,
    ):
        return reply.status, reply.content_type, await reply.read()


def allow_files(wanted: int) -> int:
    """Raise the limit of open files as far as it goes; how many connections that allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = (
        min(wanted + SPARE_FILES, hard) if hard != resource.RLIM_INFINITY else wanted + SPARE_FILES
    )
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        soft = target
    return wanted if soft == resource.RLIM_INFINITY else min(wanted, max(1, soft - SPARE_FILES))


_CHECK_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class _Pieces:
    """A recorder for the self-check."""

    def __init__(self) -> None:
        self.status = 0
        self.seen: list[bytes] = []

    def reply_head(
        self, stream: int, t_ns: int, status: int, headers: list[tuple[bytes, bytes]]
    ) -> None:
        self.status = status

    def reply_data(self, stream: int, t_ns: int, data: bytes) -> None:
        self.seen.append(data)


async def self_check() -> None:
    """Read a reply in two pieces through our protocol; TokentapeError if aiohttp has changed."""
    pieces = _Pieces()
    exchange = Exchange(pieces)
    exchange.stream = 1
    wrong = ""
    try:
        await StampedConnector().close()
        protocol = StampedProtocol(asyncio.get_running_loop(), itertools.count(1))
        protocol.exchange = exchange
        protocol.set_response_params(auto_decompress=False)
        protocol.data_received(_CHECK_HEAD + b"3\r\none\r\n")
        protocol.data_received(b"3\r\ntwo\r\n0\r\n\r\n")
        assert callable(aiohttp.TCPConnector._create_connection)  # noqa: SLF001
        if (pieces.status, pieces.seen) != (200, [b"one", b"two"]) or not exchange.end_ns:
            wrong = f"status {pieces.status}, {len(pieces.seen)} pieces"
    except (AttributeError, TypeError, AssertionError) as error:
        wrong = str(error)
    if wrong:
        raise TokentapeError(
            f"aiohttp {aiohttp.__version__} does not work as replay needs ({wrong}); "
            "install aiohttp>=3.14,<3.15"
        )
