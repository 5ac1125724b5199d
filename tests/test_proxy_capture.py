"""The proxy in front of a server scripted byte by byte: what passes, and what is recorded."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import fill
from proxied import Stage, capturing, chunk, post, receive, scripted, staged, talk
from tokentape.proxy import supervisor
from tokentape.proxy.options import checked_listen, checked_upstream
from tokentape.traces.check import check
from tokentape.traces.errors import UsageError
from tokentape.traces.reader import open_tape

BODY = json.dumps({"model": "m", "prompt": "a b", "stream": True, "max_tokens": 3}).encode()
SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def event(text: str) -> bytes:
    return b'data: {"id":"c-1","model":"m","choices":[{"index":0,"text":"%s"}]}\n\n' % text.encode()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One proxy for the tests of this file that need none of their own."""
    tape = tmp_path_factory.mktemp("stage") / "a.tape"
    with staged(tape) as stage:
        yield stage
    assert check(open_tape(tape)) == []


END = b"data: [DONE]\n\n"
REPLIES = {
    "stream": SSE_HEAD + chunk(event("a")) + chunk(event("b")) + chunk(END) + b"0\r\n\r\n",
    "whole": b"HTTP/1.1 200 OK\r\nX-Odd-CASE: two  spaces\r\nContent-Length: 2\r\n\r\n{}",
    "overloaded": b"HTTP/1.1 503 Busy\r\nretry-after: 1\r\nContent-Length: 4\r\n\r\nbusy",
    "until close": b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + event("a") + END,
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "not json": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n<html>hi<",
}


def test_heads_and_bodies_pass_byte_for_byte_both_ways(stage: Stage) -> None:
    heard: list[bytes] = []

    def script(connection: socket.socket, request: bytes) -> None:
        heard.append(request)
        name = request.split(b"?", 1)[1].split(b" ", 1)[0].decode().replace("+", " ")
        connection.sendall(REPLIES[name])
        connection.shutdown(socket.SHUT_WR)

    path = stage.play(script)
    host, port = stage.upstream
    for name, reply in REPLIES.items():
        query = "?" + name.replace(" ", "+")
        asked = post(path + query, BODY, "X-Mixed-CASE: a", "x-mixed-case: b", "Accept: */*")
        assert talk(host, port, asked) == reply, name
        assert talk(stage.host, stage.port, asked) == reply, name
        assert heard[-1] == heard[-2] == asked, name
    assert len(stage.rows(path, len(REPLIES))) == len(REPLIES)


def test_a_stream_is_relayed_event_by_event_and_every_event_is_recorded(stage: Stage) -> None:
    seen_by_client = [threading.Event() for _ in range(5)]

    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(SSE_HEAD)
        for n, seen in enumerate(seen_by_client):
            connection.sendall(chunk(event(f"t{n}")))
            assert seen.wait(10), "the proxy held an event back"
        connection.sendall(chunk(END) + b"0\r\n\r\n")

    path = stage.play(script)
    with socket.create_connection((stage.host, stage.port), timeout=10) as client:
        client.sendall(post(path, BODY))
        got = b""
        while piece := client.recv(65536):
            got += piece
            for n, seen in enumerate(seen_by_client):
                if f'"t{n}"'.encode() in got:
                    seen.set()
    (row,) = stage.rows(path)
    assert len(row["off_us"]) == 5
    assert row["outcome"] == "ok"
    assert row["event_clock"] == row["arrival_clock"] == "kernel"
    assert row["coalesced_reads"] == 0
    assert row["arrival_ns"] <= row["send_ns"] <= row["send_end_ns"] <= row["response_headers_ns"]


def test_events_of_one_read_share_a_stamp_and_are_counted(stage: Stage) -> None:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(
            SSE_HEAD + chunk(event("a")) + chunk(event("b")) + chunk(END) + b"0\r\n\r\n"
        )

    path = stage.play(script)
    talk(stage.host, stage.port, post(path, BODY))
    (row,) = stage.rows(path)
    assert row["coalesced_reads"] == 1
    assert row["off_us"][0] == row["off_us"][1]


def test_the_upstream_gets_the_prompt_while_it_is_still_being_uploaded(tmp_path: Path) -> None:
    got_some = threading.Event()

    def peeking(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            data = b""
            while b"first" not in data:
                data += connection.recv(65536)
            got_some.set()
            while b"second" not in data:
                data += connection.recv(65536)
            connection.sendall(REPLIES["whole"])

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=peeking, args=(server,))
        thread.start()
        with capturing(f"http://127.0.0.1:{server.getsockname()[1]}", tmp_path / "a.tape") as proxy:
            with socket.create_connection((proxy.host, proxy.port), timeout=10) as client:
                whole = post("/v1/completions", b"first" + b"second")
                client.sendall(whole[: -len(b"second")])
                assert got_some.wait(10), "the proxy waits for the whole body"
                client.sendall(b"second")
                assert receive(client, len(REPLIES["whole"])) == REPLIES["whole"]
            thread.join()
            proxy.stop()


def test_trailers_pass_to_the_client(stage: Stage) -> None:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(SSE_HEAD + chunk(event("a")) + b"0\r\nX-Checksum: 1\r\n\r\n")

    path = stage.play(script)
    ask = post(path, BODY, close=False)
    for _ in range(2):
        got = talk(stage.host, stage.port, ask, until=b"Checksum: 1\r\n\r\n")
        assert got == SSE_HEAD + chunk(event("a")) + b"0\r\nX-Checksum: 1\r\n\r\n"
    assert [r.get("deviations") for r in stage.rows(path, 2)] == [None, None]


def test_interim_responses_are_not_taken_for_the_final_one(stage: Stage) -> None:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 102 Pro")
        connection.sendall(b"cessing\r\n\r\n" + REPLIES["whole"])

    path = stage.play(script)
    ask = post(path, BODY, close=False)
    assert talk(stage.host, stage.port, ask, until=b"{}") == REPLIES["whole"]
    (row,) = stage.rows(path)
    assert row["http_status"] == 200
    assert row["deviations"] == ["interim", "interim"]


def test_a_client_that_leaves_is_told_apart_and_the_upstream_is_freed(stage: Stage) -> None:
    upstream_closed = threading.Event()

    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(SSE_HEAD + chunk(event("a")))
        while connection.recv(1024):
            pass
        upstream_closed.set()

    path = stage.play(script)
    talk(stage.host, stage.port, post(path, BODY), until=b'"a"')
    assert upstream_closed.wait(10)
    (row,) = stage.rows(path)
    assert (row["outcome"], len(row["off_us"])) == ("client_abort", 1)


def test_an_upstream_that_breaks_off_is_told_apart(stage: Stage) -> None:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(SSE_HEAD + chunk(event("a")))
        connection.shutdown(socket.SHUT_RDWR)

    path = stage.play(script)
    got = talk(stage.host, stage.port, post(path, BODY))
    assert got == SSE_HEAD + chunk(event("a"))
    (row,) = stage.rows(path)
    assert (row["outcome"], row["origin"]) == ("upstream_abort", "upstream")
    assert len(row["off_us"]) == 1


def test_an_upstream_that_closes_before_its_head_gives_502_from_the_proxy(stage: Stage) -> None:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.shutdown(socket.SHUT_RDWR)

    path = stage.play(script)
    got = talk(stage.host, stage.port, post(path, BODY))
    assert got.startswith(b"HTTP/1.1 502")
    (row,) = stage.rows(path)
    assert (row["outcome"], row["origin"], row["http_status"]) == ("upstream_abort", "proxy", 502)
    assert row["deviations"] == ["upstream_failure_page"]


def test_a_dead_upstream_gives_502_and_a_connect_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with capturing(f"http://127.0.0.1:{port}", tmp_path / "a.tape") as proxy:
        got = talk(proxy.host, proxy.port, post("/v1/completions", BODY))
        proxy.stop()
    assert got.startswith(b"HTTP/1.1 502")
    (row,) = proxy.rows()
    assert (row["outcome"], row["origin"], row["send_ns"]) == ("connect_error", "proxy", None)


def test_at_sigterm_what_is_in_flight_ends_and_new_connections_are_refused(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(SSE_HEAD + chunk(event("a")))
        begun.set()
        assert go_on.wait(20)
        connection.sendall(chunk(event("b")) + chunk(END) + b"0\r\n\r\n")

    with scripted(script) as upstream, capturing(upstream, tmp_path / "a.tape") as proxy:
        with socket.create_connection((proxy.host, proxy.port), timeout=20) as client:
            client.sendall(post("/v1/completions", BODY, close=False))
            assert begun.wait(10)
            proxy.process.send_signal(signal.SIGTERM)
            while True:  # until the listener is gone
                try:
                    socket.create_connection((proxy.host, proxy.port), timeout=1).close()
                except OSError:
                    break
                time.sleep(0.02)
            go_on.set()
            got = b""
            while not got.endswith(b"0\r\n\r\n"):
                piece = client.recv(65536)
                assert piece, "the stream was cut"
                got += piece
        proxy.process.wait(30)
    (row,) = proxy.rows()
    assert (row["outcome"], len(row["off_us"])) == ("ok", 2)


def test_at_sigterm_a_client_that_has_just_come_is_still_answered(tmp_path: Path) -> None:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(REPLIES["whole"])

    with scripted(script) as upstream, capturing(upstream, tmp_path / "a.tape") as proxy:
        with socket.create_connection((proxy.host, proxy.port), timeout=10) as client:
            proxy.process.terminate()
            with contextlib.suppress(OSError):  # until the drain has begun
                while True:
                    socket.create_connection((proxy.host, proxy.port), timeout=10).close()
            client.sendall(post("/v1/completions", BODY, close=False))
            assert receive(client, len(REPLIES["whole"])) == REPLIES["whole"]
            assert client.recv(1) == b""  # and is hung up on, without a reset
        proxy.process.wait(30)
    assert "ok" in [r["outcome"] for r in proxy.rows()]


def test_a_second_request_on_a_connection_reuses_the_upstream_one(stage: Stage) -> None:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(REPLIES["whole"])

    path = stage.play(script)
    with socket.create_connection((stage.host, stage.port), timeout=10) as client:
        for _ in range(3):
            client.sendall(post(path, BODY, close=False))
            assert receive(client, len(REPLIES["whole"])) == REPLIES["whole"]
    rows = stage.rows(path, 3)
    assert [r["upstream_reused"] for r in rows] == [False, True, True]
    assert rows[0]["connect_ns"] is not None
    assert rows[1].get("connect_ns") is None
    assert all(r["send_ns"] >= r["arrival_ns"] for r in rows)


def test_with_a_full_disk_traffic_goes_on_and_the_loss_is_counted(small_disk: Path) -> None:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(REPLIES["stream"])

    tape = small_disk / "a.tape"
    with scripted(script) as upstream, capturing(upstream, tape) as proxy:
        fill(small_disk)
        for _ in range(20):
            got = talk(
                proxy.host, proxy.port, post("/v1/completions", BODY, close=False), b"0\r\n\r\n"
            )
            assert got == REPLIES["stream"]
        said = proxy.stop()
    told = re.search(r"20 requests seen, 0 rows, 0 events; (\d+) lost \(disk_full\)(.*)", said)
    assert told is not None, said
    waiting = re.search(r"; (\d+) wait in the journal", told[2])
    assert int(told[1]) + int(waiting[1] if waiting else 0) == 20
    assert said.count("No space left on device; traffic goes on") == 1


def test_when_a_full_disk_has_room_again_what_waited_and_what_comes_is_kept(
    small_disk: Path,
) -> None:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(REPLIES["stream"])

    def ask(count: int) -> None:
        asked = post("/v1/completions", BODY, close=False)
        for _ in range(count):
            assert talk(proxy.host, proxy.port, asked, b"0\r\n\r\n") == REPLIES["stream"]

    tape = small_disk / "a.tape"
    with scripted(script) as upstream, capturing(upstream, tape) as proxy:
        filler = fill(small_disk)
        ask(10)
        filler.unlink()
        ask(10)
        said = proxy.stop()
    assert "20 requests seen, 20 rows" in said
    assert "nothing lost" in said
    assert len(proxy.rows()) == 20


def test_bodies_that_are_no_json_pass_and_are_recorded_with_their_bytes(stage: Stage) -> None:
    def script(connection: socket.socket, request: bytes) -> None:
        assert request.endswith(b"\x00\xff{not json")
        connection.sendall(REPLIES["not json"])

    path = stage.play(script)
    paths = [path, path.replace("completions", "other")]
    for p in paths:
        got = talk(stage.host, stage.port, post(p, b"\x00\xff{not json", close=False), b"hi<")
        assert got == REPLIES["not json"]
    rows = [stage.rows(p)[0] for p in paths]
    assert [r["wire_format"] for r in rows] == ["openai.completions", "unknown"]
    assert [(r["prompt_bytes"], r["response_bytes"]) for r in rows] == [(11, 9), (11, 9)]
    assert all(r["parse_status"] not in (None, "ok") for r in rows)


def test_what_was_altered_is_noted_on_its_own_row_among_parallel_ones(stage: Stage) -> None:
    interim_sent, other_done = threading.Event(), threading.Event()

    def with_interim(connection: socket.socket, _: bytes) -> None:
        connection.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        interim_sent.set()
        assert other_done.wait(10)
        connection.sendall(REPLIES["whole"])

    def plain(connection: socket.socket, _: bytes) -> None:
        connection.sendall(REPLIES["whole"])

    altered, untouched = stage.play(with_interim), stage.play(plain)
    with socket.create_connection((stage.host, stage.port), timeout=10) as client:
        client.sendall(post(altered, BODY, close=False))
        assert interim_sent.wait(10)
        talk(stage.host, stage.port, post(untouched, BODY, close=False), until=b"{}")
        other_done.set()
        assert receive(client, len(REPLIES["whole"])) == REPLIES["whole"]
    assert stage.rows(altered)[0]["deviations"] == ["interim"]
    assert stage.rows(untouched)[0].get("deviations") is None


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_leaves_while_it_uploads_is_no_failure_of_the_upstream(
    stage: Stage, chunked: bool
) -> None:
    def never(_: socket.socket, __: bytes) -> None:
        raise AssertionError("the request was never whole")

    path = stage.play(never)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n"
    head += "Transfer-Encoding: chunked\r\n\r\n" if chunked else "Content-Length: 100000\r\n\r\n"
    with socket.create_connection((stage.host, stage.port), timeout=10) as client:
        client.sendall(head.encode() + chunk(b"x" * 100))
    (row,) = stage.rows(path)
    assert (row["outcome"], row.get("http_status")) == ("client_abort", None)


def test_an_early_reply_waits_for_the_upload_and_leaves_no_stamp_behind(tmp_path: Path) -> None:
    refused = b"HTTP/1.1 413 Too Large\r\nContent-Length: 4\r\n\r\nlong"

    def serve(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            got = b""
            for awaited, answer in [
                (b"\r\n\r\n", refused),
                (b"end", b""),
                (b"a b", REPLIES["whole"]),
            ]:
                while awaited not in got:  # one read may end in the next request
                    piece = connection.recv(65536)
                    assert piece, awaited
                    got += piece
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        upstream = f"http://127.0.0.1:{server.getsockname()[1]}"
        with capturing(upstream, tmp_path / "a.tape") as proxy:
            with socket.create_connection((proxy.host, proxy.port), timeout=10) as client:
                upload = post("/v1/completions", b"x" * 99_997 + b"end", close=False)
                client.sendall(upload[:1000])
                assert receive(client, len(refused)) == refused
                client.sendall(upload[1000:])
                client.sendall(post("/v1/completions", BODY, close=False))
                assert receive(client, len(REPLIES["whole"])) == REPLIES["whole"]
            thread.join()
            proxy.stop()
    early, late = proxy.rows()
    assert (early["http_status"], early["early_reply"], early["prompt_bytes"]) == (
        413,
        True,
        100_000,
    )
    assert late["arrival_ns"] <= late["send_ns"]
    assert check(open_tape(proxy.tape)) == []


def test_a_request_that_the_proxy_refuses_is_its_own_answer(stage: Stage) -> None:
    asked = b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n"
    assert talk(stage.host, stage.port, asked).startswith(b"HTTP/1.1 400")
    (row,) = stage.rows("")  # its target is no path
    assert (row["origin"], row["error_type"], row["http_status"]) == ("proxy", "refused", 400)


def test_at_sigterm_a_slow_client_still_gets_the_tail_of_its_reply(tmp_path: Path) -> None:
    body = b"x" * 2_850_000
    sent = threading.Event()

    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        sent.set()

    with scripted(script) as upstream, capturing(upstream, tmp_path / "a.tape") as proxy:
        with socket.create_connection((proxy.host, proxy.port), timeout=20) as client:
            client.sendall(post("/v1/completions", BODY))
            got = client.recv(1000)
            sent.wait(3)  # it may not end before we read: the buffers between are finite
            proxy.process.send_signal(signal.SIGTERM)
            while piece := client.recv(65536):
                got += piece
        proxy.process.wait(30)
    assert len(got.partition(b"\r\n\r\n")[2]) == len(body)


def test_what_a_second_signal_cuts_off_is_recorded_as_cut(tmp_path: Path) -> None:
    begun, end = threading.Event(), threading.Event()

    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(SSE_HEAD + chunk(event("a")))
        begun.set()
        end.wait(30)

    with (
        scripted(script) as upstream,
        capturing(upstream, tmp_path / "a.tape") as proxy,
        socket.create_connection((proxy.host, proxy.port), timeout=20) as client,
    ):
        client.sendall(post("/v1/completions", BODY))
        assert begun.wait(10)
        while b'"a"' not in client.recv(65536):
            pass
        proxy.process.send_signal(signal.SIGINT)
        while True:  # until it drains
            try:
                socket.create_connection((proxy.host, proxy.port), timeout=1).close()
            except OSError:
                break
            time.sleep(0.02)
        proxy.stop(signal.SIGINT)
        end.set()
    (row,) = proxy.rows()
    assert (row["outcome"], row["origin"], len(row["off_us"])) == ("cut", None, 1)


def test_the_proxy_outlives_its_stderr_and_its_writer(tmp_path: Path) -> None:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(REPLIES["whole"])

    with scripted(script) as upstream, capturing(upstream, tmp_path / "a.tape") as proxy:
        assert proxy.process.stderr is not None
        proxy.process.stderr.close()
        children = Path(f"/proc/{proxy.process.pid}/task/{proxy.process.pid}/children")
        for pid in children.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        for _ in range(20):
            ask = post("/v1/completions", BODY, "X-Huge: " + "h" * 100_000, close=False)
            assert talk(proxy.host, proxy.port, ask, until=b"{}") == REPLIES["whole"]
        proxy.process.terminate()
        proxy.process.wait(30)


def test_accepted_sockets_send_small_writes_at_once() -> None:
    async def nodelay() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted_socket = writer.get_extra_info("socket")
            found.set_result(accepted_socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        (listening,) = supervisor.bind("127.0.0.1", 0, 1, 16)
        with listening:
            server = await asyncio.start_server(accepted, sock=listening)
            with socket.create_connection(listening.getsockname()):
                answer = await found
            server.close()
        return answer

    assert asyncio.run(nodelay()) == 1


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://engine/", "http://engine:80"),
        ("https://engine", "https://engine:443"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_an_upstream_is_scheme_host_and_port(url: str, expected: str) -> None:
    assert checked_upstream(url) == expected


@pytest.mark.parametrize(
    "url", ["engine:8000", "ftp://x", "http://", "http://x:99999", "http://x/v1", "http://u:p@x"]
)
def test_any_other_upstream_is_a_usage_error_that_names_the_option(url: str) -> None:
    with pytest.raises(UsageError, match="--upstream"):
        checked_upstream(url)


def test_a_listen_address_needs_host_and_port() -> None:
    assert checked_listen("[::1]:80") == ("::1", 80)
    for bad in ("8080", ":8080", "x:", "x:abc", "x:70000"):
        with pytest.raises(UsageError, match="--listen"):
            checked_listen(bad)


def test_a_chunked_upload_reaches_the_upstream_whole(stage: Stage) -> None:
    heard: list[bytes] = []

    def script(connection: socket.socket, request: bytes) -> None:
        body = request.partition(b"\r\n\r\n")[2]
        while not body.endswith(b"0\r\n\r\n"):
            body += connection.recv(65536)
        heard.append(body)
        connection.sendall(REPLIES["whole"])

    path = stage.play(script)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    for _ in range(2):  # a second one, after blank lines that stand for nothing
        upload = head + chunk(BODY[:10]) + chunk(BODY[10:]) + b"0\r\n\r\n"
        asked = upload + b"\r\n" + upload
        assert talk(stage.host, stage.port, asked, until=b"{}").endswith(b"{}")
    assert heard[0] == chunk(BODY[:10]) + chunk(BODY[10:]) + b"0\r\n\r\n"
    assert [r["prompt_bytes"] for r in stage.rows(path, 4)] == [len(BODY)] * 4
