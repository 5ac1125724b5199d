"""A reply as it is read: what every dialect shares, from bytes and times to a `Reply`.

`StreamParser` takes framed messages, `WholeParser` one body, `UnreadParser` what cannot be read. A
dialect fills in `_message` or `_body`, calls the events and sets the facts. Nothing here raises on
what a server sent, and no text of a reply is kept in any column.
"""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec

from tokentape.traces import schema
from tokentape.traces.wire import untrusted
from tokentape.traces.wire.encoding import Decoder
from tokentape.traces.wire.events import Events
from tokentape.traces.wire.sse import Message
from tokentape.traces.wire.tokens import Candidate

WHOLE_LIMIT: Final = 16 << 20  # bytes of a whole body that are kept for reading
_COUNTS = ("input_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens")


class Framing(Protocol):
    """Cuts a body into messages; see `sse.Message` for what they are."""

    def feed(self, data: bytes) -> list[Message]: ...

    def flush(self) -> list[Message]: ...

    @property
    def place(self) -> list[int]:
        """Where in a message this stands, for `resume`; empty where no part of one is held."""

    def resume(self, place: list[int]) -> None:
        """Skip the rest of a message whose beginning another process held, and do not report it."""


class Progress(msgspec.Struct, array_like=True, gc=False):
    """What a stream's parser must be told to go on in another process: numbers and words, no text.

    `told` as of `Events`. `place` as of `Framing`: of a message that is lost with this process.
    `more` is the dialect's own.
    """

    understood: int
    nonsense: int
    given_up: int
    end_mark: bool
    place: list[int]
    told: tuple[int, int]
    finish: dict[int, str | None]
    prompt_ids: int | None
    candidates: list[Candidate]
    more: list[Any]


@dataclass
class Facts:
    """What a reply says of itself; a dialect fills it in and checks each value (`untrusted.py`)."""

    model: str | None = None
    response_id: str | None = None
    counts: dict[str, int] = field(default_factory=dict)  # token columns, by usage
    usage_raw: dict[str, Any] | None = None
    usage_is_whole: bool = False  # it came by itself, so it is the sum over all choices
    prompt_ids: int | None = None  # length of the prompt's token ids
    output_ids: int | None = None  # length of a whole reply's token ids
    finish: dict[int, str | None] = field(default_factory=dict)  # reason by choice
    server_ns: dict[str, int] = field(default_factory=dict)  # server_*_ns columns
    server_source: str | None = None
    error: bool = False
    error_type: str | None = None


@dataclass
class Reply:
    """What one reply held: columns of its row, and its events.

    Times are as fed (monotonic ns). `choice` is None when there is one. `done`: the end mark or
    the finish reason of every choice was seen. The arrays of a whole reply are empty.
    """

    columns: dict[str, Any]
    t_ns: array[int]
    ntok: array[int]
    cls: bytearray
    choice: bytearray | None
    aux_t_ns: array[int]
    aux_cls: bytearray
    first_content_ns: int | None
    first_answer_ns: int | None
    last_content_ns: int | None
    stream_error: bool
    done: bool


class ReplyParser(ABC):
    """Reads one reply. The six arrays may be read between feeds; those of the Reply are final."""

    def __init__(self, http_status: int) -> None:
        self.events = Events()
        self.t_ns, self.ntok = self.events.t_ns, self.events.ntok
        self.cls, self.choice = self.events.cls, self.events.choice
        self.aux_t_ns, self.aux_cls = self.events.aux_t_ns, self.events.aux_cls
        self.body_bytes = 0  # as they came, compressed or not
        self.decoder: Decoder | None = None  # of a compressed body
        self.facts = Facts()
        self._http_status = http_status

    @abstractmethod
    def feed(self, data: bytes, t_ns: int, read: int) -> None:
        """Body bytes, the time of the socket read that brought them, and its ordinal."""

    @abstractmethod
    def finish(self, t_ns: int, complete: bool) -> Reply:
        """The reply as far as it came; complete=False says that it was cut. Call it once."""

    def _decoded(self, data: bytes) -> Iterable[bytes]:
        """The body bytes that these stand for."""
        return (data,) if self.decoder is None else self.decoder.feed(data)

    def _whole(self, complete: bool) -> bool:
        """Whether nothing is missing at the body's end."""
        return complete and (self.decoder is None or self.decoder.complete)

    def _columns(self, parse_status: str) -> dict[str, Any]:
        facts = self.facts
        failed = self._failed
        reasons = [facts.finish[i] for i in sorted(facts.finish)]
        columns: dict[str, Any] = {
            "model": facts.model,
            "response_id": facts.response_id,
            "response_bytes": self.body_bytes,
            "usage_raw": None if facts.usage_raw is None else untrusted.json_text(facts.usage_raw),
            "finish_reason": reasons if any(reasons) else None,
            "error_type": (facts.error_type or str(self._http_status)) if failed else None,
            "parse_status": parse_status,
            "server_timing_source": facts.server_source,
            **facts.server_ns,
        }
        for name in _COUNTS:
            if name in facts.counts:
                columns |= {name: facts.counts[name], f"{name}_source": "usage"}
        if facts.prompt_ids is not None and "input_tokens" not in columns:
            columns |= {"input_tokens": facts.prompt_ids, "input_tokens_source": "token_ids"}
        return {name: value for name, value in columns.items() if value is not None}

    @property
    def _failed(self) -> bool:
        return self.facts.error or self._http_status >= 400

    def _bare(self, columns: dict[str, Any], done: bool) -> Reply:
        """A reply without events."""
        none: array[int] = array("q")
        return Reply(
            columns,
            none,
            array("q"),
            bytearray(),
            None,
            array("q"),
            bytearray(),
            first_content_ns=None,
            first_answer_ns=None,
            last_content_ns=None,
            stream_error=self._failed,
            done=done,
        )


class StreamParser(ReplyParser):
    """A reply of many messages. A dialect gives `_message`, which may raise on nonsense."""

    def __init__(self, http_status: int, framing: Framing) -> None:
        super().__init__(http_status)
        self._framing = framing
        self._understood = 0
        self._nonsense = 0
        self._given_up = 0
        self._end_mark = False

    @abstractmethod
    def _message(self, name: bytes, data: bytes) -> None:
        """Calls the events for one message, sets facts; any exception means: not understood."""

    def _conclude(self) -> None:
        """Called once behind the last message, for facts that are settled only then."""

    def _more(self) -> list[Any]:
        """What `_resume` needs of a dialect that keeps more than events and facts."""
        return []

    def _resume(self, more: list[Any]) -> None:
        """Take back what `_more` of another process gave."""

    @property
    def progress(self) -> Progress:
        """How far the reply was read, for `resume` in the process that comes after this one."""
        facts = self.facts
        return Progress(
            self._understood,
            self._nonsense,
            self._given_up,
            self._end_mark,
            self._framing.place,
            self.events.told,
            dict(facts.finish),
            facts.prompt_ids,
            list(self.events.candidates),
            self._more(),
        )

    def resume(self, progress: Progress, arrays: list[Any], body_bytes: int) -> None:
        """Go on where a parser of the same kind was; `arrays` are its events (`Events.resume`)."""
        self._understood, self._nonsense = progress.understood, progress.nonsense
        self._given_up, self._end_mark = progress.given_up, progress.end_mark
        self.facts.finish, self.facts.prompt_ids = dict(progress.finish), progress.prompt_ids
        self.body_bytes = body_bytes
        if progress.place:
            self._framing.resume(progress.place)
        self.events.resume(arrays, progress.told, progress.candidates)
        self._resume(progress.more)

    def feed(self, data: bytes, t_ns: int, read: int) -> None:
        self.body_bytes += len(data)
        events = self.events
        events.now_ns, events.read = t_ns, read
        for piece in self._decoded(data):
            for name, payload in self._framing.feed(piece):
                self._take(name, payload)

    def finish(self, t_ns: int, complete: bool) -> Reply:
        complete = self._whole(complete)
        nonsense = self._nonsense
        for name, payload in self._framing.flush():
            if complete or payload or name is None:
                self._take(name, payload)
        if not complete and self._nonsense > nonsense:  # it was cut there, that is all
            self._nonsense = nonsense
            del self.aux_t_ns[-1], self.aux_cls[-1]
        try:
            self._conclude()
        except Exception:  # noqa: BLE001 - as for a message
            self._nonsense += 1
        return self._reply(self._columns(self._parse_status(complete)))

    def _take(self, name: bytes | None, data: bytes | None) -> None:
        if name is None:
            self.events.aux(schema.PING)
            return
        if data is None:
            self._given_up += 1
            self.events.aux(schema.OTHER)
            return
        try:
            self._message(name, data)
            self._understood += 1
        except Exception:  # noqa: BLE001 - whatever a server sends, the writer goes on
            self._nonsense += 1
            self.events.aux(schema.OTHER)

    def _parse_status(self, complete: bool) -> str:
        if self._given_up:
            return "truncated"
        if self.decoder is not None and self.decoder.trouble:
            return self.decoder.trouble
        if not self._understood and (self._nonsense or complete):
            return "unknown_format"
        if self._nonsense:
            return "error"
        return "ok" if complete or self._end_mark else "partial"

    def _reply(self, columns: dict[str, Any]) -> Reply:
        facts = self.facts
        settled = self.events.settle(
            facts.counts.get("output_tokens"),
            facts.usage_is_whole,
            facts.counts.get("reasoning_tokens", 0),
        )
        columns["coalesced_reads"] = settled.coalesced_reads
        if settled.ntok_source is not None:
            columns["ntok_source"] = settled.ntok_source
        if settled.output_tokens is not None:
            columns["output_tokens"] = settled.output_tokens
            columns["output_tokens_source"] = settled.output_tokens_source
        t_ns = settled.t_ns
        answers = [i for i in map(settled.cls.find, (schema.TEXT, schema.TOOL)) if i >= 0]
        return Reply(
            columns,
            t_ns,
            settled.ntok,
            settled.cls,
            settled.choice if any(facts.finish) or any(settled.choice) else None,
            settled.aux_t_ns,
            settled.aux_cls,
            first_content_ns=t_ns[0] if t_ns else None,
            first_answer_ns=t_ns[min(answers)] if answers else None,
            last_content_ns=t_ns[-1] if t_ns else None,
            stream_error=self._failed,
            done=self._end_mark or (bool(facts.finish) and None not in facts.finish.values()),
        )


class WholeParser(ReplyParser):
    """A reply of one body, read when it is complete. A dialect gives `_body`."""

    def __init__(self, http_status: int) -> None:
        super().__init__(http_status)
        self._kept = bytearray()
        self._size = 0

    @abstractmethod
    def _body(self, data: bytes) -> bool:
        """Sets facts; False or any exception means: not understood."""

    def feed(self, data: bytes, t_ns: int, read: int) -> None:
        self.body_bytes += len(data)
        for piece in self._decoded(data):
            self._size += len(piece)
            if self._size <= WHOLE_LIMIT:
                self._kept += piece
            else:
                self._kept.clear()

    def finish(self, t_ns: int, complete: bool) -> Reply:
        trouble = None if self.decoder is None else self.decoder.trouble
        if self._size > WHOLE_LIMIT:
            trouble = "truncated"
        status = trouble or self._read(self._whole(complete))
        columns = self._columns(status)
        counts = self.facts.counts
        if "output_tokens" in counts:
            columns |= {"output_tokens": counts["output_tokens"], "output_tokens_source": "usage"}
        elif self.facts.output_ids is not None:
            columns["output_tokens"] = self.facts.output_ids
            columns["output_tokens_source"] = "token_ids"
        return self._bare(columns, done=status == "ok" and not self._failed)

    def _read(self, complete: bool) -> str:
        try:
            understood = self._body(bytes(self._kept))
        except Exception:  # noqa: BLE001 - whatever a server sends, the writer goes on
            understood = False
        self._kept.clear()
        if understood:
            return "ok"
        return "unknown_format" if complete else "partial"


class UnreadParser(ReplyParser):
    """A reply that is not read: an unknown dialect, or an unknown coding of its body."""

    def __init__(self, http_status: int, parse_status: str) -> None:
        super().__init__(http_status)
        self._parse_status = parse_status

    def feed(self, data: bytes, t_ns: int, read: int) -> None:
        self.body_bytes += len(data)

    def finish(self, t_ns: int, complete: bool) -> Reply:
        return self._bare(self._columns(self._parse_status), done=complete and not self._failed)
