"""Canaries: secrets in every place of real exchanges, and every byte that a capture leaves."""

import contextlib
import gzip
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from proxied import Proxied, capturing, chunk, post, scripted, talk, until, writers
from tokentape.traces.content import read_content
from tokentape.traces.errors import TapeError
from tokentape.traces.reader import open_tape

CHAT = "/v1/chat/completions"
ZIPPED_REQUEST = gzip.compress(b'{"model":"m","prompt":"Canary-zipped-request"}', mtime=1)
ZIPPED_REPLY = gzip.compress(b'{"choices":[{"text":"Canary-zipped-reply"}]}', mtime=1)
NEEDLES = (b"Canary", ZIPPED_REQUEST[12:32], ZIPPED_REPLY[12:32])  # a coding hides the word only
MULTIPART = (
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="Canary-file-name.wav"\r\n\r\n'
    b"Canary-multipart\r\n--b--\r\n"
)
REQUEST = {
    "model": "m",
    "stream": True,
    "user": "Canary-user",
    "Canary-body-key with spaces": 1,
    "metadata": {"session_id": "Canary-session"},
    "tools": [{"type": "function", "function": {"name": "Canary-tool", "parameters": {}}}],
    "messages": [
        {"role": "user", "content": "Canary-prompt " * 60},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "Canary-argument"}'}}],
        },
    ],
}
HEADERS = (
    *("Authorization: Bearer sk-Canary-key", "X-Api-Key: Canary-key", "Cookie: a=Canary-cookie"),
    *("X-Session-Id: Canary-session", "Traceparent: 00-Canary", "X-Other: Canary-header"),
)
ERROR = json.dumps({"error": {"message": "Canary-error", "type": "the Canary type", "code": "x"}})


def answer(connection: socket.socket, request: bytes) -> None:
    """Streams with trailers, an error that quotes the prompt, a compressed reply."""
    head = request.partition(b"\r\n\r\n")[0].lower()
    if b"transfer-encoding: chunked" in head:
        while b"\r\n0\r\n" not in request:
            request += connection.recv(65536)
    if b"content-encoding: gzip" in head:
        reply = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
        reply += b"Content-Length: %d\r\n\r\n%s" % (len(ZIPPED_REPLY), ZIPPED_REPLY)
    elif b"x-api-key" in head:
        deltas = (
            {"content": "Canary-reply"},
            {"tool_calls": [{"function": {"arguments": "Canary"}}]},
        )
        events = [json.dumps({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas]
        reply = (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Echo: Canary-reply-head\r\n"
        )
        reply += b"Set-Cookie: Canary\r\nTransfer-Encoding: chunked\r\nTrailer: X-T\r\n\r\n"
        reply += b"".join(chunk(f"data: {event}\n\n".encode()) for event in events)
        reply += chunk(b"data: [DONE]\n\n") + b"0\r\nX-T: Canary-trailer\r\n\r\n"
    else:
        reply = (
            b"HTTP/1.1 400 No\r\nContent-Type: application/json; x=Canary\r\nRetry-After: Canary"
        )
        reply += b"\r\nContent-Length: %d\r\n\r\n%s" % (len(ERROR), ERROR.encode())
    connection.sendall(reply)
    connection.shutdown(socket.SHUT_WR)


def send_secrets(proxy: Proxied) -> int:
    """How many requests were sent, each with secrets in other places."""
    chunked = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    chunked += b"Connection: close\r\n\r\n" + chunk(b'{"prompt":"Canary"}')
    chunked += b"0\r\nX-T: Canary-request-trailer\r\n\r\n"
    requests = [
        post(f"{CHAT}?key=Canary-query", json.dumps(REQUEST).encode(), *HEADERS),
        post("/sk-Canary-path/v1/completions", ZIPPED_REQUEST, "Content-Encoding: gzip"),
        post("/bot/user:pw-Canary@host/x", b"Canary-unknown"),
        post(
            "/v1/audio/transcriptions", MULTIPART, "Content-Type: multipart/form-data; boundary=b"
        ),
        post(CHAT, b'{"model": "m", "messages": Canary-broken'),
        post("http://u:Canary-userinfo@x/v1/completions", b'{"prompt":"Canary"}'),
        chunked,
    ]
    for request in requests:
        assert talk(proxy.host, proxy.port, request).startswith(b"HTTP/1.1 "), request
    return len(requests)


def leaks(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(file, needle) of what is readable in any file, Parquet's compressed pages opened."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if data.startswith(b"PAR1"):
            with contextlib.suppress(OSError):
                table = pq.read_table(path).to_pydict()
                data += str(table).encode()
                data += b"".join(v for c in table.values() for v in c if isinstance(v, bytes))
                data += str(pq.read_metadata(path).metadata).encode()
        yield from ((str(path.relative_to(folder)), needle) for needle in NEEDLES if needle in data)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def new_key(folder: Path) -> Path:
    path = folder / "bodies.key"
    path.touch(0o600)
    path.write_text(secrets.token_hex(32))
    return path


@pytest.mark.parametrize("mode", ["none", "structure", "full"])
def test_no_secret_is_readable_in_anything_that_a_capture_writes(tmp_path: Path, mode: str) -> None:
    tape = tmp_path / "t.tape"
    key = new_key(tmp_path)
    metrics = f"127.0.0.1:{free_port()}"
    options = ["--content", mode, "--metrics", metrics, "--fsync"]
    options += ["--content-key-file", str(key)] if mode == "full" else []
    options += ["--no-event-sizes"] if mode == "none" else []
    with scripted(answer) as upstream, capturing(upstream, tape, *options) as proxy:
        count = send_secrets(proxy)
        until(lambda: open_tape(tape).unsealed_rows == count, "every row is in the journal")
        assert list(leaks(tmp_path)) == []  # the journal
        with urllib.request.urlopen(f"http://{metrics}/metrics") as page:
            said = page.read().decode()
        os.kill(writers(proxy)[0], signal.SIGKILL)  # its successor goes on with the journal
        send_secrets(proxy)
        said += proxy.stop()
    assert "nothing lost" in said
    assert "Canary" not in said
    assert list(leaks(tmp_path)) == []
    rows = proxy.rows()
    assert len(rows) == 2 * count
    streams = [row for row in rows if row["off_us"]]
    assert streams
    assert all((row["ntok"] is None) == (mode == "none") for row in streams)
    if mode == "full":
        bodies = [row for table in read_content(tape, key_of(key)) for row in table.to_pylist()]
        sent = [row["request_body"] for row in bodies if row["request_whole"]]
        assert {ZIPPED_REQUEST, MULTIPART, json.dumps(REQUEST).encode()} <= set(sent)
        assert all(row["request_whole"] and row["response_whole"] for row in bodies[-count:])
        with pytest.raises(TapeError, match="--content-key-file"):
            list(read_content(tape))
        with pytest.raises(TapeError, match="another content key"):
            list(read_content(tape, bytes(32)))


def key_of(path: Path) -> bytes:
    return bytes.fromhex(path.read_text())


def test_without_a_content_key_the_same_search_finds_the_bodies_and_nothing_else(
    tmp_path: Path,
) -> None:
    tape = tmp_path / "t.tape"
    with scripted(answer) as upstream, capturing(upstream, tape, "--content", "full") as proxy:
        assert "bodies are written readable" in proxy.heard
        count = send_secrets(proxy)
        proxy.stop()
    found = set(leaks(tmp_path))
    assert {needle for _, needle in found} == set(NEEDLES)
    assert {file.split("/")[1] for file, _ in found} == {"content"}
    text = str([table.to_pylist() for table in read_content(tape)])
    for secret in ("key", "cookie", "header", "query", "path", "trailer", "userinfo", "reply-head"):
        assert f"Canary-{secret}" not in text
    ids = {row["request_id"] for row in proxy.rows()}
    bodies = [row for table in read_content(tape) for row in table.to_pylist()]
    assert len(bodies) == count
    assert {row["request_id"] for row in bodies} == ids


def test_a_crash_tells_where_and_never_what(tmp_path: Path) -> None:
    code = "from tokentape.traces.crash import hide_values; hide_values()\n"
    code += "b'\\xff Canary'.decode()"
    crashed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert crashed.returncode == 1
    assert "UnicodeDecodeError" in crashed.stderr
    assert "Canary" not in crashed.stderr
