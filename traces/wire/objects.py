"""Replies whose messages are JSON objects, read as dictionaries: what such dialects share.

For dialects off the hottest path: a dialect says what an object means and where its usage lies, and
gets marks, errors, normalized counts and the hand-over to another process for nothing. OpenAI's
chat has its own, faster way (`openai.py`).
"""

from abc import abstractmethod
from typing import Any

from tokentape.traces import schema
from tokentape.traces.wire import untrusted
from tokentape.traces.wire.reply import Facts, Framing, StreamParser, WholeParser


class ObjectStream(StreamParser):
    """A streamed reply of JSON objects. The last usage counts, key by key."""

    def __init__(self, http_status: int, framing: Framing) -> None:
        super().__init__(http_status, framing)
        self._usage: dict[str, Any] = {}  # numbers only

    @abstractmethod
    def _counts(self, usage: dict[str, Any]) -> dict[str, int]:
        """Token columns of the dialect's usage object."""

    @abstractmethod
    def _object(self, name: bytes, value: dict[str, Any]) -> None:
        """Calls the events for one object, sets facts; any exception means: not understood."""

    def _message(self, name: bytes, data: bytes) -> None:
        if len(data) < 16 or name == b"ping":
            mark = data.strip()
            if mark == b"[DONE]":
                self._end_mark = True
                self.events.aux(schema.DONE)
                return
            if not mark or name == b"ping":
                self.events.aux(schema.PING)
                return
        value = untrusted.decode_any(data)
        if not isinstance(value, dict):
            raise TypeError("not an object")
        self._object(name, value)

    def _use(self, usage: Any) -> None:
        """Take a usage object, of which a later one may repeat a part only."""
        self._usage |= untrusted.numbers_only(usage)

    def _error(self, error: Any) -> None:
        self.facts.error = True
        self.facts.error_type = untrusted.error_type(error)
        self.events.aux(schema.ERROR)

    def _conclude(self) -> None:
        if self._usage:
            take_usage(self.facts, self._usage, self._counts(self._usage))

    def _more(self) -> list[Any]:
        facts = self.facts
        return [
            dict(self._usage),
            facts.error_type if facts.error else None,
            dict(facts.server_ns),
            facts.server_source,
        ]

    def _resume(self, more: list[Any]) -> None:
        facts = self.facts
        self._usage, facts.error_type, facts.server_ns, facts.server_source = more[:4]
        facts.error = facts.error_type is not None


class CountingStream(ObjectStream):
    """A streamed reply whose messages count up, each for its own choice or prompt.

    A dialect puts the last numbers of each into `_told`, and says what they come to.
    """

    def __init__(self, http_status: int, framing: Framing) -> None:
        super().__init__(http_status, framing)
        self._told: dict[int, dict[str, Any]] = {}

    @abstractmethod
    def _times(self, told: dict[str, Any]) -> None:
        """Set the server's own times."""

    @abstractmethod
    def _sum(self, told: list[dict[str, Any]]) -> dict[str, int]:
        """Token columns of all choices together."""

    def _counts(self, usage: dict[str, Any]) -> dict[str, int]:
        return self._sum(list(self._told.values()))

    def _conclude(self) -> None:
        for told in self._told.values():
            self._times(told)
            self._use(told)
        super()._conclude()

    def _more(self) -> list[Any]:
        return [*super()._more(), [[index, dict(told)] for index, told in self._told.items()]]

    def _resume(self, more: list[Any]) -> None:
        super()._resume(more)
        self._told = {index: told for index, told in more[4]}  # noqa: C416 - lists, not pairs


class ObjectWhole(WholeParser):
    """A whole reply that is one JSON object, or an error body."""

    @abstractmethod
    def _object(self, value: dict[str, Any]) -> bool:
        """Sets facts; False or any exception means: not understood."""

    def _body(self, data: bytes) -> bool:
        value = untrusted.decode_any(data)
        if isinstance(value, list) and len(value) == 1:  # Google wraps an error so
            value = value[0]
        if not isinstance(value, dict):
            return False
        error = value.get("error")
        if error or value.get("object") == "error":
            self.facts.error = True
            self.facts.error_type = untrusted.error_type(
                error if isinstance(error, dict) else value
            )
            return True
        return self._object(value) or self._http_status >= 400


def take_usage(facts: Facts, usage: Any, counts: dict[str, int]) -> None:
    """Set the raw usage, which is the sum over all choices, and what it normalizes to."""
    if raw := untrusted.numbers_only(usage):
        facts.usage_raw, facts.counts, facts.usage_is_whole = raw, counts, True


def name_reply(facts: Facts, model: Any, response_id: Any) -> None:
    """Keep the first name of the model and of the reply."""
    facts.model = facts.model or untrusted.label(model)
    facts.response_id = facts.response_id or untrusted.label(response_id)


def take_times(facts: Facts, source: str, **columns_ns: int | None) -> None:
    """Set those of server_queue_ns, server_prefill_ns and server_decode_ns that are known."""
    for column, value_ns in columns_ns.items():
        if value_ns is not None:
            facts.server_ns[column] = value_ns
            facts.server_source = source


def scaled_ns(value: Any, unit_ns: float) -> int | None:
    """A duration that a server told, in ns; None for what is no duration of less than a month."""
    number = untrusted.real_number(value)
    if number is None or not 0 <= number * unit_ns < 2.6e15:
        return None
    return round(number * unit_ns)
