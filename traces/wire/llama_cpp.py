"""llama.cpp's own /completion: requests, and replies with the server's timings.

Each message tells the tokens so far, which gives exact tokens per event; the last one has no text,
echoes the prompt (which is not kept) and has the timings: cache_n of them are cached prompt tokens,
while its `tokens_cached` counts what lies in the slot and is no such thing. Source: tools/server of
llama.cpp (README, server-task.cpp). Its /v1 paths are OpenAI's.
"""

from typing import Any, Final

from tokentape.traces import schema
from tokentape.traces.wire import untrusted
from tokentape.traces.wire.objects import (
    CountingStream,
    ObjectWhole,
    name_reply,
    scaled_ns,
    take_times,
    take_usage,
)
from tokentape.traces.wire.reply import Facts
from tokentape.traces.wire.request import Prompt, RequestFacts
from tokentape.traces.wire.request_body import (
    I64,
    Body,
    Reading,
    columns_of,
    extra_json,
    few,
    known,
    utf8,
)

_MOST_CHOICES: Final = 255
_KEPT: Final = ("tokens_predicted", "tokens_evaluated", "tokens_cached", "timings")
_READING: Final = Reading(
    values={
        "stream": ("stream", untrusted.truth),
        "max_tokens": ("n_predict", untrusted.whole_number),  # below 0: as many as fit
        "ignore_eos": ("ignore_eos", untrusted.truth),
        "temperature": ("temperature", untrusted.real_number),
        "top_p": ("top_p", untrusted.real_number),
        "top_k": ("top_k", untrusted.whole_number),
        "sampling_seed": ("seed", lambda v: untrusted.whole_number(v, I64, -I64)),
    },
    told=frozenset(("prompt", "stop", "grammar", "json_schema")),
    scalars=frozenset(
        (
            *("cache_prompt", "id_slot", "n_keep", "n_probs", "n_discard", "min_p", "typical_p"),
            *("repeat_penalty", "repeat_last_n", "presence_penalty", "frequency_penalty"),
            *("mirostat", "t_max_predict_ms", "timings_per_token", "return_tokens"),
        )
    ),
)


def read_completion(data: bytes | bytearray) -> RequestFacts:
    """Facts of a request. Raises: anything, where the body is no JSON object."""
    body = Body(data)
    columns = columns_of(body, _READING)
    stop, prompt = body.get("stop"), body.get("prompt")
    columns["stop_count"] = few(len(stop)) if isinstance(stop, list) else None
    if body.get("json_schema") is not None:
        columns["response_format"] = "json_schema"
    elif body.get("grammar"):
        columns["response_format"] = "grammar"
    several = isinstance(prompt, list) and not all(type(item) is int for item in prompt)
    # A list that mixes text with tokens is one prompt of which no prefix is known.
    batch = several and all(isinstance(item, str | list) for item in prompt)
    extra = {"prompt_count": len(prompt)} if batch and len(prompt) > 1 else {}
    columns["extra"] = extra_json(body, _READING, extra)
    if isinstance(prompt, str) and prompt:
        return RequestFacts(known(columns), Prompt(text=b"".join(utf8(prompt))))
    if isinstance(prompt, list) and prompt and not several:
        return RequestFacts(known(columns), Prompt(tokens=prompt))
    return RequestFacts(known(columns))


class Stream(CountingStream):
    """A streamed reply; `_told` is by prompt."""

    def _times(self, told: dict[str, Any]) -> None:
        _times(self.facts, told)

    def _sum(self, told: list[dict[str, Any]]) -> dict[str, int]:
        return _counts(told)

    def _object(self, name: bytes, value: dict[str, Any]) -> None:
        if error := value.get("error"):
            self._error(error)
            return
        if "prompt_progress" in value and not value.get("content"):
            self.events.aux(schema.PING)  # how far the prefill is
            return
        if not isinstance(value.get("content"), str):
            raise TypeError("no message of a reply")
        index = untrusted.whole_number(value.get("index"), _MOST_CHOICES) or 0
        over = self.facts.finish.get(index) is not None
        self._told[index] = self._told.get(index, {}) | _numbers(value)
        end = _take_end(self.facts, index, value)
        size = untrusted.size(value["content"])
        count = untrusted.whole_number(value.get("tokens_predicted"))
        count = -1 if count is None else count
        if size:
            self.events.event(schema.TEXT, size, index, -1, count)
        else:
            self.events.empty(index, end, over, count=count)


class Whole(ObjectWhole):
    """A whole reply, one for each prompt, or an error body."""

    def _body(self, data: bytes) -> bool:
        value = untrusted.decode_any(data)
        if isinstance(value, list):
            return self._items(untrusted.objects(value)[:_MOST_CHOICES])
        return super()._body(data)

    def _object(self, value: dict[str, Any]) -> bool:
        return self._items([value])

    def _items(self, items: list[dict[str, Any]]) -> bool:
        items = [item for item in items if isinstance(item.get("content"), str)]
        told = [_numbers(item) for item in items]
        for index, (item, numbers) in enumerate(zip(items, told, strict=True)):
            _take_end(self.facts, index, item)
            _times(self.facts, numbers)
            take_usage(self.facts, numbers, _counts(told))
        return bool(items)


def _numbers(value: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a message: counts and timings."""
    return untrusted.numbers_only({key: value[key] for key in _KEPT if key in value}, 2)


def _take_end(facts: Facts, index: int, value: dict[str, Any]) -> bool:
    """Note model and reason where this is the end."""
    if value.get("stop") is not True:
        facts.finish.setdefault(index, None)
        return False
    name_reply(facts, value.get("model"), None)
    facts.finish[index] = untrusted.reason(value.get("stop_type")) or _old_reason(value)
    return True


def _old_reason(value: dict[str, Any]) -> str:
    """Before `stop_type` there was a flag for each reason."""
    flags = {"stopped_eos": "eos", "stopped_limit": "limit", "stopped_word": "word"}
    return next((reason for flag, reason in flags.items() if value.get(flag) is True), "stop")


def _times(facts: Facts, told: dict[str, Any]) -> None:
    take_times(
        facts,
        "timings",
        server_prefill_ns=scaled_ns(untrusted.at(told, "timings", "prompt_ms"), 1e6),
        server_decode_ns=scaled_ns(untrusted.at(told, "timings", "predicted_ms"), 1e6),
    )


def _counts(told: list[dict[str, Any]]) -> dict[str, int]:
    """Tokens of all prompts; cached ones are known from the timings only."""
    places = {
        "input_tokens": ("tokens_evaluated",),
        "output_tokens": ("tokens_predicted",),
        "cached_tokens": ("timings", "cache_n"),
    }
    each = [untrusted.counts(numbers, places) for numbers in told]
    shared = set(each[0]).intersection(*each) if each else set()
    return {name: min(sum(e[name] for e in each), untrusted.I32_MAX) for name in shared}
