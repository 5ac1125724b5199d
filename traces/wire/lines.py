"""Messages that are one line each (NDJSON): `feed` takes a read, gives the lines it completed.

Works on bytes, so a character split over two reads is never seen apart; blank lines are none. It
never holds more than LIMIT bytes of a line: a longer one is given up and reported.
"""

from typing import Final

from tokentape.traces.wire.sse import LIMIT, Message

_BOM: Final = b"\xef\xbb\xbf"


class LineReader:
    """Incremental reader; the messages do not depend on how the bytes were cut."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._tail = bytearray()  # the line that is not complete yet
        self._given_up = False
        self._elsewhere = False  # another process held the beginning of this line
        self._at_start = True

    def feed(self, data: bytes) -> list[Message]:
        """Lines that end in these bytes, in order."""
        first, *others = data.split(b"\n")
        self._add(first)
        out: list[Message] = []
        for line in others:
            out += self._end()
            self._add(line)
        return out

    @property
    def place(self) -> list[int]:
        """Not empty where a part of a line is held."""
        return [1] if self._tail or self._given_up else []

    def resume(self, place: list[int]) -> None:
        """Skip the line whose beginning another process held, and do not report it."""
        self._given_up = self._elsewhere = True

    def flush(self) -> list[Message]:
        """The last line where its end never came."""
        return self._end()

    def _add(self, data: bytes) -> None:
        if self._given_up:
            return
        self._tail += data
        if len(self._tail) > self._limit:
            self._given_up = True
            self._tail.clear()

    def _end(self) -> list[Message]:
        line = bytes(self._tail)
        if self._at_start:
            line = line.removeprefix(_BOM)
        given_up, self._given_up, self._at_start = self._given_up, False, False
        self._tail.clear()
        if self._elsewhere:
            self._elsewhere = False
            return []
        if given_up:
            return [(b"", None)]
        line = line.strip()
        return [(b"", line)] if line else []
