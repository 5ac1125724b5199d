"""Replies and requests of Amazon Bedrock, its frames, and what its own client makes of them."""

import json
import random
from importlib import import_module
from typing import Any

import pytest

from tokentape.traces import wire
from tokentape.traces.schema import ERROR, TEXT
from tokentape.traces.wire.aws_frames import FrameReader
from wire_streams import (
    CONVERSE,
    EVENT_STREAM,
    INVOKE,
    INVOKE_LLAMA,
    JSON,
    converse,
    framed,
    invoked,
    served,
)
from wire_streams import read as read_any

CANARY = "CANARYdonotkeepthis"


def read(parts: list[bytes], wire_format: str = "bedrock.converse", **more: Any) -> Any:
    return read_any(wire_format, parts, **{"kind": EVENT_STREAM, **more})


def test_input_tokens_of_converse_hold_the_cached_ones() -> None:
    columns = read(CONVERSE.parts).columns
    assert (columns["input_tokens"], columns["cached_tokens"]) == (130, 100)
    assert (columns["cache_write_tokens"], columns["output_tokens"]) == (20, 30)
    assert columns["finish_reason"] == ["tool_use"]
    assert json.loads(columns["usage_raw"])["totalTokens"] == 160


def test_a_vendors_own_messages_are_read_out_of_their_chunks() -> None:
    columns = read(INVOKE.parts, "bedrock.invoke").columns
    assert (columns["model"], columns["response_id"]) == ("claude-x", "msg_1")
    assert (columns["input_tokens"], columns["output_tokens"]) == (130, 30)
    llama = read(INVOKE_LLAMA.parts, "bedrock.invoke")
    assert (llama.columns["input_tokens"], list(llama.ntok)) == (9, [2, 3, 1])
    titan = [invoked({"outputText": CANARY, "index": 0})]
    assert read(titan, "bedrock.invoke").columns["parse_status"] == "unknown_format"
    nova = [
        invoked({"messageStart": {"role": "assistant"}}),
        invoked({"contentBlockDelta": {"delta": {"text": "a"}, "contentBlockIndex": 0}}),
        invoked({"messageStop": {"stopReason": "end_turn"}}),
        invoked({"metadata": {"usage": {"inputTokens": 3, "outputTokens": 1}}}),
    ]
    told = read(nova, "bedrock.invoke")
    assert (told.columns["input_tokens"], told.columns["output_tokens"], told.done) == (3, 1, True)


def test_an_exception_frame_is_an_error() -> None:
    said = {"message_type": "exception", "exception_type": "throttlingException"}
    reply = read([*CONVERSE.parts[:3], framed({"message": CANARY}, **said)])
    assert reply.stream_error and list(reply.aux_cls)[-1] == ERROR and not reply.done
    assert reply.columns["error_type"] == "throttlingException" and CANARY not in repr(reply)


def test_a_frame_with_a_wrong_checksum_is_given_up_and_the_next_one_is_read() -> None:
    spoilt = bytearray(CONVERSE.parts[3])
    spoilt[-6] ^= 1
    reply = read([*CONVERSE.parts[:3], bytes(spoilt), *CONVERSE.parts[4:]])
    assert reply.columns["parse_status"] == "truncated"
    assert len(reply.t_ns) == len(CONVERSE.events) - 1


@pytest.mark.parametrize("seed", range(20))
def test_behind_garbage_the_next_whole_frame_is_found(seed: int) -> None:
    garbage = random.Random(seed).randbytes(seed * 37 + 1)
    reader = FrameReader()
    data = garbage + CONVERSE.parts[3] + CONVERSE.parts[4]
    messages = [m for at in range(0, len(data), 7) for m in reader.feed(data[at : at + 7])]
    assert [m[0] for m in messages] == [b"", b"contentBlockDelta", b"contentBlockDelta"]
    assert messages[0][1] is None and not reader.place


def test_trap_22_a_frame_beyond_any_cap_is_counted_and_the_next_one_is_read() -> None:
    long = converse("contentBlockDelta", delta={"text": "x" * 5000})
    data = long + CONVERSE.parts[4]
    for step in (1, 100, len(data)):
        reader = FrameReader(limit=1000)
        messages = [
            m for at in range(0, len(data), step) for m in reader.feed(data[at : at + step])
        ]
        assert [m[0] for m in messages] == [b"", b"contentBlockDelta"], step


def test_whole_replies_and_refusals() -> None:
    usage = {"inputTokens": 5, "outputTokens": 7, "totalTokens": 12}
    body = {"output": {"message": {"content": [{"text": CANARY}]}}, "stopReason": "end_turn"}
    whole = json.dumps(body | {"usage": usage, "metrics": {"latencyMs": 3}}).encode()
    reply = read([whole], kind=JSON, stream=False)
    assert (reply.columns["input_tokens"], reply.columns["output_tokens"]) == (5, 7)
    assert reply.done and CANARY not in repr(reply)
    refused = read([json.dumps({"message": CANARY}).encode()], kind=JSON, status=429)
    assert refused.columns["parse_status"] == "ok" and refused.columns["error_type"] == "429"
    llama = b'{"generation": "x", "prompt_token_count": 9, "generation_token_count": 2}'
    told = read([llama], "bedrock.invoke", kind=JSON, stream=False).columns
    assert (told["input_tokens"], told["output_tokens"]) == (9, 2)


def test_requests_are_told_by_their_path() -> None:
    body: dict[str, Any] = {
        "messages": [
            {"role": "user", "content": [{"text": "hi"}, {"cachePoint": {"type": "default"}}]},
            {"role": "user", "content": [{"image": {"format": "png", "source": {"bytes": "AA"}}}]},
        ],
        "system": [{"text": CANARY}],
        "inferenceConfig": {"maxTokens": 9, "temperature": 0.5, "stopSequences": ["x"]},
        "toolConfig": {"tools": [{"toolSpec": {"name": CANARY}}], "toolChoice": {"any": {}}},
    }
    path = "/model/us.anthropic.claude%3A0/converse-stream"
    facts = wire.read_request(path, json.dumps(body).encode())
    columns = facts.columns
    assert (columns["wire_format"], columns["stream"]) == ("bedrock.converse", True)
    assert columns["model_requested"] == "us.anthropic.claude:0"
    assert (columns["max_tokens"], columns["stop_count"], columns["tool_count"]) == (9, 1, 1)
    assert (columns["tool_choice"], columns["image_count"]) == ("required", 1)
    assert CANARY not in repr(columns)
    del body["messages"][0]["content"][1]
    unmarked = wire.read_request(path, json.dumps(body).encode())
    assert facts.prompt is not None and facts.prompt == unmarked.prompt
    claude = {"anthropic_version": "bedrock-2023-05-31", "max_tokens": 4, "messages": []}
    told = wire.read_request("/model/c/invoke", json.dumps(claude).encode()).columns
    assert (told["wire_format"], told["stream"], told["max_tokens"]) == ("bedrock.invoke", False, 4)


def test_amazons_own_client_reads_the_same_stream() -> None:
    session = import_module("botocore.session").get_session()
    session.set_credentials("a", "b")
    with served(b"".join(CONVERSE.parts), EVENT_STREAM) as url:
        client = session.create_client("bedrock-runtime", "us-east-1", endpoint_url=url)
        messages = [{"role": "user", "content": [{"text": "hi"}]}]
        events = list(client.converse_stream(modelId="m", messages=messages)["stream"])
    assert [next(iter(e)) for e in events][-1] == "metadata"
    texts = [
        e["contentBlockDelta"]["delta"].get("text") for e in events if "contentBlockDelta" in e
    ]
    assert [t for t in texts if t] == ["Grüße 😀", " more"]
    reply = read(CONVERSE.parts)
    assert list(reply.cls).count(TEXT) == 2
    assert reply.columns["output_tokens"] == events[-1]["metadata"]["usage"]["outputTokens"]
