"""Tries, before every run, the private points of aiohttp and asyncio that replay leans on."""

import asyncio
import itertools
import socket
from asyncio import sslproto
from collections.abc import Callable
from time import monotonic_ns

import aiohttp

from tokentape.replay.exchange import Exchange
from tokentape.replay.sockets import Poller, connect_stamped
from tokentape.replay.transport import StampedConnector, StampedProtocol
from tokentape.traces.blocks import NO_STAMP
from tokentape.traces.errors import TokentapeError
from tokentape.traces.kernel_stamps import KernelClock

_CHECK_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class _Pieces:
    """A recorder for the self-check."""

    def __init__(self) -> None:
        self.status = 0
        self.seen: list[bytes] = []

    def reply_head(
        self,
        stream: int,
        t_ns: int,
        status: int,
        headers: list[tuple[bytes, bytes]],
        lag_us: int = NO_STAMP,
    ) -> None:
        self.status = status

    def reply_data(self, stream: int, t_ns: int, data: bytes, lag_us: int = NO_STAMP) -> None:
        self.seen.append(data)


async def _until(condition: Callable[[], bool]) -> None:
    deadline_ns = monotonic_ns() + 1_000_000_000
    while not condition():
        assert monotonic_ns() < deadline_ns, "nothing was read"
        await asyncio.sleep(0.001)


async def self_check() -> None:
    """Read a reply in two pieces off a real socket; TokentapeError if aiohttp has changed."""
    pieces = _Pieces()
    exchange = Exchange(pieces)
    exchange.stream = 1
    wrong = ""
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    poller = Poller(loop)
    with theirs:
        try:
            await StampedConnector(KernelClock(), poller).close()
            protocol = StampedProtocol(loop, itertools.count(1))
            protocol.bind(exchange)
            transport = await connect_stamped(
                loop, ours, protocol, KernelClock(), poller, None, None
            )
            protocol.set_response_params(auto_decompress=False)
            theirs.sendall(_CHECK_HEAD + b"3\r\none\r\n")
            await _until(lambda: len(pieces.seen) == 1)
            theirs.sendall(b"3\r\ntwo\r\n0\r\n\r\n")
            await _until(lambda: len(pieces.seen) == 2)
            assert callable(aiohttp.TCPConnector._create_connection)  # noqa: SLF001
            assert callable(aiohttp.TCPConnector._wrap_create_connection)  # noqa: SLF001
            assert "_app_transport" in sslproto.SSLProtocol.__init__.__code__.co_names
            transport.abort()
            await asyncio.sleep(0)
            if (pieces.status, pieces.seen) != (200, [b"one", b"two"]) or not exchange.end_ns:
                wrong = f"status {pieces.status}, {len(pieces.seen)} pieces"
        except (AttributeError, TypeError, AssertionError) as error:
            wrong = str(error)
        finally:
            poller.close()
            ours.close()
    if wrong:
        raise TokentapeError(
            f"aiohttp {aiohttp.__version__} does not work as replay needs ({wrong}); "
            "install aiohttp>=3.14,<3.15"
        )
