"""How a candidate is asked: addresses, bodies, and secrets that nobody sees."""

import json
from typing import Any

import pytest

from tokentape.replay.apis import Endpoint
from tokentape.replay.prompts import Length, PromptSource, TokenIds, Words
from tokentape.replay.targets import Address, Form, Headers, Pinning, redacted
from tokentape.traces.errors import UsageError

KEY = "sk-very-secret-0123456789"


@pytest.mark.parametrize(
    ("to", "base"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("https://api.example.com/openai/v1/", "https://api.example.com/openai/v1"),
        ("http://h/v1/chat/completions", "http://h/v1"),
        ("http://[::1]:80/v1", "http://[::1]:80/v1"),
    ],
)
def test_an_address_is_read_as_people_write_it(to: str, base: str) -> None:
    address = Address.parse(to)
    assert address.base == base
    assert address.url("chat") == base + "/chat/completions"
    assert address.path("completions").endswith("/completions")


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("ftp://h/v1", "unknown URL scheme ftp://"),
        ("localhost:8000", "not a URL"),
        ("http://", "give a host"),
        ("http://h/v1?key=x", "give a host"),
        ("http://h:99999", "host or port cannot be read"),
    ],
)
def test_an_address_that_cannot_be_right_is_refused_in_one_line(to: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        Address.parse(to)
    assert "\n" not in str(caught.value)


ALL = Pinning()


def form(endpoint: Endpoint, *, words: bool = False, pinning: Pinning = ALL) -> Form:
    return Form(endpoint, 'm"1', Words() if words else TokenIds(), Length(), pinning, "")


def body_of(asked: Form, tokens: int, *, stream: bool = True) -> dict[str, Any]:
    draws = PromptSource("t", 0).draws(b"r", 12)
    return dict(json.loads(asked.body(draws, tokens, stream=stream)))


def test_completions_are_asked_with_token_ids_and_a_pinned_length() -> None:
    body = body_of(form("completions"), 7)
    assert len(body.pop("prompt")) == 12
    assert body == {
        "model": 'm"1',
        "max_tokens": 7,
        "min_tokens": 7,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_chat_is_asked_with_one_message_of_words() -> None:
    body = body_of(
        form("chat", words=True, pinning=Pinning("max_completion_tokens", False, False)), 7
    )
    (message,) = body.pop("messages")
    assert message["role"] == "user" and len(message["content"].split()) == 12
    assert body == {
        "model": 'm"1',
        "max_completion_tokens": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_whole_reply_is_asked_without_stream_options() -> None:
    body = body_of(form("completions", words=True), 7, stream=False)
    assert body["stream"] is False and "stream_options" not in body
    assert len(body["prompt"].split()) == 12


@pytest.mark.parametrize("stream", [True, False])
def test_the_columns_of_a_row_say_what_its_body_says(stream: bool) -> None:
    for pinning in (Pinning(), Pinning(min_tokens=False, ignore_eos=False, include_usage=False)):
        asked = form("completions", pinning=pinning)
        body, columns = body_of(asked, 7, stream=stream), asked.columns(7, stream=stream)
        for name in ("max_tokens", "min_tokens", "ignore_eos", "stream"):
            assert columns[name] == body.get(name)
        assert (columns["include_usage"] is True) == ("stream_options" in body)


def test_header_values_and_keys_are_sent_and_shown_nowhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_KEY", KEY + "\n")
    address = Address.parse("http://user:pass%20word@h:1")
    assert "pass" not in repr(address) and "pass" not in address.base
    headers = Headers.gather({"X-Org": KEY}, "SOME_KEY", address.userinfo)
    sent = headers.for_sending()
    assert sent["Authorization"] == f"Bearer {KEY}" and sent["X-Org"] == KEY
    assert KEY not in repr(headers) + str(headers) + repr(vars(headers).keys())
    assert headers.hide(f"bad key {KEY}!") == "bad key [hidden]!"
    basic = Headers.gather({}, None, address.userinfo).for_sending()["Authorization"]
    assert basic == "Basic dXNlcjpwYXNzIHdvcmQ="


def test_no_refusal_repeats_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "canary\ncanary")
    for refused in (
        lambda: Headers.gather({"Authorization: Bearer canary": "="}, None),
        lambda: Headers.gather({}, "KEY"),
        lambda: Address.parse("http://user:can/canary@host"),
    ):
        with pytest.raises(UsageError) as caught:
            refused()
        assert "canary" not in str(caught.value)


def test_a_header_given_twice_in_other_letters_is_sent_once() -> None:
    sent = Headers.gather({"content-type": "text/x", "CONTENT-TYPE": "text/y"}, None).for_sending()
    assert [v for n, v in sent.items() if n.lower() == "content-type"] == ["text/y"]


@pytest.mark.parametrize(
    ("headers", "key_env", "said"),
    [
        ({"a b": "x"}, None, "give NAME=VALUE"),
        ({"": "x"}, None, "give NAME=VALUE"),
        ({"X": "a\x01b"}, None, "control character"),
        ({"X": "a\r\nEvil: 1"}, None, "line break"),
        ({}, "NOT_SET_ANYWHERE", "NOT_SET_ANYWHERE is not set"),
    ],
)
def test_headers_that_cannot_be_sent_are_refused(
    headers: dict[str, str], key_env: str | None, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        Headers.gather(headers, key_env)


def test_a_command_line_is_kept_without_its_secrets() -> None:
    command = ["replay", "t", "--to", f"http://u:{KEY}@h/v1", "--header", f"X={KEY}"]
    command += [f"--header=Y={KEY}", "--key-env", "NAME"]
    kept = redacted(command)
    assert KEY not in " ".join(kept)
    assert kept == [
        *("replay", "t", "--to", "http://[hidden]@h/v1", "--header", "X=[hidden]"),
        *("--header=Y=[hidden]", "--key-env", "NAME"),
    ]
