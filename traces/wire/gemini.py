"""Replies of Gemini's generateContent and streamGenerateContent (SSE or one JSON array).

Usage comes with each message and counts up: thoughts apart from candidates, cached tokens within
the prompt. There is no end mark; the finish reason of each candidate is the end. Text is measured
and forgotten. Source: types.py and errors.py of google-genai, which the tests run.
"""

from typing import Any, Final

from tokentape.traces import schema
from tokentape.traces.wire import untrusted
from tokentape.traces.wire.objects import ObjectStream, ObjectWhole, name_reply, take_usage
from tokentape.traces.wire.reply import Facts
from tokentape.traces.wire.request_body import encoded

_PLACES: Final = {
    "input_tokens": ("promptTokenCount",),
    "cached_tokens": ("cachedContentTokenCount",),
    "output_tokens": ("candidatesTokenCount",),
    "reasoning_tokens": ("thoughtsTokenCount",),
    "tool_results": ("toolUsePromptTokenCount",),
}
_UNSPECIFIED: Final = "FINISH_REASON_UNSPECIFIED"


def _counts(usage: Any) -> dict[str, int]:
    """Token columns of a usageMetadata: what tools gave is input, thoughts are output."""
    found = untrusted.counts(usage, _PLACES)
    tool_results = found.pop("tool_results", 0)
    if "input_tokens" in found:
        found["input_tokens"] += tool_results
    if "reasoning_tokens" in found:
        found["output_tokens"] = found.get("output_tokens", 0) + found["reasoning_tokens"]
    return found


def _take_common(facts: Facts, value: dict[str, Any]) -> None:
    """Names, and that the prompt was refused, which leaves no candidate."""
    name_reply(facts, value.get("modelVersion"), value.get("responseId"))
    blocked = untrusted.reason(untrusted.at(value, "promptFeedback", "blockReason"))
    if blocked is not None:
        facts.finish[0] = blocked


def _finish(candidate: dict[str, Any]) -> str | None:
    reason = untrusted.reason(candidate.get("finishReason"))
    return None if reason == _UNSPECIFIED else reason


def _error(facts: Facts, error: Any) -> None:
    told = {"type": untrusted.at(error, "status"), "code": untrusted.at(error, "code")}
    facts.error, facts.error_type = True, untrusted.error_type(told)


def _choice(candidate: dict[str, Any], place: int) -> int:
    index = untrusted.whole_number(candidate.get("index"), untrusted.I16_MAX)
    return place if index is None else index


def _content(part: dict[str, Any]) -> tuple[int, int]:
    """What a part carries: the class of its event, and bytes; none of them where it is no event."""
    for key in ("functionCall", "executableCode", "toolCall"):
        if part.get(key):
            return schema.TOOL, len(encoded(part[key]))
    text = part.get("text") or untrusted.at(part, "inlineData", "data")
    return schema.REASONING if part.get("thought") is True else schema.TEXT, untrusted.size(text)


class Stream(ObjectStream):
    """A streamed reply."""

    _thought = False  # thoughts were sent, so events stand for their tokens too

    def _counts(self, usage: dict[str, Any]) -> dict[str, int]:
        return _counts(usage)

    def _object(self, name: bytes, value: dict[str, Any]) -> None:
        if error := value.get("error"):
            _error(self.facts, error)
            self.events.aux(schema.ERROR)
            return
        usage, candidates = value.get("usageMetadata"), untrusted.objects(value.get("candidates"))
        if not (candidates or isinstance(usage, dict) or "promptFeedback" in value):
            raise ValueError("no message of a reply")
        self._use(usage)
        _take_common(self.facts, value)
        for place, candidate in enumerate(candidates):
            self._candidate(_choice(candidate, place), candidate, usage)
        if not candidates:
            refused = bool(self.facts.finish) and "promptFeedback" in value
            self.events.aux(schema.FINISH if refused else schema.USAGE)

    def _candidate(self, index: int, candidate: dict[str, Any], usage: Any) -> None:
        over = self.facts.finish.get(index) is not None
        reason = _finish(candidate)
        self.facts.finish[index] = reason or self.facts.finish.get(index)
        parts = [
            _content(p) for p in untrusted.objects(untrusted.at(candidate, "content", "parts"))
        ]
        self._thought = self._thought or any(cls == schema.REASONING for cls, _ in parts)
        count = self._count(usage)
        sent = [part for part in parts if part[1]]
        for cls, size in sent:
            self.events.event(cls, size, index, -1, count)
        if not sent:
            self.events.empty(index, reason is not None, over, count=count)

    def _count(self, usage: Any) -> int:
        """Tokens so far that events stand for; -1: not told."""
        told = untrusted.counts(usage, _PLACES)
        if "output_tokens" not in told and not (self._thought and "reasoning_tokens" in told):
            return -1
        thoughts = told.get("reasoning_tokens", 0) if self._thought else 0
        return told.get("output_tokens", 0) + thoughts

    def _more(self) -> list[Any]:
        return [*super()._more(), self._thought]

    def _resume(self, more: list[Any]) -> None:
        super()._resume(more)
        self._thought = more[4]


class Whole(ObjectWhole):
    """A whole reply, or an error body; also a stream's array that came where none was known of."""

    def _body(self, data: bytes) -> bool:
        value = untrusted.decode_any(data)
        values = untrusted.objects(value if isinstance(value, list) else [value])
        understood = [self._object(item) for item in values]
        return any(understood) or (bool(values) and self._http_status >= 400)

    def _object(self, value: dict[str, Any]) -> bool:
        if error := value.get("error"):
            _error(self.facts, error)
            return True
        _take_common(self.facts, value)
        candidates = untrusted.objects(value.get("candidates"))
        for place, candidate in enumerate(candidates[: untrusted.I16_MAX]):
            self.facts.finish[_choice(candidate, place)] = _finish(candidate)
        take_usage(self.facts, value.get("usageMetadata"), _counts(value.get("usageMetadata")))
        return bool(candidates) or "promptFeedback" in value
