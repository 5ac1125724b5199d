"""Replies and requests of SGLang's own /generate."""

import json
from typing import Any

import pytest

from tokentape.traces import wire
from tokentape.traces.schema import DONE, EMPTY, ERROR, FINISH, TEXT
from wire_streams import JSON, SGLANG, sglang, sse
from wire_streams import read as read_any

LENGTH = {"type": "length", "length": 7}


def read(parts: list[bytes], **more: Any) -> Any:
    return read_any("sglang", parts, **more)


def test_trap_17_cumulative_text_gives_events_and_exact_tokens() -> None:
    reply = read(SGLANG.parts)
    assert list(reply.t_ns) == [1000, 1001, 1002, 1003]
    assert list(reply.ntok) == [2, 1, 1, 3]
    assert list(reply.aux_cls) == [FINISH, DONE]
    columns = reply.columns
    assert (columns["ntok_source"], columns["output_tokens"]) == ("usage_cumulative", 7)
    assert (columns["input_tokens"], columns["cached_tokens"]) == (9, 4)
    assert (columns["server_queue_ns"], columns["server_timing_source"]) == (
        250_000_000,
        "meta_info",
    )
    assert columns["finish_reason"] == ["length"]


def test_trap_17_text_that_is_not_repeated_is_read_the_same() -> None:
    parts = [sglang("long start", 2), sglang("ab", 3), sglang("cd", 4), sglang("", 5, LENGTH)]
    reply = read(parts)
    assert list(reply.cls) == [TEXT, TEXT, TEXT, EMPTY]
    assert list(reply.ntok) == [2, 1, 1, 1]


def test_new_text_of_the_same_length_is_text() -> None:
    assert list(read([sglang("ab", 1), sglang("cd", 2)]).cls) == [TEXT, TEXT]


def test_reasoning_tokens_are_those_of_the_last_message_of_each_choice() -> None:
    def message(text: str, count: int, reasoning: int, index: int) -> bytes:
        meta = {"id": "s", "completion_tokens": count, "reasoning_tokens": reasoning}
        return sse({"text": text, "index": index, "meta_info": meta | {"finish_reason": None}})

    parts = [message("a", 2, 2, 0), message("b", 3, 1, 1), message("ac", 4, 3, 0)]
    columns = read([*parts, sse("[DONE]")]).columns
    assert (columns["output_tokens"], columns["reasoning_tokens"]) == (7, 4)
    assert columns["reasoning_tokens_source"] == "usage"


def test_trap_16_choices_are_counted_each_for_itself() -> None:
    parts = [sglang("a", 1, index=0), sglang("b", 1, index=1), sglang("ac", 3, LENGTH, index=0)]
    reply = read([*parts, sglang("bd", 2, LENGTH, index=1), sse("[DONE]")])
    assert list(reply.choice) == [0, 1, 0, 1]
    assert list(reply.ntok) == [1, 1, 2, 1]
    assert reply.columns["output_tokens"] == 5
    assert "input_tokens" not in reply.columns


@pytest.mark.parametrize(
    ("end", "name"),
    [
        (sse({"error": {"message": "CANARY", "type": "oom"}}), "oom"),
        (sglang("a", 1, {"type": "abort", "message": "CANARY"}), "error"),
    ],
)
def test_trap_13_an_abort_under_status_200_is_an_error(end: bytes, name: str) -> None:
    reply = read([sglang("a", 1), end])
    assert reply.stream_error and reply.aux_cls[-1] == ERROR
    assert reply.columns["error_type"] == name
    assert "CANARY" not in repr(reply)


def test_whole_replies_of_one_and_of_several_prompts() -> None:
    meta = {"id": "s", "finish_reason": LENGTH, "prompt_tokens": 3, "completion_tokens": 7}
    one = {"text": "CANARY", "meta_info": meta}
    reply = read([json.dumps(one).encode()], kind=JSON, stream=False)
    assert (reply.columns["input_tokens"], reply.columns["output_tokens"]) == (3, 7)
    several = read([json.dumps([one, one]).encode()], kind=JSON, stream=False)
    assert several.columns["output_tokens"] == 14
    assert several.columns["finish_reason"] == ["length", "length"]
    assert "CANARY" not in repr((reply, several))


def request(body: dict[str, Any]) -> Any:
    return wire.read_request("/generate", json.dumps(body).encode())


def test_a_request_as_columns_and_its_prompt() -> None:
    params = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True, "stop": ["a"]}
    facts = request({"input_ids": [1, 2, 3], "stream": True, "sampling_params": params})
    assert facts.prompt.tokens == [1, 2, 3]
    assert facts.columns == {
        "wire_format": "sglang",
        "operation": "text_completion",
        "stream": True,
        "n_choices": 1,
        "max_tokens": 8,
        "temperature": 0.0,
        "ignore_eos": True,
        "stop_count": 1,
    }
    assert request({"text": "hi"}).prompt.text == b"hi"
    assert request({"text": ["a", "b"]}).columns["extra"] == '{"prompt_count":2}'


def test_another_server_at_the_same_path_is_not_taken_for_it() -> None:
    assert request({"inputs": "hi", "parameters": {}}).columns["wire_format"] == "tgi"
    assert request({"text_input": "hi"}).columns["wire_format"] == "triton"
    assert request({"prompt": "hi"}).columns["wire_format"] == "unknown"
