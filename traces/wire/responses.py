"""Replies of OpenAI's Responses, streamed as typed events and whole.

Events are numbered, so a gap in the numbers says that one is missing. Text is measured and
forgotten.
"""

from typing import Any, Final

from tokentape.traces import schema
from tokentape.traces.wire import untrusted
from tokentape.traces.wire.objects import ObjectStream, ObjectWhole, name_reply, take_usage

# What the `delta` of an event carries. Output of a tool that ran is not generated, so not here.
_DELTAS: Final = {
    "response.output_text.delta": schema.TEXT,
    "response.refusal.delta": schema.TEXT,
    "response.audio.delta": schema.TEXT,
    "response.audio.transcript.delta": schema.TEXT,
    "response.reasoning_text.delta": schema.REASONING,
    "response.reasoning_summary_text.delta": schema.REASONING,
    "response.function_call_arguments.delta": schema.TOOL,
    "response.mcp_call_arguments.delta": schema.TOOL,
    "response.custom_tool_call_input.delta": schema.TOOL,
    "response.code_interpreter_call_code.delta": schema.TOOL,
    "response.shell_call_command.delta": schema.TOOL,
}
_CALLS: Final = ("function_call", "custom_tool_call", "mcp_call")
_ENDS: Final = ("response.completed", "response.incomplete", "response.failed")
_PLACES: Final = {
    "input_tokens": ("input_tokens",),
    "cached_tokens": ("input_tokens_details", "cached_tokens"),
    "cache_write_tokens": ("input_tokens_details", "cache_write_tokens"),
    "output_tokens": ("output_tokens",),
    "reasoning_tokens": ("output_tokens_details", "reasoning_tokens"),
}


class Stream(ObjectStream):
    """A streamed response."""

    _number = -1  # of the last event
    _gap = False

    def _counts(self, usage: dict[str, Any]) -> dict[str, int]:
        return untrusted.counts(usage, _PLACES)

    def _object(self, name: bytes, value: dict[str, Any]) -> None:
        kind = value.get("type")
        self._follow(untrusted.whole_number(value.get("sequence_number")))
        if kind == "error" or (value.get("error") and not isinstance(kind, str)):
            self._error(value.get("error") or {"code": value.get("code")})
        elif not isinstance(kind, str):
            raise ValueError("no event of a response")
        elif kind in _DELTAS:
            self._delta(_DELTAS[kind], untrusted.size(value.get("delta")))
        elif kind in _ENDS:
            self._end(kind, value.get("response"))
        elif kind == "response.created":
            response = value.get("response")
            name_reply(self.facts, untrusted.at(response, "model"), untrusted.at(response, "id"))
            self.facts.finish.setdefault(0, None)
            self.events.aux(schema.ROLE)
        elif untrusted.at(value, "item", "type") in _CALLS and kind.endswith("item.added"):
            self._delta(schema.TOOL, untrusted.size(untrusted.at(value, "item", "name")))
        else:
            self.events.aux(schema.OTHER)

    def _follow(self, number: int | None) -> None:
        if number is not None:
            self._gap = self._gap or number > self._number + 1 > 0
            self._number = number

    def _delta(self, cls: int, size: int) -> None:
        if size:
            self.events.event(cls, size, 0)
        elif cls == schema.TEXT:
            self.events.empty(0, finish=False, over=False)
        else:
            self.events.aux(schema.OTHER)

    def _end(self, kind: str, response: Any) -> None:
        name_reply(self.facts, untrusted.at(response, "model"), untrusted.at(response, "id"))
        self._use(untrusted.at(response, "usage"))
        if kind == "response.failed":
            self._error(untrusted.at(response, "error"))
            return
        self.facts.finish[0] = _reason(kind.rpartition(".")[2], response)
        self._end_mark = True
        self.events.aux(schema.DONE)

    def _parse_status(self, complete: bool) -> str:
        status = super()._parse_status(complete)
        return "partial" if self._gap and status == "ok" else status

    def _more(self) -> list[Any]:
        return [*super()._more(), self._number, self._gap]

    def _resume(self, more: list[Any]) -> None:
        super()._resume(more)
        self._number, self._gap = more[4:]


class Whole(ObjectWhole):
    """A whole response, or an error body."""

    def _object(self, value: dict[str, Any]) -> bool:
        usage = value.get("usage")
        name_reply(self.facts, value.get("model"), value.get("id"))
        take_usage(self.facts, usage, untrusted.counts(usage, _PLACES))
        self.facts.finish[0] = _reason(value.get("status"), value)
        return value.get("object") == "response"


def _reason(status: Any, response: Any) -> str | None:
    """The status, or why it is incomplete."""
    why = untrusted.at(response, "incomplete_details", "reason")
    return untrusted.reason(status if why is None else why)
