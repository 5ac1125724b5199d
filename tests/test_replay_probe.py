"""The ladder: what a candidate takes is found out once, and each rung is said."""

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from replay_server import Script, Seen, Server, Step, engine_like, plain, serve, streamed
from tokentape.replay.apis import Endpoint
from tokentape.replay.probe import find_target
from tokentape.replay.prompts import WORDS, Length, TokenIds, Words
from tokentape.replay.prose import WORDS_OF, Prose
from tokentape.replay.targets import Address, Headers, Pinning, Target
from tokentape.replay.tokenizer_file import TokenizerFile
from tokentape.traces.errors import TokentapeError, UsageError

KEY = "sk-very-secret-0123456789"


def probe(
    script: Script,
    *endpoints: Endpoint,
    model: str | None = "m",
    headers: dict[str, str] | None = None,
    **how: Any,
) -> tuple[Target, Server]:
    with serve(script) as server:
        address = Address.parse(server.url)
        found = find_target(address, Headers(headers or {}), model, endpoints, **how)
        return asyncio.run(found), server


def refusing(*names: str) -> Script:
    """A server that answers 400 to a body that holds one of these keys, as OpenAI's does."""

    def script(seen: Seen) -> Sequence[Step]:
        for name in names:
            if name in seen.json:
                return plain(400, {"error": {"message": f"Unrecognized argument: {name}"}})
        return streamed(seen, extra_prompt_tokens=9)

    return script


def words(seen: Seen) -> int:
    chat = seen.path.endswith("chat/completions")
    return len(seen.json["messages"][0]["content"].split()) if chat else 0


def test_a_candidate_that_takes_everything_gets_token_ids_and_a_pinned_length() -> None:
    target, server = probe(engine_like, "completions", "chat", model=None)
    assert target.model == "m"
    completions = target.forms["completions"]
    assert isinstance(completions.writing, TokenIds)
    assert completions.pinning == Pinning() and completions.pinning.exact
    assert completions.length == Length(0, 1) and "lengths are exact" in completions.rung
    assert all(s.json["max_tokens"] == 1 for s in server.seen if s.path.endswith("completions"))


def test_the_template_of_chat_is_measured_once_and_taken_into_account() -> None:
    target, _ = probe(refusing(), "chat")
    chat = target.forms["chat"]
    assert isinstance(chat.writing, Words)
    assert chat.length == Length(9, 1) and chat.length.units(100) == 91
    assert "9 of the template by usage" in chat.rung


def test_vllms_tokenize_is_asked_before_usage() -> None:
    def script(seen: Seen) -> Sequence[Step]:
        if seen.path == "/tokenize":
            assert set(seen.json) == {"model", "messages"}
            return plain(200, {"count": 9 + len(seen.json["messages"][0]["content"].split())})
        return streamed(seen, extra_prompt_tokens=9)

    target, server = probe(script, "chat")
    assert target.forms["chat"].rung.endswith("by /tokenize: lengths are exact")
    assert [s.path for s in server.seen].count("/v1/chat/completions") == 1


@pytest.mark.parametrize(
    ("refused", "pinning"),
    [
        (["min_tokens"], Pinning(min_tokens=False)),
        (["min_tokens", "ignore_eos"], Pinning(min_tokens=False, ignore_eos=False)),
        (
            ["min_tokens", "ignore_eos", "max_tokens"],
            Pinning("max_completion_tokens", min_tokens=False, ignore_eos=False),
        ),
        (
            ["min_tokens", "ignore_eos", "stream_options"],
            Pinning(min_tokens=False, ignore_eos=False, include_usage=False),
        ),
    ],
)
def test_each_refused_argument_is_dropped_and_said(refused: list[str], pinning: Pinning) -> None:
    target, _ = probe(refusing(*refused), "chat")
    assert target.forms["chat"].pinning == pinning
    if not pinning.exact:
        assert "may stop earlier" in str(pinning)


def test_a_candidate_that_takes_no_token_ids_gets_words() -> None:
    def script(seen: Seen) -> Sequence[Step]:
        ids = isinstance(seen.json.get("prompt"), list)
        return plain(400, {"error": "prompt must be text"}) if ids else streamed(seen)

    target, _ = probe(script, "completions")
    form = target.forms["completions"]
    assert isinstance(form.writing, Words) and form.length == Length(0, 1)


def test_a_tokenizer_that_splits_words_gives_lengths_that_are_about_right_and_says_so() -> None:
    def script(seen: Seen) -> Sequence[Step]:
        return streamed(seen, extra_prompt_tokens=words(seen))

    target, _ = probe(script, "chat")
    form = target.forms["chat"]
    assert form.length == Length(0, 2) and "about right" in form.rung


def test_a_usage_that_ignores_the_prompt_is_not_believed() -> None:
    def script(seen: Seen) -> Sequence[Step]:
        return streamed(seen, extra_prompt_tokens=16 - words(seen))

    target, _ = probe(script, "chat")
    assert target.forms["chat"].length == Length() and "not verified" in target.forms["chat"].rung


def test_a_tokenize_page_that_disagrees_with_usage_is_said_and_usage_is_believed() -> None:
    def script(seen: Seen) -> Sequence[Step]:
        if seen.path == "/tokenize":
            return plain(200, {"count": len(seen.json["messages"][0]["content"].split())})
        return streamed(seen, extra_prompt_tokens=9)

    target, _ = probe(script, "chat")
    assert target.forms["chat"].length == Length(9, 1)
    assert target.notes == (
        "/tokenize counts 8 tokens where usage counts 17 on chat: usage is believed",
    )


def test_text_is_asked_of_an_api_that_takes_token_ids_too_and_the_plan_says_so() -> None:
    target, server = probe(engine_like, "completions", prose=True)
    form = target.forms["completions"]
    assert isinstance(form.writing, Prose) and form.length == Length(0, 1)
    assert form.rung == "words of text-like sentences, one token each by usage: lengths are exact"
    prompts = [s.json["prompt"] for s in server.seen if s.path.endswith("completions")]
    assert prompts and all(p.split()[0] in WORDS_OF["which"] for p in prompts)


def word_level(path: Path, words: Sequence[str]) -> TokenizerFile:
    """A tokenizer file that knows these words; others are two tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = {p for w in WORDS for p in (w[:2], "##" + w[2:])} | {"the", *words}
    vocabulary = {piece: n for n, piece in enumerate(["[UNK]", *sorted(pieces)])}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(path))
    return TokenizerFile(path)


def test_a_tokenizer_file_chooses_words_of_one_token_and_is_silent_where_it_agrees(
    tmp_path: Path,
) -> None:
    file = word_level(tmp_path / "t.json", WORDS[:40])
    target, server = probe(refusing(), "chat", "completions", tokenizer=file)
    assert target.notes == () and target.forms["chat"].length == Length(9, 1)
    said = " ".join(s.json["messages"][0]["content"] for s in server.seen if words(s))
    assert set(said.split()) <= set(WORDS[:40])
    ids = target.forms["completions"].writing
    assert isinstance(ids, TokenIds) and ids.high == file.tokens - 1


def test_a_tokenizer_file_that_disagrees_with_the_candidate_is_said(tmp_path: Path) -> None:
    file = word_level(tmp_path / "t.json", [])
    target, _ = probe(refusing(), "chat", tokenizer=file)
    assert target.forms["chat"].length == Length(9, 1)
    (note,) = target.notes
    assert "32 words are 64 tokens by the file and 32 by the candidate, which is believed" in note


def test_a_tokenizer_file_counts_where_the_candidate_does_not(tmp_path: Path) -> None:
    def script(seen: Seen) -> Sequence[Step]:
        return streamed(seen, extra_prompt_tokens=16 - words(seen))  # always 16

    file = word_level(tmp_path / "t.json", WORDS[:20])  # too few: all words are used
    target, _ = probe(script, "chat", tokenizer=file)
    form = target.forms["chat"]
    assert 1 < form.length.per_unit <= 2 and not form.counted
    assert "by the tokenizer file alone" in form.rung


@pytest.mark.parametrize(
    ("field", "value", "forced"),
    [
        ("response_format", {"type": "json_object"}, True),
        ("response_format", {"type": "text"}, False),
        ("guided_regex", "[ab]+", True),
        ("tool_choice", "required", True),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}, True),
        ("tool_choice", "auto", False),
        ("priority", 3, False),
    ],
)
def test_an_output_that_is_forced_into_a_form_may_end_where_the_form_does(
    field: str, value: Any, *, forced: bool
) -> None:
    target, server = probe(refusing(), "chat", more={field: value})
    asked = [s.json for s in server.seen if s.path.endswith("completions")]
    assert asked and all(a[field] == value for a in asked)
    assert all(("ignore_eos" in a) is not forced for a in asked)
    assert target.forms["chat"].pinning == Pinning(ignore_eos=not forced)
    assert bool(target.notes) is forced
    if forced:
        assert f"--body {field} forces a form on the output" in target.notes[0]


@pytest.mark.parametrize("content", ["", "{}", None])
def test_a_file_that_is_no_tokenizer_is_one_line(tmp_path: Path, content: str | None) -> None:
    pytest.importorskip("tokenizers")
    path = tmp_path / "t.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=r"--tokenizer .*t.json: not a tokenizer.json \(.+\)$"):
        TokenizerFile(path)


@pytest.mark.parametrize(
    ("status", "model", "said"),
    [
        (401, "m", r"/v1/chat/completions answers 401: give --key-env"),
        (403, None, r"/v1/models answers 403: give --key-env"),
        (404, None, r"/v1/models answers 404: name the model with --model"),
        (404, "m", r"answers 404 \(The model does not exist\): check --to and --model"),
        (500, "m", r"answers 500: The model does not exist"),
        (400, "m", r"answers 400: The model does not exist"),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(
    status: int, model: str | None, said: str
) -> None:
    reply = plain(status, {"error": {"message": "The model\ndoes not exist"}})
    with pytest.raises(TokentapeError, match=said) as caught:
        probe(lambda _: reply, "chat", model=model)
    assert "\n" not in str(caught.value)


def test_a_key_that_the_server_repeats_is_hidden() -> None:
    reply = plain(500, {"error": {"message": f"no such key: {KEY}"}})
    with pytest.raises(TokentapeError, match=r"no such key: \[hidden\]"):
        probe(lambda _: reply, "chat", headers={"Authorization": f"Bearer {KEY}"})
    with pytest.raises(TokentapeError, match="the given credential is refused"):
        probe(lambda _: plain(401, {}), "chat", headers={"Authorization": f"Bearer {KEY}"})


def test_a_dead_candidate_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    address = Address.parse(f"http://127.0.0.1:{port}")
    with pytest.raises(
        TokentapeError, match=f"127.0.0.1:{port}/v1/models: nothing answers"
    ) as caught:
        asyncio.run(find_target(address, Headers({}), None, ["chat"]))
    assert "\n" not in str(caught.value)


def test_a_model_that_the_candidate_does_not_list_is_said() -> None:
    assert probe(engine_like, "chat", model="m")[0].notes == ()
    target, _ = probe(engine_like, "chat", model="n")
    assert target.model == "n"  # a gateway may know it all the same
    assert target.notes == ("--model n: the candidate lists m, and not that one",)


def test_several_models_are_said() -> None:
    def script(seen: Seen) -> Sequence[Step]:
        models = {"data": [{"id": "one", "max_model_len": 4096}, {"id": "two"}]}
        return plain(200, models) if seen.path.endswith("/models") else engine_like(seen)

    target, _ = probe(script, "completions", model=None)
    assert target.model == "one" and "2 models" in target.notes[0]
    assert target.max_model_tokens == 4096
    target, _ = probe(script, "completions", model="two")
    assert target.model == "two" and target.max_model_tokens is None
