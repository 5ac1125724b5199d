"""Replies are worded as a recorded vLLM words them, byte for byte where nothing was random."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tokentape.replay.engine import tokenizer
from tokentape.replay.engine.asks import Ask
from tokentape.replay.engine.batching import Sequence
from tokentape.replay.engine.replies import Reply, event, timing_metrics

RECORDED = Path(__file__).parent / ".." / ".." / "shared" / "data" / "vllm-h100" / "low.jsonl.gz"


def recorded_messages(path: str) -> list[bytes]:
    """The SSE messages of the first recorded request of a path."""
    if not RECORDED.exists():
        pytest.skip("no recordings of a real vLLM beside this checkout")
    with gzip.open(RECORDED, "rt") as lines:
        request = next(r for r in map(json.loads, lines) if r["url"] == path)
    return [text.encode("latin-1") for _, text in request["chunks"] if text]


def told(message: bytes) -> dict[str, Any]:
    value = json.loads(message.removeprefix(b"data: "))
    assert isinstance(value, dict)
    return value


def with_words_of(message: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Our message with the recorded id, time and text, which are all that may differ."""
    ours = ours | {"id": message["id"], "created": message["created"]}
    for mine, theirs in zip(ours["choices"], message["choices"], strict=True):
        if "delta" in theirs:
            mine["delta"]["content"] = theirs["delta"]["content"]
        else:
            mine["text"] = theirs["text"]
    return ours


def make(
    tokens: list[int],
    prompt_tokens: int,
    *,
    chat: bool = True,
    model: str = "m",
    reason: str = "length",
    verbose: bool = False,
) -> tuple[Reply, Sequence]:
    """A reply and its sequence; `verbose` asks for usage and token ids with each token."""
    ask = Ask(
        chat=chat,
        model=model,
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        finish_reason=reason,
        stream=True,
        include_usage=True,
        continuous_usage=verbose,
        return_token_ids=verbose,
    )
    return Reply(ask, "0", 0, with_metrics=False), ask.sequence(0)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_every_message_of_a_stream_has_the_fields_of_a_recorded_one_in_their_order(
    path: str,
) -> None:
    recorded = recorded_messages(path)
    usage = told(recorded[-2])["usage"]
    tokens = [0] * (usage["prompt_tokens"] + usage["completion_tokens"])
    chat = path.endswith("chat/completions")
    reply, sequence = make(tokens, usage["prompt_tokens"], chat=chat)
    sequence.made = 1
    ours = [*reply.first(sequence), reply.token(sequence)]
    for _ in range(usage["completion_tokens"] - 1):
        sequence.made += 1
        ours.append(reply.token(sequence))
    ours += reply.last(sequence)
    assert len(ours) == len(recorded)
    assert ours[-1] == recorded[-1]
    for mine, theirs in zip(ours[:-2], recorded[:-2], strict=True):
        assert event(with_words_of(told(theirs), told(mine))) == theirs
    end, recorded_end = told(ours[-2]), told(recorded[-2])
    assert end["usage"].pop("prompt_tokens_details") == {"cached_tokens": 0}
    assert end["usage"] == recorded_end["usage"]
    assert list(end) == [key for key in recorded_end if key != "system_fingerprint"]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("model", ["m", '" babal"', "\0", "modèle\\u0000"])
def test_the_fast_form_of_an_event_is_the_slow_one(chat: bool, model: str) -> None:
    reply, sequence = make([7, 8, 9, 10], 1, chat=chat, model=model)
    sequence.made = 2
    assert reply.between is not None
    text = json.dumps(tokenizer.decode([9])).encode()
    assert text.join(reply.between) == reply.token(sequence)


@pytest.mark.parametrize("chat", [True, False])
def test_usage_and_token_ids_are_told_with_each_token_when_asked_for(chat: bool) -> None:
    reply, sequence = make([7, 8, 9, 10], 2, chat=chat, verbose=True)
    assert reply.between is None
    sequence.made = 1
    messages = [told(m) for m in [*reply.first(sequence), reply.token(sequence)]]
    sequence.made = 2
    messages.append(told(reply.token(sequence)))
    made = [m["usage"]["completion_tokens"] for m in messages]
    assert made == ([0, 1, 2] if chat else [1, 2])
    assert [m["choices"][0].get("token_ids") for m in messages][-2:] == [[9], [10]]
    prompt_ids = messages[0] if chat else messages[0]["choices"][0]
    assert prompt_ids["prompt_token_ids"] == [7, 8]


def test_an_end_token_is_an_event_with_empty_text() -> None:
    reply, sequence = make([1, 2, tokenizer.END_OF_TEXT], 1, reason="stop")
    sequence.made = 2
    choice = told(reply.token(sequence))["choices"][0]
    assert (choice["delta"]["content"], choice["finish_reason"]) == ("", "stop")


def test_times_of_a_request_are_told_as_vllm_defines_them() -> None:
    sequence = Sequence([1, 2, 3, 4], 1, arrived_ns=0, queued_ns=1_000_000)
    sequence.admitted_ns, sequence.first_token_ns, sequence.last_token_ns = (
        3_000_000,
        8_000_000,
        18_000_000,
    )
    sequence.made = 3
    assert timing_metrics(sequence) == {
        "time_to_first_token_ms": 5.0,
        "generation_time_ms": 10.0,
        "queue_time_ms": 2.0,
        "mean_itl_ms": 5.0,
        "tokens_per_second": pytest.approx(3 / 0.015),
    }
    sequence.made = 1
    assert timing_metrics(sequence)["mean_itl_ms"] is None
