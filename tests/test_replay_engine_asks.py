"""What a request body asks for, and what is refused."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokentape.replay.engine import tokenizer
from tokentape.replay.engine.asks import Ask, RefusedError, read_ask, read_tokenize
from tokentape.replay.engine.profile import Profile

PROFILE = Profile(max_model_tokens=1_000, natural_output_tokens_mean=50.0)


def plain(**fields: Any) -> Ask:
    body = json.dumps({"prompt": "one two three", **fields}).encode()
    return read_ask(body, chat=False, profile=PROFILE)


def chat(**fields: Any) -> Ask:
    body = {"messages": [{"role": "user", "content": "one two three"}], **fields}
    return read_ask(json.dumps(body).encode(), chat=True, profile=PROFILE)


def output(ask: Ask) -> int:
    return len(ask.tokens) - ask.prompt_tokens


@pytest.mark.parametrize("prompt", ["a b c", ["a b c"], [5, 6, 7], [[5, 6, 7]]])
def test_a_prompt_is_text_or_token_ids_alone_or_in_a_list_of_one(prompt: Any) -> None:
    assert plain(prompt=prompt).prompt_tokens == 3


def test_token_ids_are_the_prompt() -> None:
    assert plain(prompt=[70_000, 0, 9]).tokens[:3] == [70_000, 0, 9]


def test_chat_content_may_be_text_or_parts_and_tool_calls_count_as_words() -> None:
    parts = [{"type": "text", "text": "one two"}, {"type": "text", "text": "three"}]
    assert (
        chat(messages=[{"role": "user", "content": parts}]).tokens == chat(max_tokens=None).tokens
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": "{}"}]}
    assert chat(messages=[call]).prompt_tokens == 2 + len(json.dumps(call["tool_calls"]).split())


@pytest.mark.parametrize("ask", [plain, chat])
def test_an_ignored_end_token_pins_the_length(ask: Any) -> None:
    for wanted in (1, 2, 500):
        got = ask(max_tokens=wanted, ignore_eos=True)
        assert (output(got), got.finish_reason) == (wanted, "length")


def test_max_completion_tokens_goes_before_max_tokens() -> None:
    assert output(chat(max_completion_tokens=5, max_tokens=9, ignore_eos=True)) == 5


def test_without_a_limit_completions_make_16_tokens_and_chat_fills_the_context() -> None:
    assert output(plain(ignore_eos=True)) == 16
    assert output(chat(ignore_eos=True)) == 1_000 - 5


@given(st.integers(1, 900), st.integers(0, 900), st.integers(-(2**63), 2**63 - 1))
def test_a_natural_length_stops_early_with_an_end_token_and_never_under_the_minimum(
    most: int, least: int, seed: int
) -> None:
    least = min(most, least)
    ask = plain(max_tokens=most, min_tokens=least, seed=seed)
    assert least <= output(ask) <= most
    if ask.finish_reason == "stop":
        assert ask.tokens[-1] == tokenizer.END_OF_TEXT
        assert output(ask) > least
    else:
        assert output(ask) == most
        assert tokenizer.END_OF_TEXT not in ask.tokens
    assert plain(max_tokens=most, min_tokens=least, seed=seed) == ask


def test_natural_lengths_have_the_mean_of_the_profile() -> None:
    lengths = [output(plain(max_tokens=900, seed=seed)) for seed in range(2_000)]
    # Standard error 50 / sqrt(2000) = 1.1; seeds are fixed, so this cannot flake.
    assert sum(lengths) / len(lengths) == pytest.approx(50.5, abs=4)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": ""}, "at least one token"),
        ({"prompt": []}, "at least one token"),
        ({"prompt": None}, "at least one token"),
        ({"prompt": ["a", "b"]}, "lists of prompts are not simulated"),
        ({"prompt": [1, "b"]}, "text or a list of token ids"),
        ({"prompt": [-1]}, "must lie in 0.."),
        ({"prompt": [2**31]}, "must lie in 0.."),
        ({"prompt": 7}, "not valid"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0."),
        ({"max_tokens": "x"}, "$.max_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens must lie in 0..max_tokens=5, got 6."),
        ({"max_tokens": 998}, "maximum context length is 1000 tokens"),
        ({"n": 2}, "n must be 1"),
        ({"best_of": 3}, "best_of must be 1"),
        ({"echo": True}, "echo"),
        ({"stream_options": {"include_usage": True}}, "stream=True"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(fields: Any, said: str) -> None:
    with pytest.raises(RefusedError) as caught:
        plain(**fields)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "at least one message"),
        ([{"role": "narrator", "content": "x"}], "Unknown role 'narrator'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "'image_url' is not simulated"),
        ("hello", "not valid"),
    ],
)
def test_chats_that_cannot_be_served_are_refused(messages: Any, said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        chat(messages=messages)


@given(st.binary())
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    for is_chat in (True, False):
        with pytest.raises(RefusedError):
            read_ask(body, chat=is_chat, profile=PROFILE)


def test_tokenize_counts_as_the_requests_do() -> None:
    messages = [{"role": "user", "content": "one two three"}]
    ask = chat(ignore_eos=True)
    asked = ask.tokens[: ask.prompt_tokens]
    assert read_tokenize(json.dumps({"messages": messages}).encode()) == asked
    bare = json.dumps({"messages": messages, "add_generation_prompt": False}).encode()
    assert read_tokenize(bare) == asked[:-1]
    assert read_tokenize(b'{"prompt": "one two three"}') == tokenizer.encode("one two three")
