"""Compressed bodies, decoded read by read: what a server flushed is given out with its read.

The times of events are those of the compressed bytes that brought them. Output comes in pieces of
bounded size, and a body that grows past what text can is given up (a bomb), as is a damaged one;
what was given out before stays good. It never raises on foreign bytes.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

import brotli
import zstandard

RATIO: Final = (
    250  # decoded bytes to wire bytes; deflate can reach 1,032, a flushed stream about 10
)
FREE_BYTES: Final = 1 << 20  # decoded, before the ratio is looked at
LIMIT_BYTES: Final = 256 << 20  # decoded, of one body: a million events of a usual size
_PIECE_BYTES: Final = 256 << 10
_ZSTD_WINDOW_BYTES: Final = 8 << 20  # RFC 9659, section 3: more must not be asked for
# A block of zstd makes up to 128 KiB out of 4 bytes, and its decoder takes no limit: so few bytes
# at a time make 4 MiB at most.
_ZSTD_INPUT_BYTES: Final = 128
_ERRORS: Final = (zlib.error, brotli.error, zstandard.ZstdError)


class _Member(Protocol):
    """A self-contained part of a body. `unused` is what follows it, None while it is not over."""

    unused: bytes | None

    def pieces(self, data: bytes) -> Iterator[bytes]: ...


class _Inflate:
    """What zlib reads: `wbits` tells gzip, zlib and raw deflate apart."""

    def __init__(self, wbits: int) -> None:
        self._inflate = zlib.decompressobj(wbits)
        self.unused: bytes | None = None

    def pieces(self, data: bytes) -> Iterator[bytes]:
        while True:
            piece = self._inflate.decompress(data, _PIECE_BYTES)
            yield piece
            if self._inflate.eof:
                self.unused = self._inflate.unused_data
                return
            data = self._inflate.unconsumed_tail
            if not data and len(piece) < _PIECE_BYTES:
                return


class _Brotli:
    def __init__(self) -> None:
        self._decoder: Any = brotli.Decompressor()
        self.unused: bytes | None = None

    def pieces(self, data: bytes) -> Iterator[bytes]:
        while True:
            yield self._decoder.process(data, output_buffer_limit=_PIECE_BYTES)
            if self._decoder.is_finished():
                self.unused = b""
                return
            if self._decoder.can_accept_more_data():
                return
            data = b""


class _Zstd:
    def __init__(self) -> None:
        reader = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
        self._decoder = reader.decompressobj()
        self.unused: bytes | None = None

    def pieces(self, data: bytes) -> Iterator[bytes]:
        for at in range(0, len(data), _ZSTD_INPUT_BYTES):
            end = at + _ZSTD_INPUT_BYTES
            yield self._decoder.decompress(data[at:end])
            if self._decoder.eof:
                self.unused = self._decoder.unused_data + data[end:]
                return


def _deflate(data: bytes) -> _Member:
    """RFC 9110 means zlib's form by `deflate`; some servers send it bare."""
    return _Inflate(zlib.MAX_WBITS if data[0] & 0x0F == zlib.DEFLATED else -zlib.MAX_WBITS)


_MEMBERS: Final[dict[str, Callable[[bytes], _Member]]] = {
    "gzip": lambda _: _Inflate(16 + zlib.MAX_WBITS),
    "deflate": _deflate,
    "br": lambda _: _Brotli(),
    "zstd": lambda _: _Zstd(),
}
CODINGS: Final = frozenset(_MEMBERS)


def coding_of(header: str) -> str:
    """The coding that a content-encoding header names: lower case, empty where there is none."""
    coding = header.strip().lower()
    return {"identity": "", "x-gzip": "gzip"}.get(coding, coding)


class Decoder:
    """Decodes one body. `trouble` is the parse_status of a body that was given up, else None."""

    def __init__(self, coding: str) -> None:
        """`coding` is one of CODINGS."""
        self._begin = _MEMBERS[coding]
        self._member: _Member | None = None
        self._wire_bytes = 0
        self._decoded_bytes = 0
        self._lost = False
        self.trouble: str | None = None

    @property
    def complete(self) -> bool:
        """Whether the body ended where its coding says so."""
        return self._member is None and not self._lost and self.trouble is None

    def lose_place(self) -> None:
        """Bytes are missing here: nothing that follows can be decoded."""
        self._lost, self._member = True, None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What these bytes of the body decode to, in pieces; take all of them before the next."""
        self._wire_bytes += len(data)
        if self._lost or self.trouble:
            return
        try:
            for piece in self._pieces(data):
                self._decoded_bytes += len(piece)
                most = min(LIMIT_BYTES, FREE_BYTES + RATIO * self._wire_bytes)
                if self._decoded_bytes > most:
                    self._give_up("truncated")
                    return
                if piece:
                    yield piece
        except _ERRORS:
            self._give_up("error")

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        """Of one member after the other: gzip and zstd may have several."""
        while data:
            if self._member is None:
                if self._wire_bytes > len(data) and not data.strip(b"\0"):
                    return  # padding
                self._member = self._begin(data)
            yield from self._member.pieces(data)
            if self._member.unused is None:
                return
            data, self._member = self._member.unused, None

    def _give_up(self, trouble: str) -> None:
        self.trouble, self._member = trouble, None


def decoded(body: bytes | bytearray, coding: str, most_bytes: int) -> tuple[bytearray, str | None]:
    """A whole body, and the parse_status that speaks against it: None where it is sound.

    Args: coding: as `coding_of` gives it; any may come. most_bytes: of the decoded body.
    """
    if coding not in CODINGS:
        return bytearray(), "encoded"
    decoder, out = Decoder(coding), bytearray()
    for piece in decoder.feed(bytes(body)):
        out += piece
        if len(out) > most_bytes:
            return bytearray(), "truncated"
    return out, decoder.trouble or (None if decoder.complete else "partial")
