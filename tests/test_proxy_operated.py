"""A capture as docs/operations.md runs it: nginx, the unit, the manifest; no open proxy."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from proxied import capturing, children, chunk, finished_rows, post, scripted, talk, until
from tokentape.proxy.options import CaptureOptions

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "operations.md").read_text()
BODY = b'{"model":"m","prompt":"a","stream":true}'
REPLY = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = [chunk(b'data: {"choices":[{"index":0,"text":"%d"}]}\n\n' % n) for n in range(3)]
LAST = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def fenced(language: str) -> str:
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(block)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def nginx(folder: Path, capture: int, server: int) -> Iterator[int]:
    """nginx with the page's recipe in front of the two ports; its own port."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed; .ci/run installs it")
    port = free_port()
    recipe = fenced("nginx").replace("127.0.0.1:8080", f"127.0.0.1:{capture}")
    recipe = recipe.replace("127.0.0.1:8000", f"127.0.0.1:{server}")
    recipe = recipe.replace("127.0.0.1:80;", f"127.0.0.1:{port};")
    temporary = "".join(
        f"{what}_temp_path {folder}/{what};"
        for what in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/log;\n"
        f"events {{}} http {{ access_log off; {temporary}\n{recipe}\n}}"
    )
    with subprocess.Popen([program, "-c", str(config)], stderr=subprocess.PIPE) as process:
        try:
            until(lambda: listens(port) or process.poll() is not None, "nginx does not listen")
            assert process.poll() is None, process.stderr and process.stderr.read()
            yield port
        finally:
            process.terminate()


def listens(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


def payload(reply: bytes) -> bytes:
    return b"".join(re.findall(rb"data: [^\n]*\n\n", reply))


def test_nginx_goes_to_the_server_when_the_capture_is_down_and_streams_both_ways(
    tmp_path: Path,
) -> None:
    go = threading.Event()

    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(REPLY + EVENTS[0])
        assert go.wait(20)
        connection.sendall(b"".join(EVENTS[1:]) + LAST)

    with scripted(script) as url, capturing(url, tmp_path / "a.tape") as proxy:
        server = int(url.rpartition(":")[2])
        with nginx(tmp_path, proxy.port, server) as port:
            with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
                client.sendall(post("/v1/completions", BODY))
                got = b""
                while b"text" not in got:  # the first event, while the others do not exist yet
                    got += client.recv(65536)
                go.set()
                while piece := client.recv(65536):
                    got += piece
            whole = payload(got)
            assert whole == payload(b"".join(EVENTS) + LAST)
            until(lambda: len(finished_rows(proxy.tape)) == 1, "the request is on the tape")
            for pid in [proxy.process.pid, *children(proxy.process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            until(lambda: not listens(proxy.port), "the capture is gone")
            for _ in range(20):
                reply = talk("127.0.0.1", port, post("/v1/completions", BODY))
                assert b" 200 " in reply[:20] and payload(reply) == whole


def test_nginx_repeats_no_post_that_has_been_sent(tmp_path: Path) -> None:
    asked: list[str] = []

    def dies(connection: socket.socket, _: bytes) -> None:
        asked.append("capture")
        connection.close()

    def answers(connection: socket.socket, _: bytes) -> None:
        asked.append("server")
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with (
        scripted(dies) as first,
        scripted(answers) as second,
        nginx(tmp_path, *(int(u.rpartition(":")[2]) for u in (first, second))) as port,
    ):
        reply = talk("127.0.0.1", port, post("/v1/completions", BODY))
    assert (b" 502 " in reply[:20], asked) == (True, ["capture"])


def test_a_capture_is_no_open_forward_proxy(tmp_path: Path) -> None:
    asked: list[bytes] = []
    strangers: list[bytes] = []

    def answer(connection: socket.socket, request: bytes) -> None:
        asked.append(request)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nus")

    def stranger(connection: socket.socket, request: bytes) -> None:
        strangers.append(request)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nthem")

    with (
        scripted(answer) as url,
        scripted(stranger) as other,
        capturing(url, tmp_path / "a.tape") as proxy,
    ):
        named = other.removeprefix("http://")
        absolute = f"GET {other}/x HTTP/1.1\r\nHost: {named}\r\nConnection: close\r\n\r\n"
        tunnel = f"CONNECT {named} HTTP/1.1\r\nHost: {named}\r\n\r\n"
        replies = [
            talk(proxy.host, proxy.port, absolute.encode()),
            talk(proxy.host, proxy.port, tunnel.encode(), until=b"\r\n\r\n"),
        ]
    assert strangers == []
    assert b"them" not in b"".join(replies)
    assert replies[0].endswith(b"us") and len(asked) == 1  # the named host is not called
    assert replies[1].startswith(b"HTTP/1.1 400 ")


def test_a_capture_listens_on_loopback_unless_told() -> None:
    assert CaptureOptions("http://u", Path("t")).listen == "127.0.0.1:8080"


def test_a_capture_serves_and_seals_without_any_capability(tmp_path: Path) -> None:
    program = shutil.which("setpriv")
    if program is None or os.geteuid():
        pytest.skip("needs root and setpriv, to give capabilities away")
    without = [program, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]

    def answer(connection: socket.socket, _: bytes) -> None:
        connection.sendall(REPLY + EVENTS[0] + LAST)

    with scripted(answer) as url, capturing(url, tmp_path / "a.tape", through=without) as proxy:
        for pid in [proxy.process.pid, *children(proxy.process.pid)]:
            assert "CapEff:\t0000000000000000" in Path(f"/proc/{pid}/status").read_text()
        reply = talk(proxy.host, proxy.port, post("/v1/completions", BODY))
        assert payload(reply) == payload(EVENTS[0] + LAST)
        assert "1 rows" in proxy.stop()


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "tokentape.service"
    text = fenced("ini").replace("/opt/tokentape/bin/tokentape", "/bin/true")
    unit.write_text(text)
    done = subprocess.run(
        [program, "verify", str(unit)], capture_output=True, text=True, check=False
    )
    assert str(unit) not in done.stderr and "tokentape.service" not in done.stderr, done.stderr


def test_the_manifest_runs_the_capture_as_an_ordinary_user_with_options_that_exist() -> None:
    from tokentape.cli import record

    pod = yaml.safe_load(fenced("yaml"))
    (capture,) = [c for c in pod["spec"]["containers"] if c["name"] == "capture"]
    security = capture["securityContext"]
    assert security["runAsNonRoot"] and security["runAsUser"] == 10001
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert "USER 10001" in fenced("dockerfile")
    asked = {a[2:].partition("=")[0] for a in capture["args"] if a.startswith("--")}
    assert asked <= set(record.capture.__annotations__)
    mounted = {m["name"] for m in capture["volumeMounts"]}
    assert mounted == {v["name"] for v in pod["spec"]["volumes"]}
