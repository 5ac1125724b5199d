"""Capture and replay against `transformers serve`: a real server that nobody here wrote.

It sends no `[DONE]`, and its usage is on the last non-empty event. Installing it takes minutes, so
these are slow tests; they need the lab beside the checkout.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from proxied import capturing
from tokentape.traces.check import check
from tokentape.traces.reader import open_tape

LAB = Path(__file__).resolve().parents[2] / "shared" / "lab" / "transformers"
HOME = Path("/tmp/tokentape-transformers")  # kept between runs: its packages are 1 GB
PYTHON = "python3.11"  # the one for which a small build of torch is at hand
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    if not (LAB / "serve.sh").is_file():
        pytest.skip(f"no {LAB}/serve.sh beside this checkout")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = HOME.with_suffix(".log").open("w")
    process = subprocess.Popen(
        [str(LAB / "serve.sh"), str(HOME), str(port)],
        stdout=log,
        stderr=log,
        start_new_session=True,
        env=os.environ | {"PYTHON": PYTHON},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(800):
            assert process.poll() is None, "the server did not start; see its log"
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
        log.close()


async def ask_everything(base: str) -> list[tuple[str, bool, int, int, int]]:
    """(path, stream, prompt tokens, output tokens, events) as the openai client saw them."""
    async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="sk-none", timeout=300) as client:

        async def one(chat: bool, stream: bool, n: int) -> tuple[str, bool, int, int, int]:
            common: dict[str, Any] = {
                "model": str(HOME / "model"),
                "max_tokens": 10 + n,
                "stream": stream,
            }
            prompt = "word " * (5 + n)
            reply: Any
            if chat:
                messages: Any = [{"role": "user", "content": prompt}]
                reply = await client.chat.completions.create(messages=messages, **common)
            else:
                reply = await client.completions.create(prompt=prompt, **common)
            path = "/v1/chat/completions" if chat else "/v1/completions"
            events = 0
            usage: Any = None if stream else reply.usage
            if stream:
                async for chunk in reply:
                    usage = chunk.usage or usage
                    for choice in chunk.choices:
                        events += bool(choice.delta.content if chat else choice.text)
            return path, stream, usage.prompt_tokens, usage.completion_tokens, events

        kinds = [(chat, stream) for chat in (True, False) for stream in (True, False)]
        return await asyncio.gather(*(one(c, s, n) for n in range(5) for c, s in kinds))


def test_capture_misreads_not_a_request_and_replay_reaches_the_same_tokens(
    server: str, tmp_path: Path
) -> None:
    with capturing(server, tmp_path / "a.tape") as proxy:
        asked = asyncio.run(ask_everything(proxy.url))
        proxy.stop()
    rows = proxy.rows()
    seen = [
        (r["endpoint"], r["stream"], r["input_tokens"], r["output_tokens"], len(r["off_us"] or []))
        for r in rows
    ]
    assert sorted(seen) == sorted(asked)
    assert {r["outcome"] for r in rows} == {"ok"}
    assert {r["parse_status"] for r in rows} == {"ok"}
    assert check(open_tape(proxy.tape)) == []

    run = tmp_path / "run.tape"
    command = [sys.executable, "-m", "tokentape", "replay", str(proxy.tape), "--to", server]
    command += ["--tape", str(run), "--model", str(HOME / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    replayed = open_tape(run).read().to_pylist()
    assert len(replayed) == len(rows)
    assert {(r["outcome"], r["parse_status"]) for r in replayed} == {("ok", "ok")}
    by_id = {r["request_id"]: r for r in rows}
    for row in replayed:
        source = by_id[row["source_request_id"]]
        assert row["output_tokens"] == source["output_tokens"]
        assert row["input_tokens"] == source["input_tokens"]
        assert row["endpoint"] == source["endpoint"]
        assert row["stream"] == source["stream"]
        if row["stream"]:
            assert sum(row["ntok"]) == row["output_tokens"]
