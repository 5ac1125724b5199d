"""SGLang's own /generate: requests, and replies whose text and counts run through the stream.

Each message repeats all text so far, unless the server was told to send what is new; which of the
two shows in the lengths. Its completion_tokens, told with every message, give exact tokens per
event. Only lengths and a hash of the last text are kept, and the hash never leaves the process.
Source: SGLang, `managers/tokenizer_manager_components` (what each message repeats, and the option
`incremental_streaming_output`) and `srt/observability/req_time_stats.py` (times, which it tells
with its metrics enabled only).
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
from tokentape.traces.wire.reply import Facts, Framing
from tokentape.traces.wire.request import Prompt, RequestFacts
from tokentape.traces.wire.request_body import (
    I16,
    I64,
    Body,
    Reading,
    columns_of,
    extra_json,
    few,
    known,
    session_of,
    utf8,
)

_MOST_CHOICES: Final = 255
_READING: Final = Reading(
    values={
        "stream": ("stream", untrusted.truth),
        "n_choices": ("n", lambda v: untrusted.whole_number(v, I16, 1)),
        "max_tokens": ("max_new_tokens", untrusted.whole_number),
        "min_tokens": ("min_new_tokens", untrusted.whole_number),
        "ignore_eos": ("ignore_eos", untrusted.truth),
        "temperature": ("temperature", untrusted.real_number),
        "top_p": ("top_p", untrusted.real_number),
        "top_k": ("top_k", lambda v: untrusted.whole_number(v, least=-1)),
        "sampling_seed": ("sampling_seed", lambda v: untrusted.whole_number(v, I64, -I64)),
    },
    told=frozenset(("text", "input_ids", "stop")),
    scalars=frozenset(
        (
            *("frequency_penalty", "presence_penalty", "repetition_penalty", "min_p"),
            *("return_logprob", "top_logprobs_num", "skip_special_tokens", "no_stop_trim"),
        )
    ),
)
_GUIDED: Final = {"json_schema": "json_schema", "regex": "regex", "ebnf": "grammar"}


def read_generate(data: bytes | bytearray) -> RequestFacts:
    """Facts of a request; other servers' /generate are told by their keys, and not read.

    Raises: anything, where the body is no JSON object.
    """
    body = Body(data)
    if not body.raw.keys() & {"text", "input_ids", "input_embeds"}:
        return RequestFacts({"wire_format": "unknown"})
    body.lift("sampling_params")
    columns = columns_of(body, _READING)
    stop = body.get("stop")
    if isinstance(stop, str | list):
        columns["stop_count"] = 1 if isinstance(stop, str) else few(len(stop))
    columns["response_format"] = next(
        (form for key, form in _GUIDED.items() if body.get(key) is not None), None
    )
    text, ids = body.get("text"), body.get("input_ids")
    batch = text if isinstance(text, list) else ids if _is_batch(ids) else ()
    extra = {"prompt_count": len(batch)} if len(batch) > 1 else {}
    columns["extra"] = extra_json(body, _READING, extra)
    facts = RequestFacts(known(columns), session=session_of(body))
    if isinstance(text, str):
        facts.prompt = Prompt(text=b"".join(utf8(text)))
    elif isinstance(ids, list) and ids and all(type(item) is int for item in ids):
        facts.prompt = Prompt(tokens=ids)
    return facts


def _is_batch(ids: Any) -> bool:
    return isinstance(ids, list) and any(isinstance(item, list) for item in ids)


class Stream(CountingStream):
    """A streamed reply; `_told` are the numbers of meta_info, by choice."""

    def __init__(self, http_status: int, framing: Framing) -> None:
        super().__init__(http_status, framing)
        self._texts: dict[int, tuple[int, int]] = {}  # size and hash of the last text, by choice
        self._only_new = False  # texts are not repeated

    def _times(self, told: dict[str, Any]) -> None:
        _times(self.facts, told)

    def _sum(self, told: list[dict[str, Any]]) -> dict[str, int]:
        return _counts(told)

    def _object(self, name: bytes, value: dict[str, Any]) -> None:
        meta = value.get("meta_info")
        if value.get("error") or not isinstance(meta, dict):
            if not value.get("error"):
                raise ValueError("no message of a reply")
            self._error(value["error"])
            return
        index = untrusted.whole_number(value.get("index"), _MOST_CHOICES) or 0
        name_reply(self.facts, None, meta.get("id"))
        self._told[index] = self._told.get(index, {}) | untrusted.numbers_only(meta, 1)
        reason = _finish(self.facts, index, meta)
        if self.facts.error:
            self.events.aux(schema.ERROR)
            return
        count = untrusted.whole_number(meta.get("completion_tokens"))
        count = -1 if count is None else count
        new_bytes = self._new_bytes(index, value.get("text"))
        if new_bytes:
            self.events.event(schema.TEXT, new_bytes, index, -1, count)
        else:
            self.events.empty(index, reason is not None, over=False, count=count)

    def _new_bytes(self, index: int, text: Any) -> int:
        """Bytes of a text that are new; what shrinks was not repeated."""
        size = untrusted.size(text)
        before, known = self._texts.get(index, (0, 0))
        mark = hash(text) if size else 0
        self._texts[index] = (size, mark)
        self._only_new = self._only_new or size < before
        if self._only_new or (size == before and known and mark != known):
            return size
        return size - before

    def _more(self) -> list[Any]:
        sizes = [[index, size] for index, (size, _) in self._texts.items()]
        return [*super()._more(), sizes, self._only_new]

    def _resume(self, more: list[Any]) -> None:
        super()._resume(more)
        self._texts = {index: (size, 0) for index, size in more[5]}
        self._only_new = more[6]


class Whole(ObjectWhole):
    """A whole reply, or one for each prompt or choice."""

    def _body(self, data: bytes) -> bool:
        value = untrusted.decode_any(data)
        if isinstance(value, list):
            return self._items(untrusted.objects(value)[:_MOST_CHOICES])
        return super()._body(data)

    def _object(self, value: dict[str, Any]) -> bool:
        return self._items([value])

    def _items(self, items: list[dict[str, Any]]) -> bool:
        told = [item["meta_info"] for item in items if isinstance(item.get("meta_info"), dict)]
        for index, meta in enumerate(told):
            name_reply(self.facts, None, meta.get("id"))
            _finish(self.facts, index, meta)
            _times(self.facts, meta)
            take_usage(self.facts, untrusted.numbers_only(meta, 1), _counts(told))
        return bool(told)


def _finish(facts: Facts, index: int, meta: dict[str, Any]) -> str | None:
    """Note why a choice ended; an abort of the server is an error."""
    told = meta.get("finish_reason")
    reason = untrusted.reason(told.get("type") if isinstance(told, dict) else told)
    facts.finish[index] = reason or facts.finish.get(index)
    if reason == "abort":
        facts.error, facts.error_type = (
            True,
            untrusted.error_type({"type": untrusted.at(told, "err_type")}),
        )
    return reason


def _times(facts: Facts, meta: dict[str, Any]) -> None:
    take_times(facts, "meta_info", server_queue_ns=scaled_ns(meta.get("queue_time"), 1e9))


def _counts(told: list[dict[str, Any]]) -> dict[str, int]:
    """Output tokens of all choices; the prompt's only where there is one choice.

    With several it is not told whether they share a prompt.
    """
    places = {"output_tokens": ("completion_tokens",), "reasoning_tokens": ("reasoning_tokens",)}
    if len(told) == 1:
        places |= {"input_tokens": ("prompt_tokens",), "cached_tokens": ("cached_tokens",)}
    each = [untrusted.counts(meta, places) for meta in told]
    if not each or any("output_tokens" not in found for found in each):
        return {}
    output = sum(found["output_tokens"] for found in each)
    counted = each[0] | {"output_tokens": min(output, untrusted.I32_MAX)}
    if all("reasoning_tokens" in found for found in each):
        counted["reasoning_tokens"] = sum(found["reasoning_tokens"] for found in each)
    return counted
