"""Messages that are the objects of one growing JSON array, as Gemini sends them without SSE.

Only brackets and quotes are looked at: what an object means, and whether it is sound, is for its
reader. It never holds more than LIMIT bytes of an object: a longer one is given up and reported.
"""

import re
from typing import Final

from tokentape.traces.wire.sse import LIMIT, Message

_MARK: Final = re.compile(rb'["\\{}\[\]]')
_QUOTE, _ESCAPE = b'"', b"\\"


class JsonArrayReader:
    """Incremental reader; the messages do not depend on how the bytes were cut."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._kept = bytearray()  # the object that is not complete yet
        self._depth = 0  # brackets open since it began, 0 between objects
        self._in_text = False
        self._escaped = False  # the next byte is part of an escape
        self._given_up = False
        self._elsewhere = False  # another process held the beginning of this object

    @property
    def place(self) -> list[int]:
        """Depth, and whether in a text and in an escape; empty between objects."""
        return [self._depth, int(self._in_text), int(self._escaped)] if self._depth else []

    def resume(self, place: list[int]) -> None:
        """Skip the object whose beginning another process held, and do not report it."""
        self._depth, self._in_text, self._escaped = place[0], bool(place[1]), bool(place[2])
        self._given_up = self._elsewhere = True

    def feed(self, data: bytes) -> list[Message]:
        """Objects that end in these bytes, in order."""
        if not data:
            return []
        out: list[Message] = []
        begin = 0  # of the object at work
        skipped = 0 if self._escaped else -1  # a place that an escape takes the meaning of
        for mark in _MARK.finditer(data):
            at, sign = mark.start(), mark[0]
            if at == skipped:
                continue
            if self._in_text:
                self._in_text = sign != _QUOTE
                if sign == _ESCAPE:
                    skipped = at + 1
            elif self._depth:
                self._step(sign)
                if not self._depth:
                    self._keep(data[begin : at + 1])
                    out += self._end()
            elif sign == b"{":
                begin, self._depth = at, 1
        if self._depth:
            self._keep(data[begin:])
        self._escaped = self._in_text and skipped == len(data)
        return out

    def _step(self, sign: bytes) -> None:
        """Take a mark that stands in an object and in no text."""
        if sign == _QUOTE:
            self._in_text = True
        elif sign in b"{[":
            self._depth += 1
        elif sign in b"}]":
            self._depth -= 1

    def flush(self) -> list[Message]:
        """The last object where its end never came."""
        if not self._depth:
            return []
        self._depth, self._in_text = 0, False
        return self._end()

    def _keep(self, data: bytes) -> None:
        if self._given_up:
            return
        self._kept += data
        if len(self._kept) > self._limit:
            self._given_up = True
            self._kept.clear()

    def _end(self) -> list[Message]:
        message: Message = (b"", None if self._given_up else bytes(self._kept))
        messages = [] if self._elsewhere else [message]
        self._given_up = self._elsewhere = False
        self._kept.clear()
        return messages
