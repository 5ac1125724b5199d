"""Amazon Bedrock's replies: Converse and InvokeModel, streamed and whole.

A Converse stream has typed events and ends with a `metadata` event, which has usage and latency. An
InvokeModel stream wraps the model vendor's own messages; those of Anthropic, of Nova (Converse's,
each under its name) and of Llama are read. Both count input tokens without cached ones, so they are
added up here; for some models of OpenAI the stream was seen to count them already (bifrost pull
request 6942): the raw usage is kept. Source: the service model of botocore, whose client the tests
run, and Amazon's pages on prompt caching.
"""

from base64 import b64decode
from typing import Any, Final

from tokentape.traces import schema
from tokentape.traces.wire import anthropic, untrusted
from tokentape.traces.wire.objects import ObjectStream, ObjectWhole, take_usage
from tokentape.traces.wire.reply import Facts

_PLACES: Final = {
    "input_tokens": ("inputTokens",),
    "cached_tokens": ("cacheReadInputTokens",),
    "cache_write_tokens": ("cacheWriteInputTokens",),
    "output_tokens": ("outputTokens",),
}
# What Nova's own messages call them.
_NOVA: Final = {"cacheReadInputTokenCount": "cacheReadInputTokens"} | {
    "cacheWriteInputTokenCount": "cacheWriteInputTokens"
}
_LLAMA: Final = {"prompt_token_count": "inputTokens", "generation_token_count": "outputTokens"}
_INVOCATION: Final = "amazon-bedrock-invocationMetrics"
_CONVERSE: Final = frozenset(
    (
        *("messageStart", "contentBlockStart", "contentBlockDelta", "contentBlockStop"),
        *("messageStop", "metadata"),
    )
)


def counts_of(usage: dict[str, Any]) -> dict[str, int]:
    """Token columns of a usage object; input_tokens with the cached and the newly cached ones."""
    usage = {_NOVA.get(key, key): value for key, value in usage.items()}
    found = untrusted.counts(usage, _PLACES)
    if "input_tokens" in found:
        found["input_tokens"] += found.get("cached_tokens", 0) + found.get("cache_write_tokens", 0)
    return found


class ConverseStream(ObjectStream):
    """A streamed reply of Converse."""

    def _counts(self, usage: dict[str, Any]) -> dict[str, int]:
        return counts_of(usage)

    def _object(self, name: bytes, value: dict[str, Any]) -> None:
        if name.startswith(b"!"):
            self._error(_refusal(name))
        elif name == b"metadata":
            self._use(value.get("usage"))
            self._end_mark = True
            self.events.aux(schema.USAGE)
        elif name:
            _converse(self, name.decode("ascii", "replace"), value)
        else:
            raise ValueError("no event of a reply")


def _refusal(name: bytes) -> dict[str, str]:
    return {"type": name[1:].decode("ascii", "replace")}


def _converse(stream: ObjectStream, kind: str, value: Any) -> None:
    """One event of Converse but `metadata`; new kinds may come."""
    events, facts = stream.events, stream.facts
    if kind == "contentBlockDelta":
        _delta(stream, untrusted.at(value, "delta"))
    elif kind == "contentBlockStart" and untrusted.size(
        name := untrusted.at(value, "start", "toolUse", "name")
    ):
        events.event(schema.TOOL, untrusted.size(name), 0)  # generated like its arguments are
    elif kind == "messageStart":
        facts.finish.setdefault(0, None)
        events.aux(schema.ROLE)
    elif kind == "messageStop":
        facts.finish[0] = untrusted.reason(untrusted.at(value, "stopReason"))
        events.aux(schema.FINISH)
    else:
        events.aux(schema.OTHER)


def _delta(stream: ObjectStream, delta: Any) -> None:
    sizes = (
        (schema.TEXT, untrusted.size(untrusted.at(delta, "text"))),
        (schema.TOOL, untrusted.size(untrusted.at(delta, "toolUse", "input"))),
        (schema.REASONING, untrusted.size(untrusted.at(delta, "reasoningContent", "text"))),
    )
    sent = [(cls, size) for cls, size in sizes if size]
    for cls, size in sent:
        stream.events.event(cls, size, 0)
    if not sent and isinstance(untrusted.at(delta, "text"), str):
        stream.events.empty(0, finish=False, over=False)
    elif not sent:
        stream.events.aux(schema.OTHER)


class InvokeStream(anthropic.Stream):
    """A streamed reply of InvokeModel: what the vendor's model says, in chunks."""

    _invocation = False  # Amazon's own numbers came: they close the stream

    def _counts(self, usage: dict[str, Any]) -> dict[str, int]:
        return counts_of(usage) if "inputTokens" in usage else super()._counts(usage)

    def _object(self, name: bytes, value: dict[str, Any]) -> None:
        if name.startswith(b"!"):
            self._error(_refusal(name))
            return
        said = untrusted.decode_any(b64decode(value["bytes"]))
        if not isinstance(said, dict):
            raise TypeError("not an object")
        self._end_mark = self._end_mark or _INVOCATION in said
        kind = next(iter(said.keys() & _CONVERSE), None)
        if isinstance(said.get("type"), str):
            super()._object(b"", said)
        elif kind == "metadata":
            self._use(untrusted.at(said[kind], "usage"))
            self._final = self._final or "outputTokens" in self._usage
            self.events.aux(schema.USAGE)
        elif kind is not None:
            _converse(self, kind, said[kind])
        elif "generation" in said:
            self._llama(said)
        elif _INVOCATION in said:
            self.events.aux(schema.USAGE)
        else:
            raise ValueError("a vendor that is not read")

    def _llama(self, said: dict[str, Any]) -> None:
        over = self.facts.finish.get(0) is not None
        numbers = {_LLAMA[k]: v for k, v in said.items() if k in _LLAMA}
        self._use(numbers)
        self._final = self._final or "outputTokens" in self._usage
        reason = untrusted.reason(said.get("stop_reason"))
        self.facts.finish[0] = reason or self.facts.finish.get(0)
        size = untrusted.size(said.get("generation"))
        count = untrusted.whole_number(said.get("generation_token_count"))
        count = -1 if count is None else count
        if size:
            self.events.event(schema.TEXT, size, 0, -1, count)
        else:
            self.events.empty(0, reason is not None, over, count=count)


class ConverseWhole(ObjectWhole):
    """A whole reply of Converse, or an error body."""

    def _object(self, value: dict[str, Any]) -> bool:
        return _converse_whole(self.facts, value)


def _converse_whole(facts: Facts, value: dict[str, Any]) -> bool:
    usage = value.get("usage")
    if isinstance(usage, dict):
        take_usage(facts, usage, counts_of(usage))
    facts.finish[0] = untrusted.reason(value.get("stopReason"))
    return isinstance(value.get("output"), dict)


class InvokeWhole(anthropic.Whole):
    """A whole reply of InvokeModel: the vendor's own, or an error body."""

    def _object(self, value: dict[str, Any]) -> bool:
        if isinstance(value.get("generation"), str):
            usage = {_LLAMA[k]: v for k, v in value.items() if k in _LLAMA}
            take_usage(self.facts, usage, counts_of(usage))
            self.facts.finish[0] = untrusted.reason(value.get("stop_reason"))
            return True
        if isinstance(value.get("output"), dict):  # Nova
            return _converse_whole(self.facts, value)
        return super()._object(value)
