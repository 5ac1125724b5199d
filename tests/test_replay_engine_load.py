"""A thousand open streams: the engine in its own process, read by one plain epoll client."""

import json
import os
import re
import selectors
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

STREAMS = 1_000
TOKENS = 100
# 50 ms a step: 20 tokens a second for each stream, all streams in every step.
SERVE = """
from tokentape.replay.engine.profile import Profile
from tokentape.replay.engine.server import serve
profile = Profile(step_ms=50.0, step_ms_per_sequence=0.0, step_ns_per_kv_token=0.0, step_jitter=0.0)
serve("127.0.0.1:0", profile, lambda url: print(url, flush=True))
"""


@contextmanager
def engine_process() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-c", SERVE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process
        finally:
            process.terminate()
            assert process.wait(timeout=10) == 0


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def request_bytes(number: int) -> bytes:
    body = json.dumps(
        {
            "prompt": list(range(number, number + 64)),
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: e\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def read_all(address: tuple[str, int]) -> list[bytes]:
    """Open all streams at once and read each to the end of its chunked body."""
    selector = selectors.DefaultSelector()
    received = [bytearray() for _ in range(STREAMS)]
    for number in range(STREAMS):
        connection = socket.create_connection(address)
        connection.sendall(request_bytes(number))
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, number)
    while selector.get_map():
        for key, _ in selector.select(timeout=30):
            reader, number = key.fileobj, key.data
            assert isinstance(reader, socket.socket)
            data = reader.recv(65_536)
            received[number] += data
            if not data or received[number].endswith(b"\r\n0\r\n\r\n"):
                selector.unregister(reader)
                reader.close()
    return [bytes(data) for data in received]


def sample(page: str, name: str) -> float:
    found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def quantile_bound(page: str, name: str, q: float) -> float:
    """Upper bucket bound that holds the quantile."""
    buckets = re.findall(rf'^{name}_bucket{{.*le="([^"]+)"}} (\S+)$', page, re.MULTILINE)
    total = float(buckets[-1][1])
    return next(float(bound) for bound, count in buckets if float(count) >= q * total)


@pytest.mark.slow
def test_a_thousand_streams_get_every_token_in_time() -> None:
    with engine_process() as (url, process):
        host, port = url.removeprefix("http://").split(":")
        began, cpu_before = time.monotonic(), cpu_seconds(process.pid)
        bodies = read_all((host, int(port)))
        wall_s = time.monotonic() - began
        cpu_s = cpu_seconds(process.pid) - cpu_before
        with urllib.request.urlopen(f"{url}/metrics") as reply:
            page = reply.read().decode()
    late = "tokentape_engine_step_lateness_seconds"
    written = "tokentape_engine_step_written_seconds"
    lateness = {q: quantile_bound(page, late, q) for q in (0.5, 0.99)}
    figures = {
        "tokens_per_s": round(STREAMS * TOKENS / wall_s),
        "cpu_share": round(cpu_s / wall_s, 2),
        "cpu_us_per_token": round(cpu_s / STREAMS / TOKENS * 1e6, 1),
        "lateness_s_at_most": lateness,
        "written_s_at_most": {q: quantile_bound(page, written, q) for q in (0.5, 0.99)},
    }
    sys.stderr.write(f"{figures}\n")
    assert all(body.count(b'"text":') == TOKENS for body in bodies)
    assert all(body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") for body in bodies)
    assert sample(page, "vllm:generation_tokens_total") == STREAMS * TOKENS
    assert sample(page, "tokentape_engine_steps_slipped_total") == 0
    assert lateness[0.5] < 0.05, "a step is noticed before the next one ends"
