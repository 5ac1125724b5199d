"""Replies of OpenAI's chat and completions, streamed and whole, as its many servers send them.

Reads the extras of vLLM (token ids, usage on every chunk, timing `metrics`), `reasoning` under its
two names, tool calls, refusals, and errors under status 200. Only the fields named here are ever
decoded. Text is measured and forgotten.
"""

import json
from typing import Any

import msgspec

from tokentape.traces import schema
from tokentape.traces.wire import untrusted
from tokentape.traces.wire.reply import Facts, Framing, StreamParser, WholeParser

_ABSENT = msgspec.Raw()
_NULL_SIZE = 4  # a value of JSON that is longer than `null` is one to look at

# gc=False: they live for one message and hold no cycles, so the collector need not see them.


class _Call(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None
    input: str | None = None  # of a custom tool


class _ToolCall(msgspec.Struct, gc=False):
    function: _Call | None = None
    custom: _Call | None = None


class _Delta(msgspec.Struct, gc=False):
    role: str | None = None
    content: str | list[Any] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None
    function_call: _Call | None = None


class _Choice(msgspec.Struct, gc=False):
    index: int = 0
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class _Chunk(msgspec.Struct, gc=False):
    id: str | None = None
    model: str | None = None
    choices: list[_Choice] | None = None
    usage: msgspec.Raw = _ABSENT  # may come with every chunk, is read in full once
    metrics: msgspec.Raw = _ABSENT
    timings: msgspec.Raw = _ABSENT  # llama.cpp's metrics
    error: msgspec.Raw = _ABSENT
    prompt_token_ids: list[int] | None = None


class _Count(msgspec.Struct, gc=False):
    completion_tokens: int = -1


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_count = msgspec.json.Decoder(_Count).decode


def _read_chunk(data: bytes) -> _Chunk:
    try:
        return _decode_chunk(data)
    except (msgspec.DecodeError, ValueError):  # ValueError: bad UTF-8
        return _loosely(_Chunk, untrusted.decode_any(data))


class Stream(StreamParser):
    """A streamed reply of chat or completions."""

    def __init__(self, http_status: int, framing: Framing) -> None:
        super().__init__(http_status, framing)
        self._roles: set[int] = set()  # choices whose role has come
        self._usage = self._metrics = _ABSENT  # the last ones

    def _message(self, name: bytes, data: bytes) -> None:
        if (name or len(data) < 16) and self._mark(name, data.strip()):
            return
        if name == b"error":
            self._error(_error_object(data))
            return
        chunk = _read_chunk(data)
        if self.facts.model is None:
            _identity(self.facts, chunk)
        if chunk.error is not _ABSENT and len(chunk.error) > _NULL_SIZE:
            self._error(_value(chunk.error))
            return
        choices, count = chunk.choices, -1
        if chunk.usage is not _ABSENT and len(chunk.usage) > _NULL_SIZE:
            count = self._usage_so_far(chunk.usage, bool(choices))
        if told := chunk.metrics or chunk.timings:
            self._metrics = told
        for choice in choices or ():
            self._choice(choice, count)
        if choices:
            return
        if len(chunk.usage) > _NULL_SIZE:
            self.events.aux(schema.USAGE)
        else:
            self._without_choices(data)

    def _conclude(self) -> None:
        _usage(self.facts, _value(self._usage), _value(self._metrics))

    def _more(self) -> list[Any]:
        facts = self.facts
        return [
            sorted(self._roles),
            untrusted.numbers_only(_value(self._usage)),
            untrusted.numbers_only(_value(self._metrics)),
            facts.usage_is_whole,
            facts.error_type if facts.error else None,
        ]

    def _resume(self, more: list[Any]) -> None:
        facts = self.facts
        roles, usage, metrics, facts.usage_is_whole, facts.error_type = more
        self._roles, facts.error = set(roles), facts.error_type is not None
        self._usage = _raw(usage) if usage else _ABSENT
        self._metrics = _raw(metrics) if metrics else _ABSENT

    def _usage_so_far(self, usage: msgspec.Raw, with_choices: bool) -> int:
        """Keeps the usage, since the last one counts; its output tokens, -1 where not told."""
        try:
            count = _decode_count(usage).completion_tokens
        except (msgspec.DecodeError, ValueError):
            value = _value(usage)
            if not isinstance(value, dict):
                return -1
            count = _counts(value).get("output_tokens", -1)
        self._usage = usage
        self.facts.usage_is_whole = not with_choices or len(self.facts.finish) <= 1
        return count if count <= untrusted.I32_MAX else -1

    def _mark(self, name: bytes, data: bytes) -> bool:
        """Messages that are no JSON: the end mark and keep-alives."""
        if data == b"[DONE]":
            self._end_mark = True
            self.events.aux(schema.DONE)
        elif name == b"ping" or (not data and name != b"error"):
            self.events.aux(schema.PING)
        else:
            return False
        return True

    def _choice(self, choice: _Choice, count: int) -> None:
        index, reason, delta = choice.index, choice.finish_reason, choice.delta
        finish = self.facts.finish
        if reason is not None or index not in finish:
            finish[index] = untrusted.reason(reason) if reason else finish.get(index)
        ids = -1 if choice.token_ids is None else len(choice.token_ids)
        # The common message is decided before anything rarer is looked at.
        text = choice.text if delta is None else delta.content
        if text and type(text) is str and (delta is None or delta.tool_calls is None):
            size = len(text) if text.isascii() else untrusted.size(text)
            self.events.event(schema.TEXT, size, index, ids, count)
            return
        role = False
        if delta is not None:
            cls, size = _measure(delta)
            if size:
                self.events.event(cls, size, index, ids, count)
                return
            role = delta.role is not None
        if role and not reason and ids <= 0 and index not in self._roles:
            self._roles.add(index)
            self.events.aux(schema.ROLE)
        else:
            over = reason is None and finish[index] is not None
            self.events.empty(index, reason is not None, over, ids, count)

    def _without_choices(self, data: bytes) -> None:
        """Old vLLM sends errors bare; Azure sends filter results first."""
        value = untrusted.decode_any(data)
        if value.get("object") == "error" or value.get("error"):
            self._error(value.get("error") or value)
        else:
            self.events.aux(schema.OTHER)

    def _error(self, error: Any) -> None:
        self.facts.error = True
        self.facts.error_type = untrusted.error_type(error)
        self.events.aux(schema.ERROR)


class _WholeChoice(msgspec.Struct, gc=False):
    index: int = 0
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _WholeReply(msgspec.Struct, gc=False):
    id: str | None = None
    model: str | None = None
    choices: list[_WholeChoice] | None = None
    usage: msgspec.Raw = _ABSENT
    metrics: msgspec.Raw = _ABSENT
    timings: msgspec.Raw = _ABSENT  # llama.cpp's metrics
    error: msgspec.Raw = _ABSENT
    object: str | None = None
    prompt_token_ids: list[int] | None = None


_decode_whole = msgspec.json.Decoder(_WholeReply).decode


class Whole(WholeParser):
    """A whole reply of chat or completions, or an error body."""

    def _body(self, data: bytes) -> bool:
        try:
            reply = _decode_whole(data)
        except (msgspec.DecodeError, ValueError):
            reply = _loosely(_WholeReply, untrusted.decode_any(data))
        facts = self.facts
        error = _value(reply.error)
        if error or reply.object == "error":
            facts.error = True
            facts.error_type = untrusted.error_type(error or untrusted.decode_any(data))
            return True
        _identity(facts, reply)
        _usage(facts, _value(reply.usage), _value(reply.metrics or reply.timings))
        for choice in reply.choices or ():
            facts.finish[choice.index] = untrusted.reason(choice.finish_reason)
            if choice.token_ids is not None:
                facts.output_ids = (facts.output_ids or 0) + len(choice.token_ids)
        return reply.choices is not None or self._http_status >= 400


def _identity(facts: Facts, reply: _Chunk | _WholeReply) -> None:
    facts.model = untrusted.label(reply.model)
    facts.response_id = facts.response_id or untrusted.label(reply.id)
    if facts.prompt_ids is None:
        ids = reply.prompt_token_ids
        if ids is None and isinstance(reply, _Chunk) and reply.choices:
            ids = reply.choices[0].prompt_token_ids
        facts.prompt_ids = None if ids is None else len(ids)


def _measure(delta: _Delta) -> tuple[int, int]:
    """Class and text bytes of all that a delta carries; an answer outranks reasoning."""
    text, thought = _content(delta.content)
    text += untrusted.size(delta.refusal or "")
    thought += untrusted.size(delta.reasoning_content or delta.reasoning or "")
    calls = [delta.function_call]
    for tool in delta.tool_calls or ():
        calls += (tool.function, tool.custom)
    tool_bytes = sum(
        untrusted.size(part or "") for c in calls if c for part in (c.name, c.arguments, c.input)
    )
    cls = schema.TEXT if text else schema.TOOL if tool_bytes else schema.REASONING
    return cls, text + thought + tool_bytes


def _content(content: str | list[Any] | None) -> tuple[int, int]:
    """Bytes of text and of thought; Mistral sends a list of parts, thoughts nested in them."""
    if not content:
        return 0, 0
    if isinstance(content, str):
        return untrusted.size(content), 0
    text = thought = 0
    for part in content:
        if isinstance(part, dict):
            text += untrusted.size(part["text"]) if isinstance(part.get("text"), str) else 0
            thinking = part.get("thinking")
            thought += sum(_content(thinking)) if isinstance(thinking, str | list) else 0
    return text, thought


def _value(raw: msgspec.Raw) -> Any:
    """What the raw JSON says; None where it is absent."""
    return untrusted.decode_any(bytes(raw)) if len(raw) else None


def _raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(json.dumps(value).encode())


def _usage(facts: Facts, usage: Any, metrics: Any) -> None:
    """Sets the token columns and the server's times."""
    origin = "metrics"
    if isinstance(usage, dict):
        if raw := untrusted.numbers_only(usage):
            facts.usage_raw, facts.counts = raw, _counts(raw)
        if metrics is None and "metrics" in usage:
            metrics, origin = usage["metrics"], "usage.metrics"
    if isinstance(metrics, dict):
        _server_times(facts, metrics, origin)


def _counts(usage: dict[str, Any]) -> dict[str, int]:
    prompt, output = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
    prompt = prompt if isinstance(prompt, dict) else {}
    output = output if isinstance(output, dict) else {}
    found = {
        "input_tokens": usage.get("prompt_tokens"),
        "cached_tokens": prompt.get("cached_tokens", usage.get("prompt_cache_hit_tokens")),
        "cache_write_tokens": prompt.get("cache_write_tokens"),
        "output_tokens": usage.get("completion_tokens"),
        "reasoning_tokens": output.get("reasoning_tokens"),
    }
    numbers = {name: untrusted.whole_number(value) for name, value in found.items()}
    return {name: value for name, value in numbers.items() if value is not None}


def _server_times(facts: Facts, metrics: dict[str, Any], origin: str) -> None:
    """vLLM's per-request metrics; its time to first token counts from scheduling: the prefill.

    Or llama.cpp's timings. Source: vLLM docs/features/per_request_metrics.md.
    """
    columns = {
        "server_queue_ns": "queue_time_ms",
        "server_prefill_ns": "time_to_first_token_ms",
        "server_decode_ns": "generation_time_ms",
    }
    if "prompt_ms" in metrics:
        columns = {"server_prefill_ns": "prompt_ms", "server_decode_ns": "predicted_ms"}
        origin = "timings"
    for column, name in columns.items():
        value_ms = untrusted.real_number(metrics.get(name))
        if value_ms is not None and 0 <= value_ms < 1e12:
            facts.server_ns[column] = round(value_ms * 1e6)
            facts.server_source = origin


def _error_object(data: bytes) -> Any:
    try:
        value = untrusted.decode_any(data)
    except (ValueError, RecursionError):
        return None
    return (value.get("error") or value) if isinstance(value, dict) else None


def _loosely[T: msgspec.Struct](kind: type[T], value: Any) -> T:
    """A struct with those fields of an object that have the right type; the others stay unset."""
    if not isinstance(value, dict):
        raise TypeError("not an object")
    known: dict[str, Any] = {}
    for item in msgspec.structs.fields(kind):
        if item.name in value:
            found = _field_loosely(item.type, value[item.name])
            if found is not None:
                known[item.name] = found
    return kind(**known)


_LISTS: dict[Any, type[msgspec.Struct]] = {
    list[_Choice] | None: _Choice,
    list[_WholeChoice] | None: _WholeChoice,
    list[_ToolCall] | None: _ToolCall,
}
_OBJECTS: dict[Any, type[msgspec.Struct]] = {_Delta | None: _Delta, _Call | None: _Call}


def _field_loosely(kind: Any, value: Any) -> Any:
    if kind is msgspec.Raw:
        return _raw(value)
    if kind in _LISTS and isinstance(value, list):
        return [_loosely(_LISTS[kind], item) for item in value if isinstance(item, dict)]
    if kind in _OBJECTS and isinstance(value, dict):
        return _loosely(_OBJECTS[kind], value)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return None
