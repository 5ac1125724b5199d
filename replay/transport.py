"""The wire of a replay: aiohttp on our own transport, and body bytes kept out of it.

aiohttp keeps what it is good at: connections and their pool, TLS settings, request serialization,
response heads, end of body. Reads carry the kernel's stamp (`sockets.py`); body pieces go straight
to the recorder and wake no coroutine. A request is armed: its connection taken and its head built,
long before it is released in a single write.
It must never retry a request, and never follow a redirect. Private points of aiohttp that it leans
on are tried by `self_check` before every run.
"""

import asyncio
import contextlib
import functools
import itertools
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from errno import errorcode
from pathlib import Path
from time import monotonic_ns
from typing import Any, cast

import aiohappyeyeballs
import aiohttp
from aiohttp import payload
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest
from aiohttp.http import RawResponseMessage
from aiohttp.streams import StreamReader
from aiohttp.tracing import Trace
from yarl import URL

from tokentape.replay.exchange import Exchange
from tokentape.replay.sockets import Poller, connect_stamped, stamped_socket
from tokentape.replay.trust import trust
from tokentape.traces.blocks import NO_STAMP
from tokentape.traces.kernel_stamps import SO_TIMESTAMPNS, KernelClock

NO_TIMEOUT = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None)
NO_REPLY = (aiohttp.ClientError, OSError)  # what a failed request raises
SKIPPED_HEADERS = ("Accept-Encoding", "User-Agent")  # a compressed reply could not be read at ease
WARM_AT_ONCE = 64  # connects in flight while warming: below the usual listen backlog of 128
SPARE_FILES = 128  # descriptors left for everything that is not a connection
ESTABLISHED = b"\x01"  # the first byte of Linux's tcp_info
TCP_INFO = getattr(socket, "TCP_INFO", None)


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
        if not exchange.first_ns:
            exchange.first_ns = protocol.read_ns
        if exchange.left:
            return False
        exchange.recorder.reply_data(exchange.stream, protocol.read_ns, data, protocol.lag_us)
        if exchange.leave_events:
            exchange.count(data, protocol.read_ns)
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


class StampedProtocol(ResponseHandler):
    """aiohttp's client protocol of one connection, which knows the exchange that it carries."""

    def __init__(self, loop: asyncio.AbstractEventLoop, numbers: "itertools.count[int]") -> None:
        super().__init__(loop)
        self.conn_id = next(numbers)
        self.carried = 0
        self.exchange: Exchange | None = None
        self.read_ns = 0
        self.lag_us = NO_STAMP

    def bind(self, exchange: Exchange) -> None:
        """What is written and read from now on belongs to this request."""
        self.exchange = exchange
        exchange.conn_id = self.conn_id
        exchange.reused = self.carried > 0
        self.carried += 1

    def sending(self) -> bool:
        """Stamp the first write of a request; what TLS itself writes later is none."""
        exchange = self.exchange
        if exchange is None or exchange.head_ns:
            return False
        if not exchange.send_ns:
            exchange.send_ns = monotonic_ns()
        return True

    def sent(self) -> None:
        """Stamp the request's end."""
        exchange = self.exchange
        if exchange is not None and exchange.send_ns and not exchange.head_ns:
            exchange.send_end_ns = monotonic_ns()

    def left(self, at_ns: int) -> None:
        """The last stamp is that of the last byte."""
        if self.exchange is not None and not self.exchange.end_ns:
            self.exchange.kernel_send_ns = at_ns

    def acked(self, at_ns: int) -> None:
        """As `left`."""
        if self.exchange is not None and not self.exchange.end_ns:
            self.exchange.acked_ns = at_ns

    def feed_data(self, data: tuple[RawResponseMessage, StreamReader], size: int = 0) -> None:
        """A response head was read: record it, and turn its body to the recorder."""
        message, body = data
        exchange = self.exchange
        if exchange is not None and message.code >= 200 and not exchange.head_ns:
            exchange.head_ns = self.read_ns
            exchange.status = message.code
            assert exchange.stream is not None
            exchange.recorder.reply_head(
                exchange.stream, self.read_ns, message.code, list(message.raw_headers), self.lag_us
            )
            if exchange.leave_events:
                exchange.count_from(message.code, message.headers)
            self._divert(body, exchange)
        super().feed_data(data, size)

    def _divert(self, body: StreamReader, exchange: Exchange) -> None:
        """Send on what came with the head, and swap the body's class so that the rest follows."""
        if type(body) is not StreamReader:
            exchange.end_ns = self.read_ns  # aiohttp's one shared empty body
            return
        assert exchange.stream is not None
        if body._buffer:  # noqa: SLF001 - tried by self_check
            exchange.first_ns = self.read_ns
        for piece in body._buffer:  # noqa: SLF001
            exchange.recorder.reply_data(exchange.stream, self.read_ns, piece, self.lag_us)
            if exchange.leave_events:
                exchange.count(piece, self.read_ns)
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
    """aiohttp's pool on our transport, without limit, with connections opened ahead of need."""

    def __init__(self, clock: KernelClock, poller: Poller, ca: Path | None = None) -> None:
        super().__init__(
            limit=0,
            keepalive_timeout=None,
            ttl_dns_cache=None,
            socket_factory=stamped_socket,
            ssl=trust(ca) if ca else True,
        )
        assert isinstance(self._factory, functools.partial), "TCPConnector._factory"
        factory = functools.partial(StampedProtocol, self._loop, itertools.count(1))
        self._factory = cast("functools.partial[ResponseHandler]", factory)
        self._clock = clock
        self._poller = poller

    async def _wrap_create_connection(
        self,
        *args: Any,
        addr_infos: list[Any],
        req: ClientRequest,
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109
        client_error: type[Exception] = aiohttp.ClientConnectorError,
        **kwargs: Any,
    ) -> tuple[asyncio.Transport, ResponseHandler]:
        """As aiohttp's, with our transport as its last step."""
        sock = None
        try:
            async with asyncio.timeout(timeout.sock_connect):
                sock = await aiohappyeyeballs.start_connection(
                    addr_infos, loop=self._loop, socket_factory=stamped_socket
                )
                protocol = args[0]()
                context, host = kwargs.get("ssl"), kwargs.get("server_hostname")
                transport = await connect_stamped(
                    self._loop, sock, protocol, self._clock, self._poller, context, host
                )
                return transport, protocol
        except ssl.CertificateError as error:
            raise aiohttp.ClientConnectorCertificateError(req.connection_key, error) from error
        except ssl.SSLError as error:
            raise aiohttp.ClientConnectorSSLError(req.connection_key, error) from error
        except OSError as error:
            if error.errno is None and isinstance(error, TimeoutError):
                raise
            raise client_error(req.connection_key, error) from error

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

    async def warm(self, peers: Sequence[URL], count: int) -> int:
        """Open connections to peers, as many to each, and leave them in the pool; their number.

        The first one to a peer resolves the name, and raises one of NO_REPLY when the peer does not
        take it; a peer that takes no more after that gets no more.
        """
        return sum([await self._warm(url, -(-count // len(peers))) for url in peers])

    async def _warm(self, url: URL, count: int) -> int:
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
    """A request body that waits, with its connection and head ready, until it is released.

    The stock class warns about bodies past 1 MB, which long prompts are.
    """

    def __init__(self, data: bytes, exchange: Exchange) -> None:
        payload.Payload.__init__(self, data, content_type="application/json")
        self._size = len(data)
        self._exchange = exchange
        self._writer: Any = None
        self._gate: asyncio.Future[None] | None = None

    async def write_with_length(self, writer: Any, content_length: int | None) -> None:
        """Called by aiohttp when the connection is there and the head is in its buffer."""
        writer.protocol.bind(self._exchange)
        if not self._exchange.release_ns:
            self._writer = writer
            self._gate = asyncio.get_running_loop().create_future()
            await self._gate
        if not self._exchange.send_ns:
            await writer.write(self._value)

    @property
    def stale(self) -> bool:
        """True when the connection that it waits on is gone, be it that only the kernel knows.

        A server may close an idle connection at any time, and a request that crosses that is lost:
        2 us of asking the kernel leave only what is still on the way here.
        """
        if self._writer is None:
            return False
        transport = self._writer.transport
        if transport is None or transport.is_closing():
            return True
        if TCP_INFO is None:
            return False
        sock = transport.get_extra_info("socket")
        return bool(sock.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 1) != ESTABLISHED)

    def release(self) -> None:
        """Send head and body now, in one write; as soon as there is a connection, if not yet."""
        self._exchange.release_ns = monotonic_ns()
        if self._writer is None or self._gate is None or self._gate.done():
            return
        try:
            self._writer.write(self._value).send(None)  # our transport never makes a writer wait
        except StopIteration:
            pass
        except Exception as error:  # noqa: BLE001 - the connection went away: its task ends by it
            self._gate.set_exception(error)
            return
        self._gate.set_result(None)


class Client:
    """Sends exchanges over one pool."""

    def __init__(
        self, session: aiohttp.ClientSession, connector: StampedConnector, clock: KernelClock
    ) -> None:
        self._session = session
        self.connector = connector
        self.clock = clock  # to be refreshed about once a second

    async def perform(
        self, exchange: Exchange, url: URL, headers: dict[str, str], body: Body
    ) -> None:
        """Take a connection, send when the body is released, follow the reply to its end.

        The outcome is left in the exchange; `exchange.deadline` is there to be set. Run it in a
        task of its own: the task's context tells the connector whose connect it makes.
        """
        _CURRENT.set(exchange)
        try:
            async with asyncio.timeout(None) as exchange.deadline:
                await self._round_trip(url, headers, body)
            exchange.outcome = "upstream_abort" if exchange.error_type else "ok"
            if exchange.left:  # the reply ended while its client was leaving
                exchange.left_early()
        except TimeoutError as error:  # a connect may time out in the kernel, too
            exchange.outcome = "timeout"
            ours = "first_byte_timeout" if exchange.late_first else "total_timeout"
            exchange.error_type = errorcode.get(error.errno or 0) or ours
            if exchange.left:
                exchange.left_early()
        except NO_REPLY as error:
            exchange.outcome = "upstream_abort" if exchange.send_ns else "connect_error"
            exchange.error_type = _error_type(error)
        finally:
            exchange.end_ns = exchange.end_ns or monotonic_ns()
            for timer in exchange.timers:
                timer.cancel()

    async def _round_trip(self, url: URL, headers: dict[str, str], body: Body) -> None:
        response = await self._session.post(url, data=body, headers=headers, allow_redirects=False)
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
async def open_client(ca: Path | None = None) -> AsyncIterator[Client]:
    """A client whose connections close with the block; `ca` as in `trust`."""
    clock = KernelClock()
    poller = Poller(asyncio.get_running_loop())
    connector = StampedConnector(clock, poller, ca)
    async with aiohttp.ClientSession(
        connector=connector,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=SKIPPED_HEADERS,
        timeout=NO_TIMEOUT,
        trust_env=False,
    ) as session:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as keeper:
            # The kernel begins to stamp with the first socket that asks, and misses a few packets.
            with contextlib.suppress(OSError):
                keeper.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
            yield Client(session, connector, clock)
    await asyncio.sleep(0)  # the transports' last words
    poller.close()


async def fetch(
    method: str,
    url: str,
    headers: dict[str, str],
    body: bytes | None,
    timeout_s: float,
    ca: Path | None = None,
) -> tuple[int, str, bytes]:
    """One plain request outside a run: (status, content type, body).

    Raises TimeoutError, or one of NO_REPLY when there is no reply.
    """
    async with (
        aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=timeout_s), skip_auto_headers=SKIPPED_HEADERS
        ) as session,
        session.request(
            method,
            url,
            headers=headers,
            data=body,
            allow_redirects=False,
            ssl=trust(ca) if ca else True,
        ) as reply,
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
