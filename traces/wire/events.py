"""The events of one stream: flat arrays that grow with the reads, settled once at its end.

The arrays may be read while they grow. A message without text that may yet prove to stand for a
token waits among the aux messages; `settle` moves those that do and gives new arrays, so what was
read early is never wrong about times, only about such messages and about provisional `ntok`.
"""

from array import array
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tokentape.traces import schema
from tokentape.traces.wire import tokens
from tokentape.traces.wire.tokens import Candidate

_CHOICE_MAX = 255  # the column is UINT8


@dataclass
class Settled:
    """Final events of a stream, and its output tokens with their source."""

    t_ns: array[int]
    ntok: array[int]
    cls: bytearray
    choice: bytearray
    aux_t_ns: array[int]
    aux_cls: bytearray
    ntok_source: str | None
    output_tokens: int | None
    output_tokens_source: str | None
    coalesced_reads: int


class Events:
    """Grows by `event`, `aux` and `empty`; `t_ns` and `read` of the read at work are set before."""

    def __init__(self) -> None:
        self.t_ns: array[int] = array("q")
        self.ntok: array[int] = array("q")
        self.cls = bytearray()
        self.choice = bytearray()
        self.aux_t_ns: array[int] = array("q")
        self.aux_cls = bytearray()
        self.now_ns = 0
        self.read = 0
        self._reads: array[int] = array("q")
        self._bytes: array[int] = array("q")  # of text
        self._counts: array[int] = array("q")  # cumulative usage; as long as t_ns, or of no use
        self._last_count: dict[int, int] = {}
        self._with_ids = 0
        self.candidates: list[Candidate] = []

    @property
    def told(self) -> tuple[int, int]:
        """How many events came with their token ids, and how many with the usage so far."""
        return self._with_ids, len(self._counts)

    def resume(self, arrays: list[Any], told: tuple[int, int], candidates: list[Candidate]) -> None:
        """Go on behind the events of another process: the six arrays in the journal's order.

        Reads are told apart by their times, as they always are. Text sizes are not handed on, so
        tokens that are spread by usage are spread evenly over these events.
        """
        own = (self.t_ns, self.ntok, self.cls, self.choice, self.aux_t_ns, self.aux_cls)
        for kept, found in zip(own, arrays, strict=True):
            kept.extend(list(found))  # whatever its item size
        n = len(self.t_ns)
        times = sorted({*self.t_ns, *(c.t_ns for c in candidates)})
        ordinal = {t_ns: read for read, t_ns in enumerate(times, 1)}
        self._reads.extend(ordinal[t_ns] for t_ns in self.t_ns)
        self.candidates = [c._replace(read=ordinal[c.t_ns]) for c in candidates]
        self.read = len(times)
        self._bytes.extend([1] * n)
        self._with_ids = told[0]
        if told[1] == n:  # then each ntok is a difference, as `event` made it
            for ntok, choice in zip(self.ntok, self.choice, strict=True):
                self._last_count[choice] = self._last_count.get(choice, 0) + ntok
                self._counts.append(self._last_count[choice])

    def event(self, cls: int, text_bytes: int, choice: int, ids: int = -1, count: int = -1) -> None:
        """An event: ids is the length of its token ids, count the usage so far; -1 is not told."""
        self.t_ns.append(self.now_ns)
        self.cls.append(cls)
        self.choice.append(choice if 0 <= choice <= _CHOICE_MAX else _CHOICE_MAX)
        self._reads.append(self.read)
        self._bytes.append(text_bytes)
        if ids < 0 and count < 0:
            self.ntok.append(1)
            return
        ntok = 1
        if ids >= 0:
            self._with_ids += 1
            ntok = ids
        if count >= 0:
            if ids < 0:
                ntok = max(0, count - self._last_count.get(choice, 0))
            self._counts.append(count)
            self._last_count[choice] = count
        self.ntok.append(min(ntok, tokens.NTOK_MAX))

    def aux(self, cls: int) -> None:
        """A message that is no event."""
        self.aux_t_ns.append(self.now_ns)
        self.aux_cls.append(cls)

    def empty(self, choice: int, finish: bool, over: bool, ids: int = -1, count: int = -1) -> None:
        """A message of a choice without text: an event where tokens are told, else a candidate.

        over: the choice gave its finish reason before, so no token can be meant.
        """
        counting = len(self._counts) == len(self.t_ns)  # else it may be the total, come once
        if ids > 0 or (ids < 0 and counting and count > self._last_count.get(choice, 0)):
            self.event(schema.EMPTY, 0, choice, ids, count)
        elif count >= 0 and not finish:
            self.aux(schema.USAGE)
        else:
            if ids < 0 and not over:
                place = (len(self.t_ns), len(self.aux_t_ns))
                self.candidates.append(Candidate(*place, self.now_ns, self.read, choice, finish))
            self.aux(schema.FINISH if finish else schema.OTHER)

    def settle(self, total: int | None, total_is_whole: bool, hidden: int) -> Settled:
        """Final events; total is usage's output tokens, hidden those of reasoning by usage.

        total_is_whole: the usage came by itself, so that it is surely the sum over all choices.
        """
        several = any(self.choice)
        n = len(self.t_ns)
        chosen: list[Candidate] = []
        ntok: list[int] | None
        if n and self._with_ids == n:
            return self._settled(chosen, list(self.ntok), "token_ids", total, "token_ids")
        if n and len(self._counts) == n:
            if several and not total_is_whole:
                total = None
            ntok = tokens.from_cumulative(self._counts, self.choice, total)
            if ntok is not None:
                return self._settled(chosen, ntok, "usage_cumulative", total, "usage")
        if total is None:
            return self._settled(chosen, [1] * n, "one_per_event", None, "events")
        hidden = 0 if schema.REASONING in self.cls else hidden
        chosen = tokens.promoted(self.candidates, total - n, hidden)
        visible = total - min(hidden, max(0, total - n - len(chosen)))
        text_bytes = tokens.inserted(self._bytes, chosen, [0] * len(chosen))
        return self._settled(
            chosen, tokens.spread(visible, text_bytes), "usage_spread", total, "usage"
        )

    def _settled(
        self,
        chosen: list[Candidate],
        ntok: list[int],
        method: str,
        total: int | None,
        without_total: str,
    ) -> Settled:
        """Arrays with the chosen candidates moved in; without_total: the source without usage."""
        ntok = [min(k, tokens.NTOK_MAX) for k in ntok]
        known = ntok or total is not None
        reads = tokens.inserted(self._reads, chosen, [c.read for c in chosen])
        return Settled(
            tokens.inserted(self.t_ns, chosen, [c.t_ns for c in chosen]),
            array("q", ntok),
            tokens.inserted(self.cls, chosen, [schema.EMPTY] * len(chosen)),
            tokens.inserted(self.choice, chosen, [_choice(c.choice) for c in chosen]),
            tokens.without(self.aux_t_ns, chosen),
            tokens.without(self.aux_cls, chosen),
            ntok_source=tokens.source(method, ntok, total) if known else None,
            output_tokens=total if total is not None else sum(ntok) if ntok else None,
            output_tokens_source="usage" if total is not None else without_total if ntok else None,
            coalesced_reads=_shared(reads),
        )


def _choice(choice: int) -> int:
    """A choice's number as the column holds it, whatever a server called it."""
    return choice if 0 <= choice <= _CHOICE_MAX else _CHOICE_MAX


def _shared(reads: array[int]) -> int:
    """Reads that completed more than one event."""
    several, before = 0, None
    for read, following in pairwise(reads):
        if read == following != before:
            several += 1
        before = read
    return several
