"""Replies and requests of Anthropic's Messages."""

import json
from typing import Any, get_args

import anthropic
import pytest
from anthropic.types import MessageDeltaUsage, RawMessageStreamEvent, StopReason
from pydantic import TypeAdapter

from tokentape.traces import wire
from tokentape.traces.schema import DONE, ERROR, FINISH, OTHER, PING, ROLE, TEXT, TOOL
from wire_streams import ANTHROPIC, JSON, served, typed
from wire_streams import read as read_any

PARTS = ANTHROPIC.parts


def read(parts: list[bytes], **more: Any) -> Any:
    return read_any("anthropic", parts, **more)


def test_a_stream_is_read_in_full() -> None:
    reply = read(PARTS)
    assert list(reply.t_ns) == [1002, 1007, 1008, 1010, 1012]
    assert list(reply.aux_cls) == [
        *(ROLE, OTHER, OTHER, OTHER, PING, OTHER, OTHER, OTHER, OTHER, FINISH, DONE),
    ]
    assert (reply.first_content_ns, reply.first_answer_ns, reply.last_content_ns) == (
        1002,
        1007,
        1012,
    )
    assert reply.columns == {
        "model": "claude-x",
        "response_id": "msg_1",
        "response_bytes": sum(map(len, PARTS)),
        "input_tokens": 130,
        "input_tokens_source": "usage",
        "cached_tokens": 100,
        "cached_tokens_source": "usage",
        "cache_write_tokens": 20,
        "cache_write_tokens_source": "usage",
        "reasoning_tokens": 12,
        "reasoning_tokens_source": "usage",
        "output_tokens": 30,
        "output_tokens_source": "usage",
        "ntok_source": "usage_spread",
        "usage_raw": '{"input_tokens":10,"cache_read_input_tokens":100,'
        '"cache_creation_input_tokens":20,"output_tokens":30,'
        '"output_tokens_details":{"thinking_tokens":12}}',
        "finish_reason": ["tool_use"],
        "parse_status": "ok",
        "coalesced_reads": 0,
    }


def test_the_sample_is_what_the_official_models_say() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    for part in PARTS:
        value = json.loads(part.partition(b"data: ")[2])
        if value["type"] != "ping":  # the client takes those out by their name
            adapter.validate_python(value)


def test_the_official_client_reads_of_the_sample_what_we_read() -> None:
    with (
        served(b"".join(PARTS)) as url,
        anthropic.Anthropic(api_key="k", base_url=url, max_retries=0) as client,
        client.messages.stream(
            model="m", max_tokens=9, messages=[{"role": "user", "content": "hi"}]
        ) as stream,
    ):
        message = stream.get_final_message()
    columns = read(PARTS).columns
    usage = message.usage
    assert columns["model"] == message.model
    assert columns["finish_reason"] == [message.stop_reason]
    assert columns["output_tokens"] == usage.output_tokens
    assert columns["cached_tokens"] == usage.cache_read_input_tokens
    assert columns["input_tokens"] == usage.input_tokens + 100 + 20


def test_every_count_of_the_official_usage_is_known() -> None:
    names = {name for name in MessageDeltaUsage.model_fields if name.endswith("tokens")}
    assert names == {
        *("input_tokens", "output_tokens"),
        *("cache_creation_input_tokens", "cache_read_input_tokens"),
    }


@pytest.mark.parametrize("reason", get_args(StopReason))
def test_every_official_stop_reason_is_kept(reason: str) -> None:
    end = {"type": "message_delta", "delta": {"stop_reason": reason}, "usage": {"output_tokens": 3}}
    assert read([*PARTS[:8], *typed(end)]).columns["finish_reason"] == [reason]


def test_the_output_tokens_of_the_beginning_are_no_total() -> None:
    reply = read(PARTS[:9], complete=False)
    assert reply.columns["output_tokens_source"] == "events"
    assert reply.columns["output_tokens"] == len(reply.t_ns) == 3
    assert reply.columns["parse_status"] == "partial"
    assert not reply.done


def test_output_tokens_run_through_the_message_and_the_last_ones_count() -> None:
    deltas = [
        {"type": "message_delta", "delta": {}, "usage": {"output_tokens": n}} for n in (4, 9, 17)
    ]
    assert read([*PARTS[:9], *typed(*deltas)]).columns["output_tokens"] == 17


def test_trap_6_pings_are_never_the_first_content() -> None:
    reply = read([PARTS[0], *typed({"type": "ping"}), b": keep-alive\n\n", PARTS[7], *PARTS[-2:]])
    assert list(reply.aux_cls) == [ROLE, PING, PING, FINISH, DONE]
    assert reply.first_content_ns == 1003


def test_trap_13_an_error_under_status_200_is_an_error() -> None:
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "CANARY"}}
    reply = read([*PARTS[:9], *typed(error)])
    assert reply.stream_error and not reply.done
    assert reply.columns["error_type"] == "overloaded_error"
    assert reply.aux_cls[-1] == ERROR
    assert "CANARY" not in repr(reply)


def test_trap_20_an_empty_message_has_no_first_content() -> None:
    end = {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn"},
        "usage": {"output_tokens": 0},
    }
    reply = read([PARTS[0], *typed(end, {"type": "message_stop"})])
    assert reply.done and reply.first_content_ns is None
    assert reply.columns["output_tokens"] == 0


def test_kinds_of_events_and_deltas_that_come_later_are_no_errors() -> None:
    new = typed(
        {"type": "something_new", "x": 1},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "new_delta", "x": "y"}},
    )
    reply = read([*PARTS[:9], *new, *PARTS[-2:]])
    assert reply.columns["parse_status"] == "ok"
    assert list(reply.cls) == ANTHROPIC.events[:3]


@pytest.mark.parametrize(
    ("block", "cls"),
    [
        ({"type": "redacted_thinking", "data": "EmwKAhgB"}, 1),
        ({"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}, TOOL),
        ({"type": "text", "text": "all at once"}, TEXT),
    ],
)
def test_what_a_block_brings_with_its_beginning_is_content(block: dict[str, Any], cls: int) -> None:
    start = {"type": "content_block_start", "index": 0, "content_block": block}
    assert list(read([PARTS[0], *typed(start), *PARTS[-2:]]).cls) == [cls]


WHOLE = {
    "id": "msg_2",
    "type": "message",
    "role": "assistant",
    "model": "claude-x",
    "content": [{"type": "text", "text": "CANARY"}],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 5, "cache_read_input_tokens": 7, "output_tokens": 9},
}


def test_a_whole_message_has_usage_and_no_first_content() -> None:
    reply = read([json.dumps(WHOLE).encode()], kind=JSON, stream=False)
    assert reply.columns["input_tokens"] == 12
    assert reply.columns["output_tokens"] == 9
    assert reply.columns["finish_reason"] == ["end_turn"]
    assert reply.first_content_ns is None and reply.done
    assert "CANARY" not in repr(reply)


def test_an_error_body_tells_its_class() -> None:
    error = {"type": "error", "error": {"type": "rate_limit_error", "message": "no"}}
    reply = read([json.dumps(error).encode()], kind=JSON, status=429)
    assert reply.columns["error_type"] == "rate_limit_error"
    assert reply.stream_error


def request(**more: Any) -> Any:
    body = {"model": "m", "max_tokens": 64, "messages": [{"role": "user", "content": "hi"}]} | more
    return wire.read_request("/v1/messages?beta=true", json.dumps(body).encode())


def test_a_request_as_columns() -> None:
    facts = request(
        stream=True,
        system="be brief",
        temperature=0.5,
        top_k=40,
        stop_sequences=["a", "b"],
        tools=[{"name": "t", "input_schema": {}}],
        tool_choice={"type": "any"},
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"effort": "low"},
        service_tier="auto",
        metadata={"user_id": "CANARY"},
    )
    thinking = len('{"type": "enabled", "budget_tokens": 1024}')
    assert facts.columns == {
        "wire_format": "anthropic",
        "operation": "chat",
        "model_requested": "m",
        "stream": True,
        "n_choices": 1,
        "max_tokens": 64,
        "temperature": 0.5,
        "top_k": 40,
        "stop_count": 2,
        "tool_count": 1,
        "tool_choice": "required",
        "reasoning_effort": "low",
        "message_count": 1,
        "image_count": 0,
        "extra": f'{{"thinking_budget_tokens":1024,"thinking":{{"bytes":{thinking}}},'
        '"output_config":{"bytes":17},"service_tier":"auto","metadata":{"bytes":21}}',
    }


def test_a_conversation_that_goes_on_keeps_its_beginning_whatever_is_marked_for_the_cache() -> None:
    tools = [{"name": "t", "input_schema": {}, "cache_control": {"type": "ephemeral"}}]
    marked = {"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}}
    first = [{"role": "user", "content": [marked]}]
    call = {"type": "tool_use", "id": "x", "name": "t", "input": {"a": 1}}
    image = {"type": "image", "source": {"type": "base64", "data": "A" * 99}}
    result = {"type": "tool_result", "tool_use_id": "x", "content": [image]}
    then = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
    ]
    one = request(messages=first, tools=tools, system="s")
    two = request(messages=then, tools=[{"name": "t", "input_schema": {}}], system="s")
    assert bytes(two.prompt.text).startswith(bytes(one.prompt.text))
    assert b"AAAA" not in two.prompt.text
    assert two.columns["image_count"] == 1


@pytest.mark.parametrize(
    "path", ["/v1/messages/count_tokens", "/v1/threads/t/messages", "/v1/messages/batches"]
)
def test_paths_beside_it_are_not_taken_for_it(path: str) -> None:
    assert wire.wire_format(path) == "unknown"
