"""Open loop: every request at its own instant, lateness with its cause, stops that lose nothing."""

import asyncio
import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from time import monotonic_ns
from typing import Any

import pytest
from yarl import URL

from replay_server import HEAD, LAST, Script, Seen, Server, Step, chunk, plain, serve
from tokentape.replay import sender
from tokentape.replay.ahead import Outgoing
from tokentape.replay.exchange import Exchange
from tokentape.replay.progress import Progress
from tokentape.replay.sender import Sender, Sent
from tokentape.replay.sent_rows import late_cause
from tokentape.replay.start import AFTER_NS
from tokentape.replay.transport import open_client
from tokentape.traces.blocks import NO_STAMP

MS = 1_000_000


class Rows:
    """A recorder that keeps rows in memory."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.data: dict[int, bytes] = {}
        self.samples = 0
        self.closed = 0

    def open(self, t_ns: int, row: dict[str, Any]) -> int:
        self.rows.append(row | {"open_ns": t_ns})
        return len(self.rows)

    def reply_head(
        self,
        stream: int,
        t_ns: int,
        status: int,
        headers: list[tuple[bytes, bytes]],
        lag_us: int = NO_STAMP,
    ) -> None:
        self.rows[stream - 1] |= {"http_status": status, "response_headers_ns": t_ns}

    def reply_data(self, stream: int, t_ns: int, data: bytes, lag_us: int = NO_STAMP) -> None:
        self.data[stream] = self.data.get(stream, b"") + data

    def close(self, stream: int, t_ns: int, row: dict[str, Any]) -> None:
        self.closed += 1
        self.rows[stream - 1] |= row | {"end_ns": t_ns}

    def telemetry(
        self, t_ns: int, end_ns: int, source: str, samples: list[tuple[str, str, float]]
    ) -> None:
        self.samples += len(samples)

    def flush_every(self, loop: asyncio.AbstractEventLoop) -> None:
        pass


def send(
    script: Script,
    due_ns: Sequence[int],
    *,
    during: Callable[[Sender, Server], None] | None = None,
    broken_at: int | None = None,
    **options: Any,
) -> tuple[Sent, Rows, Server]:
    """Send one small request at each due time; `during` is called once the first are there."""
    rows = Rows()
    with serve(script) as server:
        url = URL(server.url + "/v1/completions")

        def prepare(number: int) -> Outgoing:
            if number == broken_at:
                raise ZeroDivisionError
            return Outgoing(url, {}, b'{"n":%d,"max_tokens":2}' % number, {"turn_index": number})

        async def main() -> Sent:
            async with open_client() as client:
                sending = Sender(client, rows, list(due_ns), prepare, **options)
                watching = asyncio.ensure_future(call_during(sending))
                try:
                    return await sending.run()
                finally:
                    watching.cancel()

        async def call_during(sending: Sender) -> None:
            first = sum(due < 300 * MS for due in due_ns)
            while during is not None and len(server.seen) < first:  # noqa: ASYNC110 - in a thread
                await asyncio.sleep(0.005)
            if during is not None:
                during(sending, server)

        sent = asyncio.run(main())
    return sent, rows, server


def answer(seen: Seen) -> Sequence[Step]:
    return plain(200, seen.json["n"])


@pytest.mark.parametrize("precise", [False, True])
def test_every_request_is_sent_at_its_own_instant_and_none_before(*, precise: bool) -> None:
    due = [n * 4 * MS for n in range(100)]
    sent, rows, server = send(answer, due, warm=4, precise=precise)
    assert (sent.sent, sent.not_sent, sent.stopped) == (100, 0, False)
    assert sent.outcomes == {"ok": 100}
    by_number = sorted(server.seen, key=lambda s: s.json["n"])
    for number, (seen, row) in enumerate(zip(by_number, rows.rows, strict=True)):
        assert row["turn_index"] == number
        assert row["scheduled_ns"] == row["arrival_ns"] == sent.t0_ns + due[number]
        assert row["arrival_ns"] <= row["send_ns"] <= min(row["send_end_ns"], seen.at_ns)
        assert row["response_headers_ns"] <= row["end_ns"]
    late = sorted(r["send_ns"] - r["arrival_ns"] for r in rows.rows)
    assert late[50] < 100 * MS, late  # as loose as a busy machine needs; the bench is exact


def test_lateness_never_adds_up() -> None:
    """A loop that stalls for 0.4 s makes a few requests late, and those after them are on time."""
    due = [n * 12 * MS for n in range(100)]
    sent, rows, _ = send(answer, due, warm=8, during=lambda *_: time.sleep(0.4))
    late = [r["send_ns"] - r["arrival_ns"] for r in rows.rows]
    assert sent.sent == 100
    assert max(late) > 300 * MS
    assert min(late[-20:]) < 200 * MS
    assert {r["late_cause"] for r in rows.rows if r["send_ns"] - r["arrival_ns"] > 300 * MS} == {
        "scheduler"
    }


def test_requests_due_together_are_all_sent_without_waiting_for_replies() -> None:
    def slow(_: Seen) -> Sequence[Step]:
        return [HEAD, 0.4, chunk(b"x"), LAST]

    sent, rows, server = send(slow, [0] * 60, warm=60)
    assert server.connections == 60
    latest = max(r["send_ns"] for r in rows.rows)
    assert latest < min(r["end_ns"] for r in rows.rows)
    assert sent.outcomes == {"ok": 60}
    assert all("connect_ns" not in r and r["upstream_reused"] is False for r in rows.rows)


def test_a_late_send_names_the_largest_part_of_its_lateness() -> None:
    def exchange(launch: int, connect: int | None, send: int, end: int) -> Exchange:
        made = Exchange(Rows())
        made.release_ns, made.connect_ns = launch, connect
        made.send_ns, made.send_end_ns = send, end
        made.end_ns = end
        return made

    assert late_cause(exchange(5, None, 6, 7), 0) == "scheduler"
    assert late_cause(exchange(1, None, 6, 7), 0) == "scheduler"  # our own work before the write
    assert late_cause(exchange(1, 5, 7, 8), 0) == "connection"
    assert late_cause(exchange(1, None, 2, 9), 0) == "write"
    refused = exchange(1, None, 0, 0)
    refused.end_ns = 9
    assert late_cause(refused, 0) == "connection"


def test_a_cold_pool_is_seen_in_the_rows() -> None:
    sent, rows, _ = send(lambda _: [HEAD, 0.2, LAST], [0, 0, 0], warm=1)
    assert sent.warmed == 1
    assert sum("connect_ns" in r for r in rows.rows) == 2


def serve_two(listening: socket.socket, kept: list[socket.socket], close: threading.Event) -> None:
    """Answers a request on each of two connections; closes the first one when told to."""
    listening.settimeout(10)
    for n in range(2):
        peer, _ = listening.accept()
        with peer:
            while b"max_tokens" not in peer.recv(65536):
                pass
            peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            if not n:
                kept.append(peer)
                close.wait(20)
                peer.shutdown(socket.SHUT_RDWR)


def test_a_request_is_not_sent_into_a_connection_that_the_peer_has_just_closed() -> None:
    """The second one is armed on a kept connection that is closed after the timer has rung."""
    kept: list[socket.socket] = []
    close = threading.Event()
    due = [0, 200 * MS]

    class ClosingRows(Rows):
        def close(self, stream: int, t_ns: int, row: dict[str, Any]) -> None:
            super().close(stream, t_ns, row)
            if stream == 1:
                asyncio.get_running_loop().call_later(0.19, self.close_behind_the_timer)

        def close_behind_the_timer(self) -> None:
            while monotonic_ns() < self.rows[0]["arrival_ns"] + due[1]:
                pass  # the loop is held until the timer has rung
            with kept[0].dup() as held:
                close.set()
                while held.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x01":
                    pass

    rows = ClosingRows()

    async def main(url: URL) -> Sent:
        async with open_client() as client:
            body = b'{"max_tokens":2}'
            return await Sender(
                client, rows, due, lambda n: Outgoing(url, {}, body, {"n": n})
            ).run()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = threading.Thread(target=serve_two, args=(listening, kept, close))
        serving.start()
        sent = asyncio.run(main(URL(f"http://127.0.0.1:{listening.getsockname()[1]}/")))
        serving.join()
    assert sent.outcomes == {"ok": 2}, rows.rows
    assert [row["conn_id"] for row in rows.rows] == [1, 2]
    assert rows.rows[1]["connect_ns"] > 0


def test_failures_are_rows_too() -> None:
    def fail(seen: Seen) -> Sequence[Step]:
        kinds: list[Sequence[Step]] = [plain(200, 1), plain(503, {}), [None], [HEAD, 9.0]]
        return kinds[int(seen.json["n"]) % 4]

    sent, rows, _ = send(fail, [n * 5 * MS for n in range(8)], warm=8, timeout_ns=1000 * MS)
    assert sent.outcomes == {"ok": 4, "upstream_abort": 2, "timeout": 2}
    assert [r.get("http_status") for r in rows.rows] == [200, 503, None, 200] * 2
    assert rows.closed == 8 and all(r["send_ns"] for r in rows.rows)


def test_a_stop_sends_nothing_more_lets_what_flies_end_and_cuts_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sender, "GRACE_S", 1.2)

    def script(seen: Seen) -> Sequence[Step]:
        wait = 0.7 if seen.json["n"] == 0 else 30.0
        return [HEAD, chunk(b"begun"), wait, chunk(b"ended"), LAST]

    due = [0, MS, 3_600_000 * MS]
    sent, rows, _ = send(script, due, warm=2, during=lambda sending, _: sending.stop())
    assert (sent.sent, sent.not_sent, sent.stopped) == (2, 1, True)
    assert sent.outcomes == {"ok": 1, "cut": 1}
    assert [r["outcome"] for r in rows.rows] == ["ok", "cut"]
    assert rows.data == {1: b"begunended", 2: b"begun"}


def test_a_second_stop_ends_at_once() -> None:
    def twice(sending: Sender, _: Server) -> None:
        sending.stop()
        sending.stop()

    began = monotonic_ns()
    sent, _, _ = send(lambda _: [HEAD, 30.0], [0, 0], warm=2, during=twice)
    assert sent.outcomes == {"cut": 2}
    assert monotonic_ns() - began < 1_900 * MS + AFTER_NS


def test_a_run_with_little_room_for_bodies_sends_them_all() -> None:
    sent, rows, _ = send(answer, [n * MS for n in range(200)], warm=4, ahead_bytes=100)
    assert sent.outcomes == {"ok": 200}
    assert [r["turn_index"] for r in rows.rows] == list(range(200))


def test_progress_and_telemetry_come_about_each_second() -> None:
    seen: list[Progress] = []
    sent, rows, _ = send(answer, [0, 1_300 * MS], progress=seen.append)
    assert sent.sent == 2
    assert [(p.total, p.sent, p.done, p.in_flight) for p in seen] == [(2, 1, 1, 0)]
    assert rows.samples == 5


def test_the_collector_is_off_during_a_run_and_on_after_it() -> None:
    states: list[bool] = []
    send(answer, [0, 600 * MS], during=lambda *_: states.append(gc.isenabled()))
    assert states == [False] and gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_defect_in_a_task_ends_the_run_instead_of_hiding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(sender, "late_cause", broken)
    monkeypatch.setattr(sender, "LATE_NS", 0)
    with pytest.raises(ZeroDivisionError):
        send(answer, [0, 3_600_000 * MS])


def test_a_defect_in_building_a_body_ends_the_run_instead_of_hanging_it() -> None:
    with pytest.raises(ZeroDivisionError):
        send(answer, [0, 5 * MS, 10 * MS, 15 * MS], broken_at=2, ahead_bytes=1)


def test_a_signal_handler_may_stop_a_run() -> None:
    def interrupt(sending: Sender, _: Server) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, sending.stop)
        os.kill(os.getpid(), signal.SIGTERM)

    sent, _, _ = send(answer, [0, 3_600_000 * MS], during=interrupt)
    assert sent.stopped and sent.not_sent == 1
