"""Replies and requests of OpenAI's Responses."""

import json
from typing import Any

import openai
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from tokentape.traces import wire
from tokentape.traces.schema import DONE, ERROR, OTHER, ROLE
from wire_streams import JSON, RESPONSE, RESPONSE_USAGE, RESPONSES, numbered, served, typed
from wire_streams import read as read_any

PARTS = RESPONSES.parts


def read(parts: list[bytes], **more: Any) -> Any:
    return read_any("openai.responses", parts, **more)


def ended(kind: str, **more: Any) -> bytes:
    return typed({"type": kind, "response": RESPONSE | more})[0]


def test_a_stream_is_read_in_full() -> None:
    reply = read(PARTS)
    assert list(reply.t_ns) == [1002, 1004, 1005, 1007, 1008]
    assert list(reply.aux_cls) == [ROLE, OTHER, OTHER, OTHER, DONE]
    assert (reply.first_content_ns, reply.first_answer_ns) == (1002, 1004)
    columns = reply.columns
    assert (columns["model"], columns["response_id"]) == ("gpt-x", "resp_1")
    assert (columns["input_tokens"], columns["cached_tokens"]) == (50, 32)
    assert (columns["output_tokens"], columns["reasoning_tokens"]) == (12, 4)
    assert (columns["finish_reason"], columns["ntok_source"]) == (["completed"], "usage_spread")


def test_the_official_client_reads_of_the_sample_what_we_read() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for part in PARTS:
        adapter.validate_python(json.loads(part.partition(b"data: ")[2]))
    with (
        served(b"".join(PARTS)) as url,
        openai.OpenAI(api_key="k", base_url=url, max_retries=0) as client,
        client.responses.create(model="m", input="hi", stream=True) as stream,
    ):
        events = list(stream)
    assert len(events) == len(PARTS)
    usage, columns = events[-1].response.usage, read(PARTS).columns
    assert columns["input_tokens"] == usage.input_tokens
    assert columns["output_tokens"] == usage.output_tokens
    assert columns["cached_tokens"] == usage.input_tokens_details.cached_tokens


def test_a_gap_in_the_numbers_of_events_makes_the_reply_partial() -> None:
    assert read([*PARTS[:4], *PARTS[5:]]).columns["parse_status"] == "partial"
    constant = [p.replace(b'"sequence_number": ', b'"sequence_number": -1') for p in PARTS]
    assert read(constant).columns["parse_status"] == "ok"


def test_an_incomplete_response_tells_why() -> None:
    end = ended("response.incomplete", incomplete_details={"reason": "max_output_tokens"})
    reply = read([*PARTS[:6], end])
    assert reply.columns["finish_reason"] == ["max_output_tokens"] and reply.done


def test_trap_13_failures_under_status_200_are_errors() -> None:
    error = {"code": "server_error", "message": "CANARY"}
    flat = {"type": "error", "code": "rate_limit_exceeded", "message": "CANARY", "param": None}
    for end, name in (
        (ended("response.failed", error=error), "server_error"),
        (numbered(flat)[0], "rate_limit_exceeded"),
    ):
        reply = read([*PARTS[:6], end])
        assert reply.stream_error and not reply.done
        assert reply.columns["error_type"] == name
        assert reply.aux_cls[-1] == ERROR
        assert "CANARY" not in repr(reply)


def test_a_whole_response_has_usage_and_no_first_content() -> None:
    body = RESPONSE | {"status": "completed", "usage": RESPONSE_USAGE}
    reply = read([json.dumps(body).encode()], kind=JSON, stream=False)
    assert (reply.columns["input_tokens"], reply.columns["output_tokens"]) == (50, 12)
    assert reply.first_content_ns is None and reply.done


def request(**more: Any) -> Any:
    return wire.read_request("/v1/responses", json.dumps({"model": "m", **more}).encode())


def test_a_request_as_columns_and_its_prompt() -> None:
    items = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    facts = request(
        input=items,
        instructions="be brief",
        stream=True,
        max_output_tokens=5,
        reasoning={"effort": "low"},
        text={"format": {"type": "json_schema"}},
    )
    assert facts.columns["wire_format"] == "openai.responses"
    assert facts.columns["max_tokens"] == 5
    assert facts.columns["reasoning_effort"] == "low"
    assert facts.columns["response_format"] == "json_schema"
    call = {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"}
    longer = request(input=[*items, call], instructions="be brief")
    assert bytes(longer.prompt.text).startswith(bytes(facts.prompt.text))
    assert request(input="hi").prompt.text is not None
    assert request(input="hi", previous_response_id="resp_0").prompt is None
