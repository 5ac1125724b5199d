"""Replies of Ollama's /api/chat and /api/generate: one JSON object a line, or a whole one.

The last line has the counts and the durations of prefill and decode in ns. Its time to load a model
is neither. Its prompt_eval_count holds cached tokens too (ollama/ollama#17943; #2068 tells of old
ones that left it out). Text is measured and forgotten. Source: _types.py of ollama, which the tests
run.
"""

from typing import Any, Final

from tokentape.traces import schema
from tokentape.traces.wire import untrusted
from tokentape.traces.wire.objects import (
    ObjectStream,
    ObjectWhole,
    name_reply,
    scaled_ns,
    take_times,
    take_usage,
)
from tokentape.traces.wire.reply import Facts
from tokentape.traces.wire.request_body import encoded

_PLACES: Final = {
    "input_tokens": ("prompt_eval_count",),
    "cached_tokens": ("prompt_eval_cached_count",),
    "output_tokens": ("eval_count",),
}
_USAGE: Final = frozenset(
    (
        *(place[0] for place in _PLACES.values()),
        *("total_duration", "load_duration", "prompt_eval_duration", "eval_duration"),
    )
)


def _usage(value: dict[str, Any]) -> dict[str, Any]:
    return {key: told for key, told in value.items() if key in _USAGE}  # in the order it came


def _take_end(facts: Facts, value: dict[str, Any]) -> str | None:
    """Names, times, and the reason where this is the end."""
    name_reply(facts, value.get("model"), None)
    take_times(
        facts,
        "durations",
        server_prefill_ns=scaled_ns(value.get("prompt_eval_duration"), 1),
        server_decode_ns=scaled_ns(value.get("eval_duration"), 1),
    )
    if value.get("done") is not True:
        return None
    facts.finish[0] = untrusted.reason(value.get("done_reason")) or "stop"  # old ones give none
    return facts.finish[0]


def _events(value: dict[str, Any]) -> list[tuple[int, int]]:
    """(class, bytes) of what a line carries, in the order of generation."""
    message = value.get("message")
    message = message if isinstance(message, dict) else value
    calls = untrusted.objects(message.get("tool_calls"))
    sizes = [
        (schema.REASONING, untrusted.size(message.get("thinking"))),
        (schema.TEXT, untrusted.size(message.get("content") or message.get("response"))),
        *((schema.TOOL, len(encoded(call))) for call in calls),
        (schema.TEXT, untrusted.size(value.get("image"))),
    ]
    return [(cls, size) for cls, size in sizes if size]


class Stream(ObjectStream):
    """A streamed reply."""

    def _counts(self, usage: dict[str, Any]) -> dict[str, int]:
        return untrusted.counts(usage, _PLACES)

    def _object(self, name: bytes, value: dict[str, Any]) -> None:
        if error := value.get("error"):
            self._error(error)
            return
        if not value.keys() & {"message", "response", "done"}:
            raise ValueError("no line of a reply")
        over = self.facts.finish.get(0) is not None
        self._use(_usage(value))
        reason = _take_end(self.facts, value)
        self._end_mark = self._end_mark or reason is not None
        sent = _events(value)
        for cls, size in sent:
            self.events.event(cls, size, 0)
        if not sent:
            self.events.empty(0, reason is not None, over)


class Whole(ObjectWhole):
    """A whole reply, or an error body."""

    def _object(self, value: dict[str, Any]) -> bool:
        _take_end(self.facts, value)
        usage = _usage(value)
        take_usage(self.facts, usage, untrusted.counts(usage, _PLACES))
        return isinstance(value.get("message"), dict) or isinstance(value.get("response"), str)
