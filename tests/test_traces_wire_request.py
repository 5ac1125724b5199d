"""Requests of OpenAI chat and completions: columns, sizes of the unknown, canonical prompts."""

import json
import tracemalloc
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokentape.traces import schema, wire
from tokentape.traces.wire import RequestFacts

CANARY = "CANARY do not keep this"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def read(endpoint: str, body: Any) -> RequestFacts:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    facts = wire.read_request(endpoint, data)
    for name, value in facts.columns.items():
        assert value is not None
        pa.array([value], schema.BY_NAME[name].type)
    return facts


def chat(**more: Any) -> RequestFacts:
    return read(CHAT, {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | more)


def text_of(facts: RequestFacts) -> bytes:
    assert facts.prompt is not None
    assert facts.prompt.tokens is None
    assert facts.prompt.text is not None
    return bytes(facts.prompt.text)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/chat/completions", "openai.chat"),
        ("/openai/deployments/x/chat/completions?api-version=1", "openai.chat"),
        ("/v1/completions/", "openai.completions"),
        ("/v1/models", "unknown"),
        ("/v1/completions/render", "unknown"),
        ("", "unknown"),
    ],
)
def test_the_path_tells_the_wire_format(path: str, name: str) -> None:
    assert wire.wire_format(path) == name


def test_a_chat_request_as_columns() -> None:
    facts = chat(
        stream=True,
        n=2,
        max_tokens=5,
        max_completion_tokens=7,
        min_tokens=7,
        ignore_eos=True,
        temperature=1,
        top_p=0.5,
        top_k=-1,
        seed=-3,
        stop=["a", "b"],
        logprobs=True,
        top_logprobs=4,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        tools=[{"type": "function", "function": {"name": "f"}}],
        tool_choice={"type": "function", "function": {"name": "f"}},
        response_format={"type": "json_schema", "json_schema": {"name": CANARY}},
        reasoning_effort="low",
    )
    assert facts.columns == {
        "wire_format": "openai.chat",
        "operation": "chat",
        "model_requested": "m",
        "stream": True,
        "n_choices": 2,
        "max_tokens": 7,
        "min_tokens": 7,
        "ignore_eos": True,
        "temperature": 1.0,
        "top_p": 0.5,
        "top_k": -1,
        "sampling_seed": -3,
        "stop_count": 2,
        "logprobs": 4,
        "include_usage": True,
        "tool_count": 1,
        "tool_choice": "named",
        "response_format": "json_schema",
        "reasoning_effort": "low",
        "message_count": 1,
        "image_count": 0,
        "audio_count": 0,
        "extra": '{"continuous_usage_stats":true}',
    }


def test_what_is_not_asked_for_has_the_default_of_the_api_or_is_absent() -> None:
    assert chat().columns == {
        "wire_format": "openai.chat",
        "operation": "chat",
        "model_requested": "m",
        "stream": False,
        "n_choices": 1,
        "tool_count": 0,
        "message_count": 1,
        "image_count": 0,
        "audio_count": 0,
    }


def test_usage_not_asked_for_in_a_stream_is_false() -> None:
    assert chat(stream=True).columns["include_usage"] is False


def test_a_completions_request_as_columns() -> None:
    facts = read(
        COMPLETIONS, {"model": "m", "prompt": "a é", "stop": "x", "logprobs": 3, "best_of": 2}
    )
    assert facts.columns == {
        "wire_format": "openai.completions",
        "operation": "text_completion",
        "model_requested": "m",
        "stream": False,
        "n_choices": 1,
        "best_of": 2,
        "stop_count": 1,
        "logprobs": 3,
    }
    assert text_of(facts) == "a é".encode()


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [([1, 2, 3], [1, 2, 3]), ([[1, 2, 3]], [1, 2, 3]), ([], None), ([[1], [2]], None)],
)
def test_a_prompt_of_token_ids(prompt: Any, tokens: list[int] | None) -> None:
    facts = read(COMPLETIONS, {"prompt": prompt})
    assert (facts.prompt and facts.prompt.tokens) == tokens


def test_several_prompts_have_no_single_prefix_and_are_counted() -> None:
    facts = read(COMPLETIONS, {"prompt": ["a", "b", "c"]})
    assert facts.prompt is None
    assert facts.columns["extra"] == '{"prompt_count":3}'
    assert text_of(read(COMPLETIONS, {"prompt": ["a"]})) == b"a"


def test_known_scalars_are_kept_and_of_the_rest_the_size_alone() -> None:
    facts = chat(
        min_p=0.1,
        priority=-2,
        echo=True,
        service_tier="flex",
        verbosity=CANARY,
        user=CANARY,
        metadata={"a": CANARY},
        presence_penalty=CANARY,
        logit_bias=None,
        **{CANARY: 1, "Ω": 22},
    )
    assert json.loads(facts.columns["extra"]) == {
        "min_p": 0.1,
        "priority": -2,
        "echo": True,
        "service_tier": "flex",
        "verbosity": "other",
        "user": {"bytes": len(CANARY) + 2},
        "metadata": {"bytes": len(json.dumps({"a": CANARY}))},
        "presence_penalty": {"bytes": len(CANARY) + 2},
        "other": {"bytes": 3},
    }


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"response_format": {"type": CANARY}}, "other"),
        ({"guided_json": {"a": CANARY}}, "json_schema"),
        ({"guided_regex": CANARY}, "regex"),
        ({"structured_outputs": {"choice": [CANARY]}}, "structured_outputs"),
    ],
)
def test_a_forced_form_is_named_by_its_kind(more: dict[str, Any], name: str) -> None:
    facts = chat(**more)
    assert facts.columns["response_format"] == name
    assert "CANARY" not in repr(facts.columns)


def test_images_and_sounds_are_counted_and_change_the_prompt() -> None:
    def with_parts(*parts: dict[str, Any]) -> RequestFacts:
        return chat(
            messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}, *parts]}]
        )

    image = {"type": "image_url", "image_url": {"url": "data:1"}}
    other = {"type": "image_url", "image_url": {"url": "data:2"}}
    sound = {"type": "input_audio", "input_audio": {"data": "x"}}
    facts = with_parts(image, image, sound)
    assert facts.columns["image_count"] == 2
    assert facts.columns["audio_count"] == 1
    assert text_of(with_parts(image)) != text_of(with_parts(other))
    assert text_of(with_parts()) == text_of(chat())


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant", "tool"]),
            "content": st.one_of(
                st.text(max_size=10),
                st.none(),
                st.lists(
                    st.one_of(
                        st.text(max_size=5).map(lambda t: {"type": "text", "text": t}),
                        st.just({"type": "image_url", "image_url": {"url": "u"}}),
                    ),
                    max_size=3,
                ),
            ),
        },
        optional={"tool_calls": st.just([{"function": {"name": "f", "arguments": "{}"}}])},
    ),
    min_size=1,
    max_size=6,
)


@given(MESSAGES, MESSAGES, st.booleans())
def test_a_longer_conversation_begins_with_the_bytes_of_the_shorter(
    shared: list[Any], more: list[Any], tools: bool
) -> None:
    extra = {"tools": [{"type": "function", "function": {"name": "f"}}]} if tools else {}
    short = text_of(read(CHAT, {"messages": shared} | extra))
    long = text_of(read(CHAT, {"messages": shared + more} | extra))
    assert long.startswith(short)
    assert len(long) > len(short)


def test_tools_come_first_and_a_shared_text_is_shared_into_the_middle_of_a_message() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    a = text_of(
        chat(tools=tools, messages=[{"role": "user", "content": "same beginning, one end"}])
    )
    b = text_of(
        chat(messages=[{"role": "user", "content": "same beginning, another"}], tools=tools)
    )
    assert a.startswith(json.dumps(tools, separators=(",", ":")).encode())
    common = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    assert a[:common].endswith(b"same beginning, ")


def test_escapes_and_white_space_of_the_json_do_not_change_the_prompt() -> None:
    a = b'{"messages":[{"role":"user","content":"\\u00e9"}]}'
    b = '{ "messages": [ {"content": "é", "role": "user"} ] }'.encode()
    assert text_of(read(CHAT, a)) == text_of(read(CHAT, b))


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_an_unreadable_body_gives_what_the_path_tells(body: bytes) -> None:
    facts = read(CHAT, body)
    assert facts.columns == {
        "wire_format": "openai.chat",
        "operation": "chat",
        "parse_status": "error",
    }
    assert facts.prompt is None


def test_an_unknown_path_is_not_read_at_all() -> None:
    facts = read("/v1/files", {"model": CANARY})
    assert facts.columns == {"wire_format": "unknown"}


def test_lone_surrogates_and_nan_are_read_as_servers_read_them() -> None:
    facts = read(
        CHAT, b'{"messages":[{"role":"user","content":"\\ud800"}],"temperature":NaN,"n":2}'
    )
    assert facts.columns["n_choices"] == 2
    assert "temperature" not in facts.columns
    assert text_of(facts).startswith(b"user\x1f\xed\xa0\x80")


def test_tools_that_are_no_clean_json_still_make_a_prompt() -> None:
    body = (
        b'{"messages":[{"role":"assistant","tool_calls":["x",{"function":1}]}],"tools":["\\ud800"]}'
    )
    assert text_of(read(CHAT, body)) == b'["\\ud800"]\x1cassistant\x1f\x1e'


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "tool_calls"]), inner)
    ),
    max_leaves=8,
)
LOAD_KEYS = ["model", "messages", "prompt", "tools", "stream", "stop", "n", "max_tokens", "seed"]
OTHER_KEYS = ["stream_options", "tool_choice", "response_format", "temperature", "logprobs", "x"]
KEYS = st.sampled_from([*LOAD_KEYS, *OTHER_KEYS])


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(KEYS, ANY, max_size=8), st.sampled_from([CHAT, COMPLETIONS]))
def test_no_value_of_a_wrong_type_spoils_the_rest(body: dict[str, Any], path: str) -> None:
    facts = read(path, body | {"ignore_eos": True})
    assert facts.columns["ignore_eos"] is True
    assert "parse_status" not in facts.columns


def test_no_text_of_a_request_is_in_any_column() -> None:
    body = {
        "messages": [{"role": CANARY, "content": CANARY, "name": CANARY}, {"content": [CANARY]}],
        "prompt": CANARY,
        "tools": [{"function": {"name": CANARY, "description": CANARY}}],
        "functions": [CANARY],
        "tool_choice": CANARY,
        "response_format": {"type": CANARY},
        "reasoning_effort": CANARY,
        "stop": [CANARY],
        "stream_options": {CANARY: CANARY},
        "service_tier": CANARY,
        "user": CANARY,
        "metadata": {CANARY: CANARY},
        "suffix": CANARY,
        "seed": CANARY,
        "logprobs": CANARY,
        CANARY: CANARY,
    }
    for path in (CHAT, COMPLETIONS):
        facts = read(path, body)
        assert "CANARY" not in repr(facts.columns)
        assert b"CANARY" in text_of(facts)  # it was there to be found


def test_a_body_of_many_megabytes_is_read_in_little_more_than_twice_its_size() -> None:
    body = json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": "word " * 4_000_000}]}
    )
    data = body.encode()
    tracemalloc.start()
    try:
        facts = wire.read_request("/v1/chat/completions", data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(text_of(facts)) > 20_000_000
    assert peak < 2.3 * len(data)  # the decoded text, and its bytes for the prefix hashes
