"""Where stock mitmproxy would break traffic: what the remedies do, case by case.

Elsewhere: the five-stream limit, HTTP/2 clients that stop reading and TLS in test_proxy_tls.py;
trailers, a dead upstream, one that closes before its head, early replies and drain in
test_proxy_capture.py; recorders that fail, mitmproxy's time limit and its silent crashes in
test_proxy_fail_open.py; resets and bad chunks in test_proxy_exactness.py.
"""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxied import Stage, capturing, chunk, post, read_request, receive, staged, talk
from tokentape.traces.check import check
from tokentape.traces.reader import open_tape

BODY = json.dumps({"model": "m", "prompt": "a b", "stream": True, "max_tokens": 3}).encode()
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One proxy for the tests of this file that need none of their own."""
    tape = tmp_path_factory.mktemp("traps") / "a.tape"
    with staged(tape) as stage:
        yield stage
    assert check(open_tape(tape)) == []


def wait_until_read(connection: socket.socket) -> None:
    """Until the peer's kernel has acknowledged and its process was given a chance to read."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    deadline = time.monotonic() + 5
    while connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[24:28] != bytes(4):
        assert time.monotonic() < deadline


@pytest.mark.parametrize("cut", [1, 6, 8, 9, 12, 13, 24, 40, len(HINTS) - 1, len(HINTS)])
def test_early_hints_cut_anywhere_are_not_taken_for_the_reply(stage: Stage, cut: int) -> None:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(HINTS[:cut])
        wait_until_read(connection)
        connection.sendall(HINTS[cut:] + WHOLE)

    path = stage.play(script)
    with socket.create_connection((stage.host, stage.port), timeout=10) as client:
        for _ in range(2):  # the connection goes on to be used
            client.sendall(post(path, BODY, close=False))
            assert receive(client, len(WHOLE)) == WHOLE
    rows = stage.rows(path, 2)
    assert [(r["http_status"], r["deviations"]) for r in rows] == [(200, ["interim"])] * 2


def test_early_hints_and_a_102_in_one_read_with_the_reply_are_dropped(stage: Stage) -> None:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(HINTS + b"HTTP/1.1 102 Processing\r\n\r\n" + WHOLE)

    path = stage.play(script)
    assert talk(stage.host, stage.port, post(path, BODY, close=False), until=b"{}") == WHOLE
    assert stage.rows(path)[0]["deviations"] == ["interim", "interim"]


def test_trailers_of_a_request_do_not_stop_it(stage: Stage) -> None:
    def script(connection: socket.socket, got: bytes) -> None:
        while not got.endswith(b"0\r\n\r\n"):
            piece = connection.recv(65536)
            assert piece
            got += piece
        assert BODY in got
        connection.sendall(WHOLE)

    path = stage.play(script)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    asked = head + chunk(BODY) + b"0\r\nX-Checksum: 1\r\n\r\n"
    assert talk(stage.host, stage.port, asked, until=b"{}") == WHOLE
    (row,) = stage.rows(path)
    assert (row["outcome"], row["deviations"]) == ("ok", ["trailers"])


def test_an_upstream_that_comes_back_is_used_at_once_on_the_same_connection(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with capturing(f"http://127.0.0.1:{port}", tmp_path / "a.tape") as proxy:
        ask = post("/v1/completions", BODY, close=False)
        assert talk(proxy.host, proxy.port, ask).startswith(b"HTTP/1.1 502")
        with (
            socket.create_server(("127.0.0.1", port)) as server,
            socket.create_connection((proxy.host, proxy.port), timeout=10) as client,
        ):
            client.sendall(ask)
            upstream, _ = server.accept()
            with upstream:
                assert read_request(upstream) == ask
                upstream.sendall(WHOLE)
                assert receive(client, len(WHOLE)) == WHOLE
        proxy.stop()
    assert [r["outcome"] for r in proxy.rows()] == ["connect_error", "ok"]


def test_a_request_head_that_is_none_is_answered_and_counted(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        upstream = f"http://127.0.0.1:{server.getsockname()[1]}"
        with capturing(upstream, tmp_path / "a.tape") as proxy:
            asked = b"POST /v1/completions HTTP/1.1\r\nno colon\r\n\r\n"
            assert talk(proxy.host, proxy.port, asked).startswith(b"HTTP/1.1 400")
            said = proxy.stop()
    assert "1 requests seen" in said, said
    (row,) = proxy.rows()
    assert (row["outcome"], row["origin"], row["error_type"]) == ("http_error", "proxy", "refused")
    assert (row["http_status"], row["deviations"]) == (400, ["refused"])


def test_a_reply_head_that_is_none_gives_502_and_a_row(stage: Stage) -> None:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n")

    path = stage.play(script)
    got = talk(stage.host, stage.port, post(path, BODY, close=False))
    assert got.startswith(b"HTTP/1.1 502")
    (row,) = stage.rows(path)
    assert (row["origin"], row["http_status"]) == ("proxy", 502)
    assert row["deviations"] == ["upstream_failure_page"]


def test_a_websocket_passes_both_ways_and_is_one_row(stage: Stage) -> None:
    accepted = (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
    )
    hello = b"\x81\x02hi"  # a text frame
    masked = b"\x81\x82\x00\x00\x00\x00yo"
    goodbye, masked_goodbye = b"\x88\x02\x03\xe8", b"\x88\x82\x00\x00\x00\x00\x03\xe8"

    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(accepted + hello)
        got = receive(connection, len(masked))
        mask, text = got[2:6], got[6:]
        assert bytes(a ^ b for a, b in zip(text, mask, strict=False)) == b"yo"
        receive(connection, len(masked_goodbye))
        connection.sendall(goodbye)

    path = stage.play(script)
    asked = (
        f"GET {path} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    with socket.create_connection((stage.host, stage.port), timeout=10) as client:
        client.sendall(asked.encode())
        assert receive(client, len(accepted + hello)) == accepted + hello
        client.sendall(masked + masked_goodbye)
        assert receive(client, len(goodbye)) == goodbye
    (row,) = stage.rows(path)
    assert (row["http_status"], row["outcome"]) == (101, "ok")


def test_a_client_that_closes_its_side_has_left_as_for_the_server_itself(stage: Stage) -> None:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(STREAM + chunk(b"a"))
        assert connection.recv(1) == b""  # freed: what a client that is gone asked for is not made

    path = stage.play(script)
    with socket.create_connection((stage.host, stage.port), timeout=10) as client:
        client.sendall(post(path, BODY))
        assert receive(client, len(STREAM + chunk(b"a"))) == STREAM + chunk(b"a")
        client.shutdown(socket.SHUT_WR)
        assert client.recv(65536) == b""
    assert stage.rows(path)[0]["outcome"] == "client_abort"


def test_a_client_that_asks_before_it_sends_is_told_to_go_on_by_the_proxy(stage: Stage) -> None:
    heard: list[bytes] = []

    def script(connection: socket.socket, request: bytes) -> None:
        heard.append(request)
        connection.sendall(WHOLE)

    path = stage.play(script)
    go_on = b"HTTP/1.1 100 Continue\r\n\r\n"
    asked = post(path, BODY, "Expect: 100-continue", close=False)
    head = asked.removesuffix(BODY)
    with socket.create_connection((stage.host, stage.port), timeout=10) as client:
        client.sendall(head)
        assert receive(client, len(go_on)) == go_on
        client.sendall(BODY)
        assert receive(client, len(WHOLE)) == WHOLE
    (row,) = stage.rows(path)
    assert (row["outcome"], row["deviations"]) == ("ok", ["continue"])
    assert heard[0].endswith(b"\r\n\r\n" + BODY)


def test_an_upstream_that_refuses_a_large_upload_and_hangs_up_is_heard(tmp_path: Path) -> None:
    refused = b"HTTP/1.1 413 Too Large\r\nContent-Length: 4\r\nConnection: close\r\n\r\nlong"

    def serve(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(refused)  # and closes with most of the upload unread: a reset

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        upstream = f"http://127.0.0.1:{server.getsockname()[1]}"
        with capturing(upstream, tmp_path / "a.tape") as proxy:
            with socket.create_connection((proxy.host, proxy.port), timeout=10) as client:
                client.sendall(post("/v1/completions", b"x" * 20_000_000, close=False)[:200_000])
                thread.join()
                got = receive(client, len(refused))
            proxy.stop()
    (row,) = proxy.rows()
    told = (row["http_status"], row.get("origin"), row["outcome"])
    if got == refused:
        assert told == (413, "upstream", "http_error")
    else:  # the reset overtook the reply, which may happen to a client without a proxy as well
        assert got.startswith(b"HTTP/1.1 502")
        assert told == (502, "proxy", "upstream_abort")
        assert row["deviations"] == ["upstream_failure_page"]
