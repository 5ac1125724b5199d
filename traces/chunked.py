"""HTTP/1.1 chunked framing, sans-io: where a message ends (proxy), what it carried (writer).

The framing itself passes the proxy untouched, so nothing here ever holds bytes back: a size line
may be cut anywhere. Never raises on what a server sent; a line that is no size line makes the
message `broken`, and then only its sender knows where it ends.
Source: RFC 9112, section 7.1.
"""

import re
from typing import Final

_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]*)?\r\n")
_SHORT_SIZES: Final = {b"%x\r\n" % n: n for n in range(1, 4096)}  # of nearly all events
_MAX_LINE_BYTES: Final = 64 << 10  # a size line or a trailer that is longer breaks the message


class ChunkScanner:
    """Follows one message through its reads.

    `interior` consumes what comes before the terminal chunk, `tail` the terminal chunk and the
    trailers. `stopped` says that the interior has ended, for better (`complete` follows) or worse
    (`broken`).
    """

    __slots__ = ("_line", "_skip", "broken", "complete", "stopped", "trailer_bytes")

    def __init__(self) -> None:
        self._skip = 0  # bytes of chunk data and its CRLF that are still to come
        self._line = b""  # the beginning of a line whose end has not come
        self.stopped = self.broken = self.complete = False
        self.trailer_bytes = 0

    def interior(self, data: bytes, size: int) -> int:
        """How many of the `size` bytes of `data` belong to interior chunks.

        Fewer than `size`: the terminal chunk's size line goes on there, or a line that is none.
        """
        if not self._skip and not self._line:  # mostly, a read is one whole chunk
            line_end = data.find(b"\n", 0, 8) + 1
            length = _SHORT_SIZES.get(data[:line_end])
            if length is not None and line_end + length + 2 == size:
                return size
        at = self._skip
        if at >= size:
            self._skip = at - size
            return size
        if self._line:
            at = self._finish_line(data, size)
            if at < 0:
                return size if not self.stopped else 0
        match = _SIZE.match
        while at < size:
            found = match(data, at, size)
            if found is None:
                return self._begin_line(data, at, size)
            length = int(found[1], 16)
            if not length:
                self.stopped = True
                self._skip = 0
                return at
            at = found.end() + length + 2
        self._skip = at - size
        return size

    def _begin_line(self, data: bytes, at: int, size: int) -> int:
        """No whole size line at `at`: keep its beginning in mind, or stop at a bad one."""
        line = data[at:size]
        self._skip = 0
        if b"\n" in line or not _may_become_size(line):
            self.stopped = self.broken = True
            return at
        self._line = line
        return size

    def _finish_line(self, data: bytes, size: int) -> int:
        """Where the chunk after the line that was cut ends; -1 when the line has not ended well."""
        end = data.find(b"\n", 0, size) + 1
        line = self._line + data[: end or size]
        if not end and _may_become_size(line):
            self._line = line
            return -1
        found = _SIZE.fullmatch(line) if end else None
        if found is None:
            self.stopped = self.broken = True
            return -1
        length = int(found[1], 16)
        if not length:
            self.stopped = True
            return -1
        self._line = b""
        return end + length + 2

    def tail(self, data: bytes) -> int:
        """After the interior: how many bytes of `data` belong to this message.

        Sets `complete` when its end was found, `broken` when a line cannot be part of it.
        """
        at = 0
        while not self.complete and not self.broken:
            end = data.find(b"\n", at) + 1
            line = self._line + data[at : end or len(data)]
            if not end:
                self._line = line
                self.broken = len(line) > _MAX_LINE_BYTES
                return len(data)
            at = end
            self._line = b""
            if _SIZE.fullmatch(line) and not self.trailer_bytes:
                self.trailer_bytes = 1  # the terminal size line: trailers may follow
            elif line.strip(b"\r\n") == b"" and self.trailer_bytes:
                self.complete = True
            elif self.trailer_bytes:
                self.trailer_bytes += len(line)
            else:
                self.broken = True
        return at if self.complete else len(data)

    @property
    def had_trailers(self) -> bool:
        """Whether the message ended with trailers."""
        return self.trailer_bytes > 1


class ChunkDecoder:
    """Takes the framing off what `ChunkScanner` let pass."""

    __slots__ = ("_left", "_line", "_lost", "_over")

    def __init__(self) -> None:
        self._left = 0  # bytes of chunk data and its CRLF that are still to come
        self._line = b""
        self._over = self._lost = False

    def lose_place(self) -> None:
        """Pieces are missing here: go on with the next piece that begins with a whole size line."""
        self._left, self._line, self._lost = 0, b"", True

    @property
    def place(self) -> int | None:
        """Bytes until the next size line, for `resume`; None where that is not known."""
        return None if self._lost or self._line else self._left

    @classmethod
    def resume(cls, place: int | None) -> "ChunkDecoder":
        """A decoder that goes on where another one was."""
        decoder = cls()
        if place is None:
            decoder.lose_place()
        else:
            decoder._left = place
        return decoder

    def feed(self, data: bytes) -> bytes:
        """The chunk data in `data`, of all its chunks; empty once the message is over or broken."""
        if self._lost:
            if not _begins_chunk(data):
                return b""
            self._lost = False
        if self._line:
            data, self._line = self._line + data, b""
        at, size = 0, len(data)
        pieces = []
        while at < size and not self._over:
            if self._left:
                end = at + self._left
                pieces.append(data[at : max(at, min(end - 2, size))])
                self._left = max(end - size, 0)
                at = end
                continue
            found = _SIZE.match(data, at)
            if found is None:
                line = data[at:]
                if b"\n" not in line and len(line) <= _MAX_LINE_BYTES:
                    self._line = line
                else:
                    self._over = True
                break
            length = int(found[1], 16)
            self._over = not length
            self._left = length + 2
            at = found.end()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


_START = re.compile(rb"[0-9A-Fa-f]{1,16}[ \t]*(?:;[^\r\n]*)?\r?")


def _may_become_size(line: bytes) -> bool:
    """Whether a line that has not ended can still become a size line."""
    return len(line) <= _MAX_LINE_BYTES and (line == b"" or _START.fullmatch(line) is not None)


def _begins_chunk(data: bytes) -> bool:
    """Whether a chunk begins here, judged by the CRLF after its data where that is in sight."""
    found = _SIZE.match(data)
    if found is None or not int(found[1], 16):
        return False
    end = found.end() + int(found[1], 16)
    return data[end : end + 2] in (b"\r\n", b"\r", b"")
