"""The wire: every byte once and in order, stamps in the transport, outcomes by what happened."""

import asyncio
import socket
from collections.abc import Sequence
from time import monotonic_ns

import pytest
from yarl import URL

from replay_server import HEAD, LAST, Script, Seen, Step, chunk, plain, serve
from tokentape.replay import transport
from tokentape.replay.exchange import Exchange
from tokentape.replay.self_check import self_check
from tokentape.replay.transport import Body, open_client
from tokentape.traces.blocks import NO_STAMP
from tokentape.traces.errors import TokentapeError


class Pieces:
    """Keeps what the transport records."""

    def __init__(self) -> None:
        self.heads: list[tuple[int, int, int, list[tuple[bytes, bytes]]]] = []
        self.data: list[tuple[int, int, bytes]] = []

    def reply_head(
        self,
        stream: int,
        t_ns: int,
        status: int,
        headers: list[tuple[bytes, bytes]],
        lag_us: int = NO_STAMP,
    ) -> None:
        self.heads.append((stream, t_ns, status, headers))

    def reply_data(self, stream: int, t_ns: int, data: bytes, lag_us: int = NO_STAMP) -> None:
        self.data.append((stream, t_ns, data))

    def body(self, stream: int) -> bytes:
        return b"".join(data for number, _, data in self.data if number == stream)


async def send(
    url: str,
    recorder: Pieces,
    bodies: Sequence[bytes],
    *,
    at_once: bool = False,
    warm: int = 0,
    timeout_s: float | None = None,
) -> list[Exchange]:
    exchanges = []
    async with open_client() as client:
        if warm:
            await client.connector.warm([URL(url)], warm)
        tasks = []
        for number, body in enumerate(bodies, 1):
            exchange = Exchange(recorder)
            exchange.stream = number
            exchanges.append(exchange)
            ready = Body(body, exchange)
            task = asyncio.Task(
                client.perform(exchange, URL(url), {"X-Test": "1"}, ready),
                loop=asyncio.get_running_loop(),
                eager_start=True,
            )
            ready.release()
            if timeout_s is not None and exchange.deadline is not None:
                exchange.deadline.reschedule(asyncio.get_running_loop().time() + timeout_s)
            if not at_once:
                await task
            tasks.append(task)
        await asyncio.gather(*tasks)
    return exchanges


def run(script: Script, *bodies: bytes, **options: bool | float) -> tuple[Pieces, list[Exchange]]:
    pieces = Pieces()
    with serve(script) as server:
        exchanges = asyncio.run(send(server.url + "/v1/completions", pieces, bodies, **options))  # type: ignore[arg-type]
    return pieces, exchanges


def test_a_streamed_body_reaches_the_recorder_whole_and_in_order() -> None:
    words = [b"data: %d\n\n" % i for i in range(400)]
    pieces, (exchange,) = run(lambda _: [HEAD, *(chunk(w) for w in words), LAST], b"{}")
    assert pieces.body(1) == b"".join(words)
    assert exchange.outcome == "ok" and exchange.status == 200
    stamps = [t for _, t, _ in pieces.data]
    assert stamps == sorted(stamps)
    assert exchange.release_ns <= exchange.send_ns <= min(exchange.send_end_ns, exchange.head_ns)
    assert exchange.send_ns <= exchange.kernel_send_ns <= exchange.acked_ns
    assert exchange.kernel_send_ns <= exchange.head_ns
    assert exchange.head_ns == pieces.heads[0][1] <= stamps[0] <= stamps[-1] <= exchange.end_ns


def test_a_body_that_comes_with_its_head_in_one_read_is_recorded_whole() -> None:
    many = b"".join(chunk(b"%d;" % (i % 10)) for i in range(9000))
    for steps in ([HEAD + chunk(b"one") + chunk(b"two") + LAST], [HEAD + many, LAST]):
        pieces, (exchange,) = run(lambda _, s=steps: s, b"{}")  # type: ignore[misc]
        whole = (
            b"onetwo" if b"one" in steps[0] else b"".join(b"%d;" % (i % 10) for i in range(9000))
        )
        assert pieces.body(1) == whole
        assert exchange.outcome == "ok" and exchange.end_ns >= exchange.head_ns > 0


def test_pieces_stamped_by_the_transport_carry_the_time_at_which_they_came() -> None:
    gap_s = 0.15
    steps: list[Step] = [HEAD]
    for i in range(4):
        steps += [chunk(b"%d" % i), gap_s]
    with serve(lambda _: [*steps, LAST]) as server:
        pieces = Pieces()
        asyncio.run(send(server.url, pieces, [b"{}"]))
        sent = server.sent_ns[1:5]
    late_ms = [(t - s) / 1e6 for (_, t, _), s in zip(pieces.data, sent, strict=True)]
    assert all(0 <= late < 140 for late in late_ms), late_ms


@pytest.mark.parametrize(
    ("steps", "body", "outcome"),
    [
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"hello"], b"hello", "ok"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"], b"", "ok"),
        ([b"HTTP/1.1 204 No\r\n\r\n"], b"", "ok"),
        ([b"HTTP/1.1 100 Continue\r\n\r\n", *plain(200, {})], b"{}", "ok"),
        (plain(503, {}), b"{}", "ok"),
        ([b"HTTP/1.0 200 OK\r\n\r\n", b"tail", 0.05, None], b"tail", "upstream_abort"),
        ([HEAD, chunk(b"half"), 0.05, None], b"half", "upstream_abort"),
        ([HEAD, chunk(b"half"), 0.05, b"zz\r\n"], b"half", "upstream_abort"),
        ([None], b"", "upstream_abort"),
        ([b"nonsense\r\n\r\n"], b"", "upstream_abort"),
    ],
)
def test_each_kind_of_end_has_its_outcome(steps: list[Step], body: bytes, outcome: str) -> None:
    pieces, (exchange,) = run(lambda _: steps, b"{}", timeout_s=5.0)
    assert pieces.body(1) == body
    assert exchange.outcome == outcome
    assert exchange.end_ns > exchange.send_ns > 0
    assert (exchange.error_type is None) == (outcome == "ok")


def test_a_body_without_a_length_ends_with_its_connection() -> None:
    async def body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nall of it")
        writer.close()

    async def main() -> Exchange:
        server = await asyncio.start_server(body, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            return (await send(f"http://127.0.0.1:{port}/", pieces, [b"{}"]))[0]

    pieces = Pieces()
    exchange = asyncio.run(main())
    assert (exchange.outcome, pieces.body(1)) == ("ok", b"all of it")


def test_a_refused_connection_and_a_deadline_have_their_outcomes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    (refused,) = asyncio.run(send(f"http://127.0.0.1:{port}/", Pieces(), [b"{}"]))
    assert (refused.outcome, refused.error_type) == ("connect_error", "ECONNREFUSED")
    assert refused.send_ns == 0
    _, (late,) = run(lambda _: [HEAD, chunk(b"x"), 30.0], b"{}", timeout_s=0.2)
    assert late.outcome == "timeout" and late.end_ns - late.send_ns < 5_000_000_000


def test_connections_are_reused_and_each_request_says_so() -> None:
    pieces, exchanges = run(lambda s: plain(200, len(s.body)), b"{}", b"{}", b"{}")
    assert [e.reused for e in exchanges] == [False, True, True]
    assert exchanges[0].connect_ns is not None
    assert [e.connect_ns for e in exchanges[1:]] == [None, None]
    assert len({e.conn_id for e in exchanges}) == 1
    assert [pieces.body(i) for i in (1, 2, 3)] == [b"2", b"2", b"2"]


def test_a_warmed_pool_spares_every_request_its_connect() -> None:
    pieces = Pieces()
    with serve(lambda _: [HEAD, 0.05, LAST]) as server:
        exchanges = asyncio.run(send(server.url, pieces, [b"{}"] * 20, at_once=True, warm=20))
        assert server.connections == 20
    assert all(e.connect_ns is None and not e.reused and e.outcome == "ok" for e in exchanges)
    assert len({e.conn_id for e in exchanges}) == 20


def test_two_replies_on_one_connection_never_mix() -> None:
    pieces, exchanges = run(
        lambda s: [HEAD, *(chunk(s.body) for _ in range(50)), LAST], *(b"%d" % i for i in range(30))
    )
    assert [pieces.body(i + 1) for i in range(30)] == [b"%d" % i * 50 for i in range(30)]
    assert {e.outcome for e in exchanges} == {"ok"}


def test_a_large_request_is_sent_when_its_last_byte_has_left() -> None:
    big = b'"' + b"x" * 8_000_000 + b'"'
    started: list[int] = []

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"\r\nContent-Length: 8000002\r\n" in head
        await asyncio.sleep(0.2)  # the sockets' buffers are full meanwhile
        started.append(monotonic_ns())
        await reader.readexactly(len(big))
        writer.write(plain(200, 1)[0])  # type: ignore[arg-type]
        writer.close()

    async def main() -> Exchange:
        server = await asyncio.start_server(slow, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            return (await send(f"http://127.0.0.1:{port}/", Pieces(), [big]))[0]

    exchange = asyncio.run(main())
    assert exchange.outcome == "ok"
    assert exchange.send_ns < started[0] < exchange.send_end_ns < exchange.head_ns


def test_no_request_asks_for_compression_or_follows_a_redirect() -> None:
    asked: list[Seen] = []

    def script(seen: Seen) -> Sequence[Step]:
        asked.append(seen)
        return [b"HTTP/1.1 302 Found\r\nLocation: /other\r\nContent-Length: 0\r\n\r\n"]

    _, (exchange,) = run(script, b"{}")
    assert exchange.status == 302 and len(asked) == 1
    assert "accept-encoding" not in asked[0].headers
    assert asked[0].headers["x-test"] == "1"


def test_the_self_check_passes_here_and_names_the_version_where_aiohttp_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asyncio.run(self_check())
    monkeypatch.setattr(transport.Sink, "feed_data", lambda *_: False)
    with pytest.raises(TokentapeError, match=r"aiohttp 3\.14"):
        asyncio.run(self_check())
