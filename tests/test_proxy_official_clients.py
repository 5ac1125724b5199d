"""Clients that know nothing of the proxy read through it what they read without it."""

import asyncio
import json
import urllib.request
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import aiohttp
import anthropic
import openai
import pytest

from proxied import Stage, chunk, staged
from tokentape.traces.check import check
from tokentape.traces.reader import open_tape

# The messages of one streamed reply, in the order and shape of Anthropic's published examples.
ANTHROPIC: list[dict[str, Any]] = [
    {
        "type": "message_start",
        "message": {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "m",
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 25, "output_tokens": 1},
        },
    },
    {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    },
    {"type": "ping"},
    {
        "type": "content_block_delta",
        "index": 0,
        "delta": {"type": "text_delta", "text": "Grüße"},
    },
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "!"}},
    {"type": "content_block_stop", "index": 0},
    {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn", "stop_sequence": None},
        "usage": {"output_tokens": 15},
    },
    {"type": "message_stop"},
]
OPENAI = [
    {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
    }
    for text in ("Grü", "ße", "!")
]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def sse(messages: list[dict[str, Any]]) -> list[bytes]:
    return [
        (f"event: {m['type']}\n" if "type" in m else "").encode()
        + b"data: "
        + json.dumps(m, ensure_ascii=False).encode()
        + b"\n\n"
        for m in messages
    ]


def streams(events: list[bytes]) -> Callable[[Any, bytes], None]:
    """Sends the events one by one, each chunk in a write of its own."""

    def script(connection: Any, _: bytes) -> None:
        connection.sendall(HEAD)
        for event in events:
            connection.sendall(chunk(event))
        connection.sendall(b"0\r\n\r\n")

    return script


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    tape = tmp_path_factory.mktemp("clients") / "a.tape"
    with staged(tape) as stage:
        yield stage
    assert [f for f in check(open_tape(tape)) if f.severity == "error"] == []


def both(stage: Stage, path: str, ask: Callable[[str], Any]) -> Any:
    """What a client gets through the proxy; it is the same without it."""
    prefix = "/" + path.split("/")[1]
    through = ask(f"http://{stage.host}:{stage.port}{prefix}")
    host, port = stage.upstream
    assert through == ask(f"http://{host}:{port}{prefix}")
    return through


def test_the_anthropic_client_reads_a_stream_unchanged(stage: Stage) -> None:
    events = sse(ANTHROPIC)
    path = stage.play(streams(events)).replace("completions", "messages")

    def ask(base: str) -> list[Any]:
        with (
            anthropic.Anthropic(base_url=base, api_key="sk-x", max_retries=0) as client,
            client.messages.stream(
                model="m", max_tokens=20, messages=[{"role": "user", "content": "hi"}]
            ) as stream,
        ):
            seen = [event.type for event in stream]
            return [*seen, stream.get_final_message().to_json()]

    got = both(stage, path, ask)
    assert json.loads(got[-1])["content"][0]["text"] == "Grüße!"
    (row,) = stage.rows(path)
    assert (row["outcome"], row["response_bytes"]) == ("ok", sum(map(len, events)))


def test_the_openai_client_reads_a_stream_unchanged_with_and_without_async(stage: Stage) -> None:
    events = [*sse(OPENAI), b"data: [DONE]\n\n"]
    path = stage.play(streams(events)).replace("v1/completions", "chat/completions")
    messages: list[Any] = [{"role": "user", "content": "hi"}]

    def ask(base: str) -> list[str]:
        with openai.OpenAI(base_url=base, api_key="sk-x", max_retries=0) as client:
            chunks = client.chat.completions.create(model="m", messages=messages, stream=True)
            return [c.to_json() for c in chunks]

    def ask_async(base: str) -> list[str]:
        async def run() -> list[str]:
            async with openai.AsyncOpenAI(base_url=base, api_key="sk-x", max_retries=0) as client:
                chunks = await client.chat.completions.create(
                    model="m", messages=messages, stream=True
                )
                return [c.to_json() async for c in chunks]

        return asyncio.run(run())

    assert both(stage, path, ask) == both(stage, path, ask_async)
    rows = stage.rows(path, 2)
    assert [(r["outcome"], len(r["off_us"])) for r in rows] == [("ok", 3)] * 2


def test_a_conversation_of_a_client_that_names_no_session_is_one_session(stage: Stage) -> None:
    path = stage.play(streams([*sse(OPENAI), b"data: [DONE]\n\n"]))
    path = path.replace("v1/completions", "chat/completions")
    base = f"http://{stage.host}:{stage.port}/{path.split('/')[1]}"
    with openai.OpenAI(base_url=base, api_key="sk-x", max_retries=0) as client:
        messages: list[Any] = [{"role": "system", "content": "be brief"}]
        for question in ("a", "b", "c"):
            messages.append({"role": "user", "content": question})
            got = client.chat.completions.create(model="m", messages=messages, stream=True)
            answer = "".join(c.choices[0].delta.content or "" for c in got)
            messages.append({"role": "assistant", "content": answer})
    rows = stage.rows(path, 3)
    assert len({row["session_id"] for row in rows}) == 1
    assert [row["turn_index"] for row in rows] == [0, 1, 2]
    for before, after in pairwise(rows):
        assert after["parents"] == [before["request_id"]]
        assert after["think_ns"] == after["arrival_ns"] - before["end_ns"] > 0


def test_plain_python_clients_read_the_same_bytes(stage: Stage) -> None:
    events = [*sse(OPENAI), b"data: [DONE]\n\n"]
    path = stage.play(streams(events))
    body = json.dumps({"model": "m", "prompt": "a b", "stream": True}).encode()

    def by_urllib(base: str) -> bytes:
        with urllib.request.urlopen(f"{base}/v1/completions", body, timeout=20) as reply:
            return bytes(reply.read())

    def by_aiohttp(base: str) -> bytes:
        async def run() -> bytes:
            async with (
                aiohttp.ClientSession() as session,
                session.post(f"{base}/v1/completions", data=body) as reply,
            ):
                return await reply.read()

        return asyncio.run(run())

    for ask in (by_urllib, by_aiohttp):
        assert both(stage, path, ask) == b"".join(events)
    assert [r["outcome"] for r in stage.rows(path, 2)] == ["ok"] * 2
