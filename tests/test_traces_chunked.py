"""Chunked framing: cut anywhere, what passes is what came, and ends where it ends."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokentape.traces.chunked import ChunkDecoder, ChunkScanner

payloads = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=40), st.sampled_from([b"\r\n", b"0\r\n\r\n", b"a;\r\n5"])
    ),
    max_size=8,
)
extensions = st.sampled_from([b"", b";a=b", b" ;x", b"\t", b';q="' + b"e" * 2000 + b'"'])
trailers = st.sampled_from([b"", b"X-Sum: 1\r\n", b"a: b\r\n0: 0\r\n"])


def frame(data: bytes, extension: bytes = b"", digits: str = "%x") -> bytes:
    return (digits % len(data)).encode() + extension + b"\r\n" + data + b"\r\n"


def cut(data: bytes, points: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(p % (len(data) + 1) for p in points)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def through(scanner: ChunkScanner, pieces: list[bytes]) -> tuple[bytes, bytes, bytes]:
    """(interior, tail, what belongs to the next message), as the proxy would split them."""
    interior = tail = after = b""
    for piece in pieces:
        at = 0
        if not scanner.stopped:
            at = scanner.interior(piece, len(piece))
            interior += piece[:at]
        if at < len(piece):
            rest = piece[at:]
            taken = 0 if scanner.complete else scanner.tail(rest)
            tail += rest[:taken]
            after += rest[taken:]
    return interior, tail, after


@given(
    payloads,
    extensions,
    trailers,
    st.lists(st.integers(0, 5000), max_size=12),
    st.sampled_from(["%x", "%X", "%04x"]),
    st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n"]),
)
def test_wherever_it_is_cut_the_message_passes_whole_and_ends_at_its_end(
    parts: list[bytes],
    extension: bytes,
    trailer: bytes,
    points: list[int],
    digits: str,
    after: bytes,
) -> None:
    chunks = b"".join(frame(p, extension, digits) for p in parts)
    end = b"0" + extension + b"\r\n" + trailer + b"\r\n"
    scanner = ChunkScanner()
    pieces = cut(chunks + end + after, points)
    interior, tail, left = through(scanner, pieces)
    assert interior + tail == chunks + end
    assert chunks.startswith(interior) or interior.startswith(chunks)
    assert left == after
    assert scanner.complete
    assert not scanner.broken
    assert scanner.had_trailers == bool(trailer)
    decoder = ChunkDecoder()
    assert b"".join(decoder.feed(p) for p in pieces) == b"".join(parts)


@pytest.mark.parametrize(
    "line", [b"-5", b"0x3", b"1_0", b" 3", b"", b"g", b"1" * 17, b"3 3", b"5\n", b"+1", b";a"]
)
@given(points=st.lists(st.integers(0, 60), max_size=6))
def test_what_is_no_size_line_breaks_the_message_at_once_and_is_not_held(
    line: bytes, points: list[int]
) -> None:
    data = frame(b"hello") + line + b"\r\nabc\r\n"
    scanner = ChunkScanner()
    seen = 0
    for piece in cut(data, points):
        if scanner.stopped:
            break
        scanner.interior(piece, len(piece))
        seen += len(piece)
    assert scanner.broken
    assert not scanner.complete
    assert frame(b"hello").startswith(data[: min(seen, 10)])


def test_a_size_line_without_end_breaks_the_message_instead_of_growing() -> None:
    scanner = ChunkScanner()
    piece = b"a" * 1024
    assert scanner.interior(b"5;" + piece, len(piece) + 2) == len(piece) + 2
    reads = 0
    while not scanner.stopped:
        scanner.interior(piece, len(piece))
        reads += 1
        assert reads < 100
    assert scanner.broken


def test_after_a_gap_reading_goes_on_with_the_next_whole_chunk() -> None:
    decoder = ChunkDecoder()
    assert decoder.feed(frame(b"one") + b"5\r\nhe") == b"onehe"
    decoder.lose_place()
    assert decoder.feed(b"lo\r\n") == b""
    assert decoder.feed(b"3 is no size\r\n") == b""
    assert decoder.feed(frame(b"four") + frame(b"five")) == b"fourfive"
