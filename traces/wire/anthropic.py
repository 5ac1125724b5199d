"""Replies of Anthropic's Messages, streamed and whole, from Anthropic and from who speaks like it.

Its input_tokens leave cached ones out, so they are added up here; its output_tokens run through
the stream and count all of it at the end. Text is measured and forgotten.
"""

from typing import Any, Final

from tokentape.traces import schema
from tokentape.traces.wire import untrusted
from tokentape.traces.wire.objects import ObjectStream, ObjectWhole, name_reply, take_usage

# What a delta of each type carries, and under which key; the rest (signatures, citations) is none.
_DELTAS: Final = {
    "text_delta": (schema.TEXT, "text"),
    "thinking_delta": (schema.REASONING, "thinking"),
    "input_json_delta": (schema.TOOL, "partial_json"),
}
# What a block may bring with its beginning: a tool's name is generated like its arguments are.
_BLOCKS: Final = {
    "text": (schema.TEXT, "text"),
    "thinking": (schema.REASONING, "thinking"),
    "redacted_thinking": (schema.REASONING, "data"),
    "tool_use": (schema.TOOL, "name"),
    "server_tool_use": (schema.TOOL, "name"),
    "mcp_tool_use": (schema.TOOL, "name"),
}
_PLACES: Final = {
    "input_tokens": ("input_tokens",),
    "cached_tokens": ("cache_read_input_tokens",),
    "cache_write_tokens": ("cache_creation_input_tokens",),
    "output_tokens": ("output_tokens",),
    "reasoning_tokens": ("output_tokens_details", "thinking_tokens"),
}


def _counts(usage: Any) -> dict[str, int]:
    """Token columns of a usage object; input_tokens with the cached and the newly cached ones."""
    found = untrusted.counts(usage, _PLACES)
    if "input_tokens" in found:
        found["input_tokens"] += found.get("cached_tokens", 0) + found.get("cache_write_tokens", 0)
    return found


class Stream(ObjectStream):
    """A streamed message."""

    _final = False  # the output tokens of a message's beginning are not its total

    def _counts(self, usage: dict[str, Any]) -> dict[str, int]:
        return _counts(usage)

    def _object(self, name: bytes, value: dict[str, Any]) -> None:
        kind = value.get("type")
        if kind == "content_block_delta":
            delta = untrusted.at(value, "delta")
            self._content(delta, _DELTAS.get(untrusted.at(delta, "type")))
        elif kind == "content_block_start":
            block = untrusted.at(value, "content_block")
            self._content(block, _BLOCKS.get(untrusted.at(block, "type")))
        elif kind == "message_delta":
            self._message_delta(value)
        elif kind == "message_start":
            message = untrusted.at(value, "message")
            name_reply(self.facts, untrusted.at(message, "model"), untrusted.at(message, "id"))
            self._use(untrusted.at(message, "usage"))
            self.facts.finish.setdefault(0, None)
            self.events.aux(schema.ROLE)
        elif kind == "message_stop":
            self._end_mark = True
            self.events.aux(schema.DONE)
        elif kind == "ping":
            self.events.aux(schema.PING)
        elif kind == "error" or name == b"error" or value.get("error"):
            self._error(value.get("error") or value)
        elif isinstance(kind, str):  # the API's rule: new kinds of events may come
            self.events.aux(schema.OTHER)
        else:
            raise ValueError("no event of a message")

    def _content(self, part: Any, carries: tuple[int, str] | None) -> None:
        size = untrusted.size(untrusted.at(part, carries[1])) if carries else 0
        if carries and size:
            self.events.event(carries[0], size, 0)
        elif untrusted.at(part, "type") == "text_delta":
            self.events.empty(0, finish=False, over=False)
        else:
            self.events.aux(schema.OTHER)

    def _message_delta(self, value: dict[str, Any]) -> None:
        self._use(value.get("usage"))
        self._final = self._final or "output_tokens" in self._usage
        reason = untrusted.reason(untrusted.at(value, "delta", "stop_reason"))
        if reason is None:
            self.events.aux(schema.USAGE)
        else:
            self.facts.finish[0] = reason
            self.events.aux(schema.FINISH)

    def _conclude(self) -> None:
        super()._conclude()
        if not self._final:
            self.facts.counts.pop("output_tokens", None)

    def _more(self) -> list[Any]:
        return [*super()._more(), self._final]

    def _resume(self, more: list[Any]) -> None:
        super()._resume(more)
        self._final = more[4]


class Whole(ObjectWhole):
    """A whole message, or an error body."""

    def _object(self, value: dict[str, Any]) -> bool:
        name_reply(self.facts, value.get("model"), value.get("id"))
        take_usage(self.facts, value.get("usage"), _counts(value.get("usage")))
        self.facts.finish[0] = untrusted.reason(value.get("stop_reason"))
        return value.get("type") == "message"
