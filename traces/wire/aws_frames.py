"""Amazon's binary event stream: `feed` takes a read, gives the messages it completed.

A message is a prelude (total and header length, CRC of both), headers, a payload and a CRC of all.
Its name is the `:event-type`, or `!` and the `:exception-type` or `:error-code`. A message whose
CRC is wrong is reported and given up. Where a prelude is wrong, or the place was lost, the next
eight bytes with the right CRC behind them are where a message begins again. Source: the
specification `amazon-eventstream` of Smithy, and botocore's eventstream.py, which the tests run.
"""

from struct import Struct
from typing import Final
from zlib import crc32

from tokentape.traces.wire.sse import LIMIT, Message

_PRELUDE: Final = Struct(">III")
_CRC: Final = Struct(">I")
_LEAST: Final = 16  # prelude and last CRC
_MOST_HEADERS: Final = 128 << 10  # bytes, by the specification
# Bytes of a header's value by its type; of the types that are not here a length comes first.
_SIZES: Final = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}
_BYTES, _TEXT = 6, 7
_NAMES: Final = (b":event-type", b":exception-type", b":error-code")


class FrameReader:
    """Incremental reader; the messages do not depend on how the bytes were cut."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._tail = bytearray()
        self._skip = 0  # bytes of a message beyond the limit that are still to come
        self._lost = False  # a message's beginning is being looked for

    def feed(self, data: bytes) -> list[Message]:
        """Messages that end in these bytes, in order."""
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        self._tail += memoryview(data)[skipped:]
        out: list[Message] = []
        at = 0
        while len(self._tail) - at >= _PRELUDE.size:
            total, headers, crc = _PRELUDE.unpack_from(self._tail, at)
            if crc32(memoryview(self._tail)[at : at + 8]) != crc or not _fits(total, headers):
                if not self._lost:
                    out.append((b"", None))
                    self._lost = True
                at += 1
                continue
            self._lost = False
            if total > self._limit:
                out.append((b"", None))
                self._skip = max(0, total - (len(self._tail) - at))
                at = min(len(self._tail), at + total)
            elif len(self._tail) - at < total:
                break
            else:
                out.append(_message(self._tail, at, total, headers))
                at += total
        del self._tail[:at]
        return out

    @property
    def place(self) -> list[int]:
        """Bytes to the end of the message; 0 where its prelude is not whole or is being sought."""
        if self._skip:
            return [self._skip]
        if not self._tail:
            return []
        if self._lost or len(self._tail) < _PRELUDE.size:
            return [0]
        return [_PRELUDE.unpack_from(self._tail)[0] - len(self._tail)]

    def resume(self, place: list[int]) -> None:
        """Skip the message whose beginning another process held, and do not report it."""
        (self._skip,) = place
        self._lost = not self._skip

    def flush(self) -> list[Message]:
        """Half a message is none."""
        return []


def _fits(total: int, headers: int) -> bool:
    return headers <= _MOST_HEADERS and total >= headers + _LEAST


def _message(tail: bytearray, at: int, total: int, headers: int) -> Message:
    end = at + total - _CRC.size
    frame = bytes(memoryview(tail)[at:end])
    if crc32(frame) != _CRC.unpack_from(tail, end)[0]:
        return (b"", None)
    named = _named(frame[_PRELUDE.size : _PRELUDE.size + headers])
    name = next((named[key] for key in _NAMES if key in named), b"")
    if named.get(b":message-type") in (b"exception", b"error"):
        name = b"!" + name
    return (name, frame[_PRELUDE.size + headers :])


def _named(headers: bytes) -> dict[bytes, bytes]:
    """The headers that are text; what is malformed ends them."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at + 2 <= len(headers):
        name = headers[at + 1 : at + 1 + headers[at]]
        at += 1 + headers[at]
        kind = headers[at] if at < len(headers) else -1
        at += 1
        size = _SIZES.get(kind, -1)
        if kind in (_BYTES, _TEXT) and at + 2 <= len(headers):
            size = int.from_bytes(headers[at : at + 2])
            at += 2
        if size < 0 or at + size > len(headers):
            break
        if kind == _TEXT:
            found[name] = headers[at : at + size]
        at += size
    return found
