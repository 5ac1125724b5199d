"""Replies and requests of TGI, llama.cpp's own completion and Triton's generate extension."""

import json
from importlib import import_module
from typing import Any

import pytest

from tokentape.traces import wire
from tokentape.traces.schema import EMPTY, ERROR, FINISH, OTHER, PING, TEXT
from wire_streams import (
    JSON,
    LLAMA_CPP,
    LLAMA_CPP_END,
    TGI,
    TGI_DETAILS,
    TRITON,
    llama_cpp,
    read,
    served,
    sse,
    triton,
)

CANARY = "CANARYdonotkeepthis"


def request(path: str, body: dict[str, Any]) -> Any:
    return wire.read_request(path, json.dumps(body).encode())


# -- text-generation-inference ----------------------------------------------------------------


def test_each_message_of_tgi_is_one_token_with_its_id_special_ones_too() -> None:
    reply = read("tgi", TGI.parts)
    columns = reply.columns
    assert list(reply.ntok) == [1, 1, 1, 1] and list(reply.cls)[-1] == EMPTY
    assert columns["ntok_source"] == "token_ids"
    assert (columns["input_tokens"], columns["output_tokens"]) == (31, 4)
    assert columns["finish_reason"] == ["eos_token"]
    assert reply.choice is None  # its index counts tokens


def test_an_error_in_a_stream_of_tgi_is_an_error() -> None:
    bad = sse({"error": CANARY, "error_type": "generation"}, "error")
    reply = read("tgi", [TGI.parts[0], bad])
    assert reply.stream_error and list(reply.aux_cls) == [ERROR] and not reply.done
    assert reply.columns["error_type"] == "generation" and CANARY not in repr(reply)


def test_whole_replies_of_tgi_come_alone_or_in_a_list() -> None:
    body = {"generated_text": CANARY, "details": {**TGI_DETAILS, "tokens": [], "prefill": []}}
    for content in (body, [body]):
        reply = read("tgi", [json.dumps(content).encode()], kind=JSON, stream=False)
        assert reply.columns["parse_status"] == "ok" and CANARY not in repr(reply)
        assert (reply.columns["input_tokens"], reply.columns["output_tokens"]) == (31, 4)
    bare = read("tgi", [b'{"generated_text": "x"}'], kind=JSON, stream=False)
    assert bare.done and "output_tokens" not in bare.columns


@pytest.mark.parametrize(
    ("headers", "columns"),
    [
        (
            {b"x-queue-time": "12", b"x-inference-time": "300"},
            {"server_queue_ns": 12_000_000, "server_timing_source": "headers"},
        ),
        ({b"x-queue-time": "12"}, {}),
        ({b"x-queue-time": "-1", b"x-inference-time": "300"}, {}),
        ({b"x-queue-time": "9" * 30, b"x-inference-time": "300"}, {}),
    ],
)
def test_the_head_of_a_whole_reply_of_tgi_tells_its_wait(
    headers: dict[bytes, str], columns: dict[str, Any]
) -> None:
    assert wire.head_columns("tgi", headers) == columns
    assert wire.head_columns("openai.chat", headers) == {}


def test_a_request_of_tgi_is_told_by_its_path_and_its_keys() -> None:
    body = {
        "inputs": "hi there",
        "parameters": {
            "max_new_tokens": 20,
            "seed": 3,
            "stop": ["a", "b"],
            "grammar": {"type": "json", "value": {"title": CANARY}},
            "details": True,
            "adapter_id": CANARY,
        },
    }
    facts = request("/generate_stream", body)
    columns = facts.columns
    assert (columns["wire_format"], columns["operation"]) == ("tgi", "text_completion")
    assert (columns["stream"], columns["max_tokens"]) == (True, 20)
    assert (columns["stop_count"], columns["response_format"]) == (2, "json_schema")
    assert json.loads(columns["extra"])["details"] is True and CANARY not in repr(columns)
    assert facts.prompt is not None and facts.prompt.text == b"hi there"
    assert request("/generate", body).columns["stream"] is False
    root = request("/", body | {"stream": True}).columns
    assert (root["wire_format"], root["stream"]) == ("tgi", True)
    assert request("/", body).columns == {"wire_format": "unknown"}
    assert request("/v1/files", body).columns == {"wire_format": "unknown"}


def test_the_client_of_hugging_face_reads_the_same_stream() -> None:
    hub = import_module("huggingface_hub")
    with served(b"".join(TGI.parts)) as url:
        client = hub.InferenceClient(url)
        told = list(client.text_generation("hi", stream=True, details=True, max_new_tokens=4))
    assert [t.token.special for t in told] == [False, False, False, True]
    assert told[-1].details.generated_tokens == 4
    assert told[-1].details.finish_reason == "eos_token"


# -- llama.cpp --------------------------------------------------------------------------------


def test_llama_cpp_tells_the_tokens_so_far_and_its_own_times() -> None:
    reply = read("llama.cpp", LLAMA_CPP.parts)
    columns = reply.columns
    assert list(reply.ntok) == [1, 2, 1, 2]
    assert columns["ntok_source"] == "usage_cumulative"
    assert (columns["input_tokens"], columns["cached_tokens"]) == (20, 16)
    assert columns["output_tokens"] == 6
    assert (columns["server_prefill_ns"], columns["server_decode_ns"]) == (12_500_000, 90_250_000)
    assert columns["server_timing_source"] == "timings"
    assert (columns["model"], columns["finish_reason"]) == ("llama", ["limit"])
    assert list(reply.aux_cls) == [PING, FINISH] or list(reply.aux_cls) == [PING, OTHER]
    assert "let me see" not in repr(reply)  # its end repeats the prompt


def test_an_old_llama_cpp_gave_reasons_as_flags_and_no_counts() -> None:
    end = {"content": "", "stop": True, "stopped_eos": True, "stopped_limit": False}
    reply = read("llama.cpp", [sse({"content": "a", "stop": False}), sse(end)])
    assert list(reply.cls) == [TEXT] and reply.columns["finish_reason"] == ["eos"]
    assert reply.done


def test_an_error_in_a_stream_of_llama_cpp_is_an_error() -> None:
    bad = {"error": {"code": 500, "message": CANARY, "type": "server_error"}}
    reply = read("llama.cpp", [llama_cpp("a", 1), sse(bad)])
    assert reply.stream_error and reply.columns["error_type"] == "server_error"
    assert CANARY not in repr(reply)


def test_several_prompts_of_llama_cpp_are_told_apart_and_added_up() -> None:
    ends = [llama_cpp("", 2, **LLAMA_CPP_END) for _ in range(2)]
    parts = [llama_cpp("a", 1), llama_cpp("b", 1, index=1), llama_cpp("c", 2)]
    parts += [llama_cpp("d", 2, index=1), ends[0], llama_cpp("", 2, **LLAMA_CPP_END, index=1)]
    reply = read("llama.cpp", parts)
    assert bytes(reply.choice or b"") == bytes([0, 1, 0, 1])
    assert list(reply.ntok) == [1, 1, 1, 1]
    assert (reply.columns["input_tokens"], reply.columns["output_tokens"]) == (40, 4)
    whole = {"content": "x", **LLAMA_CPP_END, "tokens_predicted": 6, "tokens_evaluated": 20}
    both = read("llama.cpp", [json.dumps([whole, whole]).encode()], kind=JSON, stream=False)
    assert (both.columns["input_tokens"], both.columns["output_tokens"]) == (40, 12)
    assert both.columns["finish_reason"] == ["limit", "limit"]


def test_a_request_of_llama_cpp_is_told_by_its_path_or_its_keys() -> None:
    body = {"prompt": "hi", "n_predict": 7, "cache_prompt": True, "stream": True, "grammar": "x"}
    for path in ("/completion", "/completions"):
        columns = request(path, body).columns
        assert (columns["wire_format"], columns["max_tokens"]) == ("llama.cpp", 7)
        assert (columns["stream"], columns["response_format"]) == (True, "grammar")
        assert json.loads(columns["extra"]) == {"cache_prompt": True}
    del body["n_predict"]
    assert request("/v1/completions", body).columns["wire_format"] == "openai.completions"
    tokens = request("/completion", {"prompt": [1, 2, 3]}).prompt
    assert tokens is not None and tokens.tokens == [1, 2, 3]
    assert request("/completion", {"prompt": ["a", [1, 2]]}).prompt is None


# -- Triton -----------------------------------------------------------------------------------


def test_triton_with_vllm_tells_the_tokens_of_each_message() -> None:
    reply = read("triton", TRITON.parts)
    columns = reply.columns
    assert list(reply.ntok) == [2, 1, 1, 3] and columns["ntok_source"] == "token_ids"
    assert (columns["input_tokens"], columns["output_tokens"]) == (9, 7)
    assert (columns["model"], columns["finish_reason"]) == ("ensemble", ["length"])


@pytest.mark.parametrize(
    ("texts", "events"),
    [
        (["a", "ab", "abc", "abc", "abcd"], 4),  # all text so far: the fourth says nothing new
        ([" a", " and", " so", " so", " on"], 5),  # what is new, though the second looks repeated
        (["ha", "ha", "ha"], 3),
        (["", "a", "a b"], 2),
    ],
)
def test_trap_17_repeated_text_is_told_from_new_text(texts: list[str], events: int) -> None:
    assert list(read("triton", [triton(text) for text in texts]).cls) == [TEXT] * events


def test_an_error_in_a_stream_of_triton_is_an_error() -> None:
    reply = read("triton", [triton("a"), sse({"error": CANARY})])
    assert reply.stream_error and list(reply.aux_cls) == [ERROR] and CANARY not in repr(reply)


def test_a_request_of_triton_names_its_model_in_the_path() -> None:
    body = {"text_input": "hi", "max_tokens": 9, "parameters": {"temperature": 0.5, "top_k": 4}}
    columns = request("/v2/models/llama/versions/1/generate_stream", body).columns
    assert (columns["wire_format"], columns["model_requested"]) == ("triton", "llama")
    assert (columns["stream"], columns["max_tokens"], columns["top_k"]) == (True, 9, 4)
    vllm = {"text_input": "hi", "sampling_parameters": '{"max_tokens": 3}'}
    columns = request("/v2/models/llama/generate", vllm).columns
    assert (columns["stream"], columns["max_tokens"]) == (False, 3)
