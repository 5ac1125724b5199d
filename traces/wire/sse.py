"""Server-sent events from bytes cut anywhere: `feed` takes a read, gives the messages it completed.

Works on bytes only, so a character split over two reads is never seen apart. Line ends are LF, CR
and CRLF, mixed at will. It knows nothing of what the data means, and it never holds more than
LIMIT bytes of one message: a longer one is given up and reported, and reading goes on behind it.
"""

from typing import Final

LIMIT: Final = 4 << 20  # bytes of one message, comments aside; no honest event comes near it
_BOM: Final = b"\xef\xbb\xbf"
_LF, _CR, _COLON = b"\n", ord("\r"), ord(":")

# (name, data): name is b"" for a plain message and None for a comment line (data is then b"");
# data is None for a message that was longer than LIMIT.
type Message = tuple[bytes | None, bytes | None]


class SseReader:
    """Incremental reader; the messages do not depend on how the bytes were cut."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._between = False  # nothing of a message or of a line end is pending
        self._at_start = True  # a byte-order mark may still come
        self._after_cr = False  # a line feed that comes next belongs to the last line end
        self._tail = bytearray()  # the line that is not complete yet
        self._name = b""
        self._data: bytes | None = None
        self._more: list[bytes] = []  # second and further data lines
        self._size = 0  # bytes of the message so far, comments aside
        self._given_up = False
        self._elsewhere = False  # another process held the beginning of this message

    def feed(self, data: bytes) -> list[Message]:
        """Messages and comments that end in these bytes, in order."""
        # The common read is one message, whole. (A bytes object `in` bytes is ten times slower.)
        if self._between and data.startswith(b"data: ") and data.endswith(b"\n\n"):
            size = len(data) - 2
            if data.find(_LF) == size and _CR not in data and size <= self._limit:
                return [(b"", data[6:size])]
        out = self._feed(data)
        self._between = not (
            self._tail
            or self._after_cr
            or self._at_start
            or self._name
            or self._given_up
            or self._data is not None
        )
        return out

    @property
    def place(self) -> list[int]:
        """Whether a line feed may follow; empty where no part of a message is held."""
        held = self._tail or self._name or self._given_up or self._data is not None
        return [int(self._after_cr)] if held else []

    def resume(self, place: list[int]) -> None:
        """Skip the message whose beginning another process held, and do not report it."""
        self._after_cr, self._at_start = bool(place[0]), False
        self._given_up = self._elsewhere = True
        self._tail[:] = b"" if self._after_cr else b"?"  # a line that is not blank

    def _feed(self, data: bytes) -> list[Message]:
        if self._at_start or self._after_cr:
            data = self._skip_marks(data)
        if not data:
            return []
        lines = data.splitlines()  # for bytes: LF, CR and CRLF, nothing else
        last = data[-1]
        tail = self._tail
        if last not in b"\r\n":
            rest = lines.pop()
            if tail and lines:
                lines[0] = bytes(tail) + lines[0]
                tail.clear()
            out = self._take(lines) if lines else []
            tail += rest
            self._bound_tail()
            return out
        if tail:
            lines[0] = bytes(tail) + lines[0]
            tail.clear()
        self._after_cr = last == _CR
        return self._take(lines)

    def flush(self) -> list[Message]:
        """The last message where its blank line never came."""
        lines = [bytes(self._tail), b""] if self._tail else [b""]
        self._tail.clear()
        return self._take(lines)

    def _skip_marks(self, data: bytes) -> bytes:
        if self._after_cr and data:
            self._after_cr = False
            data = data.removeprefix(b"\n")
        if self._at_start:
            data = bytes(self._tail) + data
            self._tail.clear()
            if len(data) < len(_BOM) and _BOM.startswith(data):
                self._tail += data
                return b""
            self._at_start = False
            data = data.removeprefix(_BOM)
        return data

    def _take(self, lines: list[bytes]) -> list[Message]:
        out: list[Message] = []
        for line in lines:
            if not line:
                if self._data is not None or self._name or self._given_up:
                    out += self._end()
                self._size = 0
            elif self._given_up:
                continue
            elif line[0] == _COLON:
                out.append((None, b""))
            else:
                self._size += len(line)
                if self._size > self._limit:
                    self._give_up()
                elif line.startswith(b"data: "):
                    self._add(line[6:])
                else:
                    self._field(line)
        return out

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._add(value)
        elif name == b"event":
            self._name = value

    def _add(self, value: bytes) -> None:
        if self._data is None:
            self._data = value
        else:
            self._more.append(value)

    def _end(self) -> list[Message]:
        data, name = self._data, self._name
        if self._more:
            data = b"\n".join((data or b"", *self._more))
            self._more = []
        message: Message = (name, None if self._given_up else data or b"")
        messages = [] if self._elsewhere else [message]
        self._data, self._name, self._given_up, self._elsewhere = None, b"", False, False
        return messages

    def _give_up(self) -> None:
        self._given_up = True
        self._data, self._more = None, []

    def _bound_tail(self) -> None:
        tail = self._tail
        if len(tail) + self._size <= self._limit:
            return
        if tail[0] == _COLON:
            if len(tail) > self._limit:
                del tail[1:]  # still a comment, whatever it says
        else:
            self._give_up()
            tail[:] = b"?"  # still a line that is not blank
