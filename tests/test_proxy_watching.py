"""Seeing a capture run: the pages for machines and the line for people."""

import contextlib
import json
import os
import pty
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxied import capturing, chunk, post, scripted, talk
from tokentape.proxy.watching import summed
from tokentape.traces.served import MAX_MODELS, Served

BODY = json.dumps({"model": "m", "prompt": "a b", "stream": True}).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(n: int) -> bytes:
    return b'data: {"id":"c","model":"m","choices":[{"index":0,"text":"t%d"}]}\n\n' % n


USAGE = b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'


def answer(connection: socket.socket, _: bytes) -> None:
    connection.sendall(HEAD)
    for n in range(3):
        connection.sendall(chunk(event(n)))
    connection.sendall(chunk(USAGE + b"data: [DONE]\n\n") + b"0\r\n\r\n")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as page:
        return str(page.read().decode())


def scrape(port: int) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(get(port, "/metrics")):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_prometheus_sees_requests_tokens_and_times_as_the_tape_has_them(tmp_path: Path) -> None:
    port = free_port()
    with (
        scripted(answer) as upstream,
        capturing(
            upstream, tmp_path / "a.tape", "--metrics", f"127.0.0.1:{port}", "--workers", "2"
        ) as proxy,
    ):
        for _ in range(6):
            talk(proxy.host, proxy.port, post("/v1/completions", BODY))
        deadline = time.monotonic() + 20
        found = scrape(port)
        while sum(v for _, v in found.get("tokentape_requests_total", [])) < 6:
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
            found = scrape(port)
        health = json.loads(get(port, "/healthz"))
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(port, "/")
        proxy.stop()
    assert health == {"status": "ok", "recording": True, "workers": 2}
    assert {labels["outcome"] for labels, _ in found["tokentape_requests_total"]} == {"ok"}
    usage = {"input": 0.0, "output": 0.0}
    for labels, value in found["gen_ai_client_token_usage_total"]:
        usage[labels["gen_ai_token_type"]] += value
    assert usage == {"input": 42, "output": 18}
    for name in ("request_duration", "time_to_first_token", "time_per_output_token"):
        counts = found[f"gen_ai_server_{name}_seconds_count"]
        assert sum(v for _, v in counts) == 6, name
        assert {labels["gen_ai_response_model"] for labels, _ in counts} == {"m"}
    first = [r["first_content_ns"] - r["arrival_ns"] for r in proxy.rows()]
    gaps = "gen_ai_client_operation_time_per_output_chunk_seconds"
    rows = [r["off_us"] for r in proxy.rows()]
    assert sum(v for _, v in found[f"{gaps}_count"]) == sum(len(r) - 1 for r in rows)
    ends = [v for labels, v in found[f"{gaps}_bucket"] if labels["le"] == "+Inf"]
    assert sum(ends) == 12
    assert sum(v for _, v in found[f"{gaps}_sum"]) == pytest.approx(
        sum(r[-1] - r[0] for r in rows) / 1e6
    )
    told = sum(v for _, v in found["gen_ai_server_time_to_first_token_seconds_sum"])
    assert told == pytest.approx(sum(first) / 1e9, rel=1e-6)


def test_a_page_that_cannot_be_served_is_said_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        at = f"127.0.0.1:{taken.getsockname()[1]}"
        never = capturing("http://127.0.0.1:9", tmp_path / "a.tape", "--metrics", at)
        with pytest.raises(AssertionError, match=r"--metrics .*in use; choose another port"):
            never.__enter__()


def test_a_terminal_shows_one_line_that_changes(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tokentape", "capture", "--upstream", "http://127.0.0.1:9"]
    command += ["--tape", str(tmp_path / "a.tape"), "--listen", "127.0.0.1:0"]
    environment = os.environ | {"COLUMNS": "200", "TERM": "xterm"}
    with subprocess.Popen(
        command, stderr=theirs, stdout=subprocess.DEVNULL, env=environment
    ) as run:
        os.close(theirs)
        seen = b""
        deadline = time.monotonic() + 30
        while len(re.findall(rb"0 requests, 0 open, 0 reads/s, added", seen)) < 2:
            assert time.monotonic() < deadline, seen
            seen += os.read(ours, 4096)
        run.terminate()
        with contextlib.suppress(OSError):  # which is how a terminal ends
            while True:
                seen += os.read(ours, 4096)
        assert run.wait(30) == 0
    os.close(ours)


def row(**columns: Any) -> dict[str, Any]:
    return {"outcome": "ok", "arrival_ns": 0, "end_ns": 2_000_000_000} | columns


def test_labels_do_not_grow_with_the_models_that_clients_name() -> None:
    served = Served()
    for n in range(50):
        served.add(row(model=f"m{n}"))
    names = [
        n for n in served.samples() if n.startswith("gen_ai_server_request_duration_seconds_c")
    ]
    assert len(names) == MAX_MODELS + 1
    assert sum(served.samples()[n] for n in names) == 50


def test_failures_are_counted_and_not_timed() -> None:
    served = Served()
    served.add(row(outcome="upstream_abort"))
    assert served.samples() == {'tokentape_requests_total{"outcome": "upstream_abort"}': 1.0}
    assert summed([served.samples(), served.samples()])[next(iter(served.samples()))] == 2.0
