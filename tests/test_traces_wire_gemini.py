"""Replies and requests of Gemini, beside what Google's own client makes of the same bytes."""

import json
from typing import Any

import pytest

from tokentape.traces import wire
from tokentape.traces.schema import EMPTY, ERROR, FINISH, REASONING, TEXT, TOOL, USAGE
from tokentape.traces.wire.json_array import JsonArrayReader
from wire_streams import GEMINI, GEMINI_ARRAY, GEMINI_MESSAGES, JSON, array_of, gemini, served, sse
from wire_streams import read as read_any

STREAM = "/v1beta/models/gemini-x:streamGenerateContent?alt=sse"
CANARY = "CANARYdonotkeepthis"


def read(messages: list[dict[str, Any]], **more: Any) -> Any:
    return read_any("gemini", [sse(message) for message in messages], **more)


@pytest.mark.parametrize("sample", [GEMINI, GEMINI_ARRAY], ids=["sse", "array"])
def test_a_stream_has_tokens_by_the_usage_that_counts_up_with_it(sample: Any) -> None:
    reply = read_any("gemini", sample.parts, kind=sample.kind)
    assert list(reply.t_ns) == [1000, 1001, 1002, 1003]
    assert list(reply.ntok) == [6, 3, 6, 6]
    columns = reply.columns
    assert columns["ntok_source"] == "usage_cumulative"
    assert (columns["input_tokens"], columns["cached_tokens"]) == (40, 32)
    assert (columns["output_tokens"], columns["reasoning_tokens"]) == (21, 6)
    assert json.loads(columns["usage_raw"])["totalTokenCount"] == 61
    assert (columns["model"], columns["response_id"]) == ("gemini-x", "r-1")
    assert columns["finish_reason"] == ["STOP"]
    assert (reply.first_content_ns, reply.first_answer_ns) == (1000, 1001)


def test_thoughts_that_were_not_sent_are_output_that_no_event_stands_for() -> None:
    usage = {"thoughtsTokenCount": 100, "candidatesTokenCount": 2}
    reply = read([gemini([{"text": "a"}], usage, "STOP")])
    assert reply.columns["output_tokens"] == 102
    assert (list(reply.ntok), reply.columns["ntok_source"]) == ([2], "usage_cumulative_short")


def test_usage_at_the_end_only_is_spread() -> None:
    first = gemini([{"text": "four words of text"}], {})
    del first["usageMetadata"]
    reply = read([first, gemini([{"text": "a"}], {"candidatesTokenCount": 5}, "MAX_TOKENS")])
    assert (list(reply.ntok), reply.columns["ntok_source"]) == ([4, 1], "usage_spread")


def test_what_tools_gave_is_input() -> None:
    reply = read([gemini([{"text": "a"}], {"toolUsePromptTokenCount": 9}, "STOP")])
    assert reply.columns["input_tokens"] == 49


def test_trap_7_and_8_a_message_without_text_or_without_candidates_is_no_event() -> None:
    usage = {"usageMetadata": {"promptTokenCount": 4, "candidatesTokenCount": 1}}
    end = gemini([{"text": ""}], {"candidatesTokenCount": 1}, "STOP")
    reply = read([gemini([{"text": "a"}], {"candidatesTokenCount": 1}), end, usage])
    assert (list(reply.cls), list(reply.aux_cls)) == ([TEXT], [FINISH, USAGE])
    assert reply.done and reply.columns["parse_status"] == "ok"


def test_an_end_without_text_for_which_a_token_was_counted_is_an_event() -> None:
    end = gemini([], {"candidatesTokenCount": 3}, "STOP")
    reply = read([gemini([{"text": "a"}], {"candidatesTokenCount": 1}), end])
    assert (list(reply.cls), list(reply.ntok)) == ([TEXT, EMPTY], [1, 2])


def test_trap_16_candidates_are_choices() -> None:
    first, second = gemini([{"text": "a"}], {}), gemini([{"text": "b"}], {}, "STOP")
    second["candidates"][0]["index"] = 1
    reply = read([first, second])
    assert (list(reply.choice), reply.done) == ([0, 1], False)
    reply = read([first, second, gemini([], {}, "SAFETY")])
    assert (reply.columns["finish_reason"], reply.done) == (["SAFETY", "STOP"], True)


def test_trap_13_an_error_under_status_200_is_an_error() -> None:
    error = {"error": {"code": 503, "message": CANARY, "status": "UNAVAILABLE"}}
    for sample in (GEMINI, GEMINI_ARRAY):
        end = sse(error) if sample is GEMINI else array_of([0, error])[1]
        reply = read_any("gemini", [*sample.parts[:2], end], kind=sample.kind)
        assert reply.stream_error and list(reply.aux_cls) == [ERROR]
        assert reply.columns["error_type"] == "UNAVAILABLE"
        assert CANARY not in repr(reply)


def test_trap_20_a_refused_prompt_leaves_no_event_and_says_why() -> None:
    usage = {"promptTokenCount": 8, "totalTokenCount": 8}
    refused = {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": usage}
    reply = read([refused])
    assert (list(reply.cls), list(reply.aux_cls), reply.done) == ([], [FINISH], True)
    assert reply.columns["finish_reason"] == ["SAFETY"]
    assert reply.columns["input_tokens"] == 8


def test_whole_replies_and_errors() -> None:
    whole = gemini([{"text": CANARY}], {"candidatesTokenCount": 3}, "STOP")
    reply = read_any("gemini", [json.dumps(whole).encode()], kind=JSON, stream=False)
    assert reply.columns["output_tokens"] == 3 and reply.done
    # an array where nobody knew that a stream was asked for
    parts = array_of(GEMINI_MESSAGES)
    reply = read_any("gemini", parts, kind=JSON, stream=False)
    assert (reply.columns["output_tokens"], reply.columns["finish_reason"]) == (21, ["STOP"])
    error = [{"error": {"code": 429, "message": CANARY, "status": "RESOURCE_EXHAUSTED"}}]
    reply = read_any("gemini", [json.dumps(error).encode()], kind=JSON, status=429)
    assert reply.columns["error_type"] == "RESOURCE_EXHAUSTED"
    assert CANARY not in repr(reply)


def test_trap_22_an_object_beyond_any_cap_is_counted_and_the_next_one_is_read() -> None:
    reader = JsonArrayReader(limit=50)
    data = b'[{"a":"' + b'{\\"' * 40 + b'"},\n{"b":[1,{"c":"]"}]}]'
    messages = [m for at in range(len(data)) for m in reader.feed(data[at : at + 1])]
    assert messages == [(b"", None), (b"", b'{"b":[1,{"c":"]"}]}')]
    assert not reader.place


BODY = {
    "systemInstruction": {"parts": [{"text": CANARY}]},
    "contents": [
        {
            "role": "user",
            "parts": [{"text": CANARY}, {"inlineData": {"mimeType": "image/png", "data": "AA=="}}],
        },
        {"role": "model", "parts": [{"functionCall": {"name": CANARY, "args": {}}}]},
    ],
    "tools": [{"functionDeclarations": [{"name": CANARY}, {"name": "b"}]}, {"googleSearch": {}}],
    "toolConfig": {"functionCallingConfig": {"mode": "ANY"}},
    "safetySettings": [{"category": CANARY}],
    "generationConfig": {
        "temperature": 0.5,
        "topK": 40.0,
        "candidateCount": 2,
        "maxOutputTokens": 99,
        "stopSequences": [CANARY],
        "responseMimeType": "application/json",
        "thinkingConfig": {"thinkingBudget": 512, "includeThoughts": True},
    },
}


def test_a_request_as_columns_and_its_prompt() -> None:
    facts = wire.read_request(STREAM, json.dumps(BODY).encode())
    extra = json.loads(facts.columns.pop("extra"))
    assert extra["thinking_budget_tokens"] == 512
    assert extra["safetySettings"].keys() == {"bytes"}
    assert facts.columns == {
        "wire_format": "gemini",
        "operation": "chat",
        "stream": True,
        "model_requested": "gemini-x",
        "n_choices": 2,
        "max_tokens": 99,
        "temperature": 0.5,
        "top_k": 40,
        "stop_count": 1,
        "tool_count": 3,
        "tool_choice": "required",
        "response_format": "json_object",
        "message_count": 2,
        "image_count": 1,
        "audio_count": 0,
    }
    assert CANARY not in repr((facts.columns, extra))
    longer = {**BODY, "contents": [*BODY["contents"], {"role": "user", "parts": [{"text": "b"}]}]}
    after = wire.read_request(STREAM, json.dumps(longer).encode())
    assert facts.prompt is not None and after.prompt is not None
    assert bytes(after.prompt.text or b"").startswith(bytes(facts.prompt.text or b"-"))


def test_keys_in_snake_case_are_the_same() -> None:
    config = {"max_output_tokens": 7, "thinking_config": {"thinking_level": "LOW"}}
    body = {"contents": [{"parts": [{"text": "a"}]}], "generation_config": config}
    path = "/v1/projects/p/locations/l/publishers/google/models/gemini-y:generateContent"
    columns = wire.read_request(path, json.dumps(body).encode()).columns
    assert (columns["max_tokens"], columns["reasoning_effort"]) == (7, "low")
    assert (columns["model_requested"], columns["stream"]) == ("gemini-y", False)


def test_a_prompt_whose_beginning_lies_in_the_servers_cache_has_no_known_prefix() -> None:
    body = {"contents": [{"parts": [{"text": "a"}]}], "cachedContent": "cachedContents/x"}
    assert wire.read_request(STREAM, json.dumps(body).encode()).prompt is None


def test_googles_own_client_reads_the_same_from_these_bytes() -> None:
    genai = pytest.importorskip("google.genai", reason="google-genai is not installed")
    from google.genai import types

    with served(b"".join(GEMINI.parts)) as url:
        options = types.HttpOptions(base_url=url, api_version="v1beta")
        client = genai.Client(api_key="k", vertexai=False, http_options=options)
        chunks = list(client.models.generate_content_stream(model="gemini-x", contents="a"))
    classes = [
        TOOL if part.function_call else REASONING if part.thought else TEXT
        for chunk in chunks
        for part in chunk.candidates[0].content.parts
    ]
    reply = read_any("gemini", GEMINI.parts)
    assert classes == list(reply.cls)
    usage = chunks[-1].usage_metadata
    assert usage.prompt_token_count == reply.columns["input_tokens"]
    assert usage.cached_content_token_count == reply.columns["cached_tokens"]
    assert usage.thoughts_token_count == reply.columns["reasoning_tokens"]
    assert usage.total_token_count == 40 + reply.columns["output_tokens"]
    assert [chunks[-1].candidates[0].finish_reason.value] == reply.columns["finish_reason"]
    assert (chunks[0].model_version, chunks[0].response_id) == ("gemini-x", "r-1")
