"""The engine over HTTP, used by real clients: openai, aiohttp, curl and bare sockets."""

import asyncio
import dataclasses
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import openai
import pytest

from tokentape.replay.engine.profile import Profile
from tokentape.replay.engine.server import RunningEngine, serve, start
from tokentape.traces.errors import UsageError

FAST = Profile(
    frontend_ms=0.0,
    step_ms=1.0,
    step_ms_per_sequence=0.0,
    step_ns_per_kv_token=0.0,
    prefill_tokens_per_s=1e9,
    natural_output_tokens_mean=0.0,
)
SLOW = dataclasses.replace(FAST, step_ms=20.0)
WORDS = [{"role": "user", "content": "one two three"}]

Use = Callable[[RunningEngine, aiohttp.ClientSession], Awaitable[Any]]


def with_engine(profile: Profile, use: Use) -> Any:
    """Run `use` against an engine of its own; what it returns."""

    async def run() -> Any:
        engine = await start("127.0.0.1:0", profile)
        try:
            async with aiohttp.ClientSession(engine.url) as session:
                return await use(engine, session)
        finally:
            await engine.close()

    return asyncio.run(run())


async def post(session: aiohttp.ClientSession, path: str, **body: Any) -> tuple[int, Any]:
    async with session.post(path, json=body) as reply:
        return reply.status, await reply.json()


async def stream(session: aiohttp.ClientSession, path: str, **body: Any) -> list[Any]:
    """The messages of a streamed reply, whose end mark must be there."""
    async with session.post(path, json={"stream": True, **body}) as reply:
        assert reply.status == 200, await reply.text()
        assert reply.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        *messages, done, end = (await reply.text()).split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(message.removeprefix("data: ")) for message in messages]


async def metric(session: aiohttp.ClientSession, name: str) -> float:
    async with session.get("/metrics") as reply:
        found = re.search(rf"^{re.escape(name)} (\S+)$", await reply.text(), re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def vllm(name: str, reason: str = "") -> str:
    reason = f',finished_reason="{reason}"' if reason else ""
    return f'vllm:{name}{{engine="0"{reason},model_name="simulated-8b"}}'


def test_openai_chat_reads_the_same_reply_streamed_and_whole() -> None:
    async def use(engine: RunningEngine, _session: aiohttp.ClientSession) -> None:
        async with openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="any") as client:
            whole = await client.chat.completions.create(
                model="echoed", messages=[{"role": "user", "content": "a b c"}], max_tokens=7
            )
            events = await client.chat.completions.create(
                model="echoed",
                messages=[{"role": "user", "content": "a b c"}],
                max_tokens=7,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in events]
        deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
        assert [delta.role for delta in deltas] == ["assistant"] + [None] * 7
        assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
        reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
        assert reasons == [None] * 7 + ["length"]
        assert whole.choices[0].finish_reason == "length"
        assert {chunk.model for chunk in chunks} | {whole.model} == {"echoed"}
        assert chunks[-1].choices == []
        for usage in (whole.usage, chunks[-1].usage):
            assert usage is not None
            assert (usage.prompt_tokens, usage.completion_tokens) == (5, 7)
            assert usage.total_tokens == 12

    with_engine(FAST, use)


def test_openai_completions_read_the_same_reply_streamed_and_whole() -> None:
    async def use(engine: RunningEngine, _session: aiohttp.ClientSession) -> None:
        async with openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="any") as client:
            whole = await client.completions.create(model="m", prompt=[3, 2, 1], max_tokens=5)
            events = await client.completions.create(
                model="m", prompt=[3, 2, 1], max_tokens=5, stream=True
            )
            texts = [chunk.choices[0].text async for chunk in events]
            assert [model.id async for model in client.models.list()] == ["simulated-8b"]
        assert len(texts) == 5
        assert "".join(texts) == whole.choices[0].text
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 5)

    with_engine(FAST, use)


def test_openai_raises_the_engines_own_errors() -> None:
    async def use(engine: RunningEngine, _session: aiohttp.ClientSession) -> None:
        async with openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="any") as client:
            with pytest.raises(openai.BadRequestError, match="maximum context length is 16384"):
                await client.completions.create(model="m", prompt="a b", max_tokens=16_383)
            with pytest.raises(openai.BadRequestError, match="n must be 1"):
                await client.completions.create(model="m", prompt="a b", n=2)
            with pytest.raises(openai.NotFoundError):
                await client.embeddings.create(model="m", input="a", encoding_format="float")

    with_engine(FAST, use)


def test_bad_bodies_and_unknown_paths_are_json_errors() -> None:
    async def use(_engine: RunningEngine, session: aiohttp.ClientSession) -> None:
        for body in (b"", b"{", b"[]", b"\xff"):
            async with session.post("/v1/completions", data=body) as reply:
                assert (reply.status, (await reply.json())["error"]["code"]) == (400, 400)
        async with session.get("/v1/chat/completions") as reply:
            assert (reply.status, (await reply.json())["error"]["code"]) == (405, 405)
        async with session.get("/nothing") as reply:
            assert (await reply.json())["error"]["type"] == "NotFoundError"
        async with session.get("/health") as reply:
            assert (reply.status, await reply.read()) == (200, b"")

    with_engine(FAST, use)


def test_the_role_is_held_back_to_the_first_token_and_each_event_is_one_http_chunk() -> None:
    async def use(_engine: RunningEngine, session: aiohttp.ClientSession) -> None:
        body = {"messages": WORDS, "max_tokens": 3, "stream": True}
        async with session.post("/v1/chat/completions", json=body) as reply:
            chunks, chunk = [], b""
            async for data, end in reply.content.iter_chunks():
                chunk += data
                if end and chunk:
                    chunks.append(chunk)
                    chunk = b""
        assert len(chunks) == 1 + 3 + 1
        assert all(c.startswith(b"data: ") and c.count(b"\n\n") == 1 for c in chunks)
        assert b'"role":"assistant"' in chunks[0]

    with_engine(FAST, use)


def test_tokenize_agrees_with_usage_for_text_and_messages() -> None:
    async def use(_engine: RunningEngine, session: aiohttp.ClientSession) -> None:
        for path, field in (
            ("/v1/completions", {"prompt": "one two  three\nfour"}),
            ("/v1/chat/completions", {"messages": WORDS}),
        ):
            _, counted = await post(session, "/tokenize", **field)
            _, reply = await post(session, path, max_tokens=1, **field)
            assert counted["count"] == len(counted["tokens"]) == reply["usage"]["prompt_tokens"]
            assert counted["max_model_len"] == 16_384
        _, from_ids = await post(
            session,
            "/v1/completions",
            prompt=counted["tokens"],
            max_tokens=1,
            return_token_ids=True,
        )
        assert from_ids["choices"][0]["prompt_token_ids"] == counted["tokens"]

    with_engine(FAST, use)


def test_a_shared_prefix_is_told_as_cached_tokens() -> None:
    async def use(_engine: RunningEngine, session: aiohttp.ClientSession) -> list[int]:
        told = []
        for prompt in ([*range(40)], [*range(40)], [*range(32), *range(90, 98)], [*range(64)]):
            messages = await stream(
                session,
                "/v1/completions",
                prompt=prompt,
                max_tokens=2,
                stream_options={"include_usage": True},
            )
            told.append(messages[-1]["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert await metric(session, vllm("prefix_cache_hits_total")) == sum(told)
        assert await metric(session, vllm("prompt_tokens_total")) == 40 + 40 + 40 + 64
        return told

    assert with_engine(FAST, use) == [0, 32, 32, 32]
    off = dataclasses.replace(FAST, prefix_cache=False)
    assert with_engine(off, use) == [0, 0, 0, 0]


def test_counters_equal_what_the_clients_saw() -> None:
    async def use(_engine: RunningEngine, session: aiohttp.ClientSession) -> None:
        asks: list[dict[str, Any]] = [
            {"prompt": [n] * (n + 1), "max_tokens": n % 7 + 1, "ignore_eos": n % 2 == 0}
            for n in range(40)
        ]
        options = {"include_usage": True}
        replies = await asyncio.gather(
            *(stream(session, "/v1/completions", stream_options=options, **ask) for ask in asks)
        )
        usages = [messages[-1]["usage"] for messages in replies]
        reasons = [messages[-2]["choices"][0]["finish_reason"] for messages in replies]
        assert {"length", "stop"} == set(reasons)
        for messages, usage, ask in zip(replies, usages, asks, strict=True):
            assert len(messages) - 1 == usage["completion_tokens"] <= ask["max_tokens"]
            assert usage["prompt_tokens"] == len(ask["prompt"])
        made = sum(usage["completion_tokens"] for usage in usages)
        prompts = sum(usage["prompt_tokens"] for usage in usages)
        assert await metric(session, vllm("generation_tokens_total")) == made
        assert await metric(session, vllm("prompt_tokens_total")) == prompts
        assert await metric(session, vllm("inter_token_latency_seconds_count")) == made - 40
        for reason in ("length", "stop"):
            name = vllm("request_success_total", reason)
            assert await metric(session, name) == reasons.count(reason)
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
            assert await metric(session, vllm(f"{name}_seconds_count")) == 40
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert await metric(session, vllm(name)) == 0

    with_engine(dataclasses.replace(FAST, natural_output_tokens_mean=4.0), use)


async def until(session: aiohttp.ClientSession, name: str, value: float) -> None:
    """Ask until a metric has a value; the test's time limit ends a wait in vain."""
    while await metric(session, name) != value:
        pass


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_ends_its_sequence_at_once(streamed: bool) -> None:
    async def use(engine: RunningEngine, session: aiohttp.ClientSession) -> None:
        body = {"prompt": "a b", "max_tokens": 10_000, "ignore_eos": True, "stream": streamed}
        async with aiohttp.ClientSession() as leaving:
            url = f"{engine.url}/v1/completions"
            asked = asyncio.ensure_future(leaving.post(url, json=body))
            await until(session, vllm("num_requests_running"), 1)
            if streamed:
                reply = await asked
                await reply.content.readany()
                reply.close()
            else:
                asked.cancel()
        await until(session, vllm("num_requests_running"), 0)
        assert await metric(session, vllm("request_success_total", "abort")) == 1
        assert await metric(session, vllm("kv_cache_usage_perc")) == 0

    with_engine(SLOW, use)


def test_a_reader_that_never_reads_is_closed_and_the_others_go_on() -> None:
    profile = dataclasses.replace(FAST, step_ms=0.2, stream_buffer_bytes=8_192)

    async def use(engine: RunningEngine, session: aiohttp.ClientSession) -> None:
        body = json.dumps({"prompt": "a", "max_tokens": 16_000, "ignore_eos": True, "stream": True})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: e\r\nContent-Length: {len(body)}\r\n\r\n"
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        host, port = engine.url.removeprefix("http://").split(":")
        deaf.connect((host, int(port)))
        deaf.sendall((head + body).encode())
        messages: list[Any] = []
        while not engine.counters.slow_readers:
            messages = await stream(session, "/v1/completions", prompt="b", max_tokens=50)
        assert len(messages) == 50
        await until(session, "tokentape_engine_slow_readers_total", 1)
        assert await metric(session, vllm("request_success_total", "abort")) == 1
        deaf.close()

    with_engine(profile, use)


def test_times_that_the_server_tells_show_the_queue_only_where_there_was_one() -> None:
    profile = dataclasses.replace(SLOW, max_sequences=1, step_jitter=0.0, per_request_metrics=True)

    async def use(_engine: RunningEngine, session: aiohttp.ClientSession) -> None:
        options = {"include_usage": True}
        replies = await asyncio.gather(
            *(
                stream(session, "/v1/completions", prompt="a", max_tokens=4, stream_options=options)
                for _ in range(2)
            )
        )
        first, second = sorted(
            (messages[-1]["metrics"] for messages in replies), key=lambda m: m["queue_time_ms"]
        )
        assert first["queue_time_ms"] == 0
        assert 0 < second["queue_time_ms"] <= 80
        for told in (first, second):
            assert told["time_to_first_token_ms"] == pytest.approx(20, abs=0.01)
            assert told["generation_time_ms"] == pytest.approx(60, abs=0.01)

    with_engine(profile, use)


def test_two_streams_follow_each_other_on_one_connection() -> None:
    async def use(engine: RunningEngine, _session: aiohttp.ClientSession) -> None:
        opened = 0

        async def count(*_: object) -> None:
            nonlocal opened
            opened += 1

        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(count)
        async with aiohttp.ClientSession(engine.url, trace_configs=[trace]) as session:
            for _ in range(3):
                assert len(await stream(session, "/v1/completions", prompt="a", max_tokens=3)) == 3
                await post(session, "/v1/completions", prompt="a", max_tokens=3)
        assert opened == 1

    with_engine(FAST, use)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("version", ["--http1.1", "--http1.0"])
def test_curl_reads_a_stream_to_its_end(version: str) -> None:
    async def use(engine: RunningEngine, _session: aiohttp.ClientSession) -> bytes:
        body = json.dumps({"messages": WORDS, "max_tokens": 4, "stream": True})
        url = f"{engine.url}/v1/chat/completions"
        command = ("curl", "-sSN", "--max-time", "20", version, "-d", body, url)
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        output, _ = await process.communicate()
        assert process.returncode == 0
        return output

    messages = with_engine(FAST, use).split(b"\n\n")
    assert len(messages) == 1 + 4 + 1 + 1
    assert messages[-2:] == [b"data: [DONE]", b""]


def test_closing_the_engine_cuts_open_streams_and_frees_the_port() -> None:
    async def run() -> None:
        engine = await start("127.0.0.1:0", SLOW)
        async with aiohttp.ClientSession() as session:
            body = {"prompt": "a", "max_tokens": 10_000, "ignore_eos": True, "stream": True}
            reply = await session.post(f"{engine.url}/v1/completions", json=body)
            await reply.content.readany()
            await asyncio.wait_for(engine.close(), 5)
            with pytest.raises(aiohttp.ClientPayloadError):
                await reply.read()
        again = await start(engine.url.removeprefix("http://"), SLOW)
        await again.close()

    asyncio.run(run())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_says_where_it_is_and_ends_cleanly_on_a_signal(number: signal.Signals) -> None:
    code = (
        "from tokentape.replay.engine.profile import Profile\n"
        "from tokentape.replay.engine.server import serve\n"
        "serve('127.0.0.1:0', Profile(), lambda url: print(url, flush=True))\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        url = process.stdout.readline().decode().strip()
        host, port = url.removeprefix("http://").split(":")
        body = b'{"prompt": "a", "max_tokens": 9999, "ignore_eos": true, "stream": true}'
        with socket.create_connection((host, int(port))) as client:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: e\r\nContent-Length: %d\r\n\r\n"
            client.sendall(head % len(body) + body)
            assert client.recv(64).startswith(b"HTTP/1.1 200")
            process.send_signal(number)
            _, errors = process.communicate(timeout=10)
        assert (process.returncode, errors) == (0, b"")


@pytest.mark.parametrize(
    "listen",
    ["8000", "localhost", ":80", "127.0.0.1:http", "127.0.0.1:99999", "203.0.113.1:80", ""],
)
def test_an_address_that_cannot_be_listened_on_is_one_line_that_names_it(listen: str) -> None:
    with pytest.raises(UsageError) as caught:
        serve(listen, FAST, pytest.fail)
    assert listen in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_port_in_use_is_one_line_that_names_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UsageError, match=f"cannot listen on {listen}: the port is in use"):
            serve(listen, FAST, pytest.fail)


def test_ipv6_addresses_are_written_in_brackets() -> None:
    async def run() -> None:
        engine = await start("[::1]:0", FAST)
        try:
            assert engine.url.startswith("http://[::1]:")
            async with (
                aiohttp.ClientSession(engine.url) as session,
                session.get("/health") as reply,
            ):
                assert reply.status == 200
        finally:
            await engine.close()

    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    asyncio.run(run())
