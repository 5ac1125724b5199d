"""SSE framing: the messages must not depend on how the bytes were cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokentape.traces.wire.sse import LIMIT, Message, SseReader

STREAM = (
    b"\xef\xbb\xbf: hello\n\n"
    b'data: {"a": "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80"}\n\n'
    b"event: ping\r\ndata: {}\r\n\r\n"
    b"data:no space\rdata: second\r\r"
    b": comment inside\r\nid: 7\nretry: 5\ndata: x\r\n\n"
    b"data\n\n\n\n"
    b"event: bare\n\n"
    b"data: last, with no blank line"
)
MESSAGES: list[Message] = [
    (None, b""),
    (b"", '{"a": "é€😀"}'.encode()),
    (b"ping", b"{}"),
    (b"", b"no space\nsecond"),
    (None, b""),
    (b"", b"x"),
    (b"", b""),
    (b"bare", b""),
    (b"", b"last, with no blank line"),
]


def read(parts: list[bytes], limit: int = LIMIT) -> list[Message]:
    reader = SseReader(limit)
    return [m for part in parts for m in reader.feed(part)] + reader.flush()


def test_one_read_gives_every_message() -> None:
    assert read([STREAM]) == MESSAGES


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pieces_of_any_size_give_the_same_messages(size: int) -> None:
    parts = [STREAM[i : i + size] for i in range(0, len(STREAM), size)]
    assert read(parts) == MESSAGES


def test_a_cut_at_every_byte_gives_the_same_messages() -> None:
    for cut in range(len(STREAM) + 1):
        assert read([STREAM[:cut], STREAM[cut:]]) == MESSAGES, cut


@given(
    st.lists(
        st.sampled_from(
            b"\n|\r|\r\n|data: |data:|x|:|event: e|\xef\xbb\xbf|data: y\n\n|12345678".split(b"|")
        ),
        max_size=40,
    ),
    st.data(),
)
def test_random_bytes_cut_at_random_are_read_the_same(
    parts: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(parts)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12).map(sorted))
    edges = [0, *cuts, len(stream)]
    pieces = [stream[a:b] for a, b in pairwise(edges)]
    limit = data.draw(st.sampled_from([LIMIT, 20, 9]))
    assert read(pieces, limit) == read([stream], limit)


def test_a_carriage_return_and_a_line_feed_in_two_reads_are_one_line_end() -> None:
    reader = SseReader()
    assert reader.feed(b"data: a\r") == []
    assert reader.feed(b"\ndata: b\r\n") == []
    assert reader.feed(b"\r") == [(b"", b"a\nb")]
    assert reader.feed(b"\n") == []
    assert reader.feed(b"data: c\n\n") == [(b"", b"c")]


def test_a_message_is_given_with_the_read_that_ends_it() -> None:
    reader = SseReader()
    assert reader.feed(b"data: a") == []
    assert reader.feed(b"\n") == []
    assert reader.feed(b"\n: c") == [(b"", b"a")]
    assert reader.feed(b"\n") == [(None, b"")]


@pytest.mark.parametrize("step", [1 << 20, 1 << 16, LIMIT * 2])
def test_trap_22_a_message_over_the_cap_is_given_up_and_reading_goes_on(step: int) -> None:
    stream = b"data: a\n\ndata: " + b"x" * LIMIT + b"\ndata: y\nevent: e\n\ndata: b\n\n"
    reader = SseReader()
    out: list[Message] = []
    for i in range(0, len(stream), step):
        out += reader.feed(stream[i : i + step])
        assert len(reader._tail) <= LIMIT
    assert out == [(b"", b"a"), (b"", None), (b"", b"b")]


def test_a_message_of_exactly_the_cap_is_kept() -> None:
    line = b"data: " + b"x" * 14
    assert read([line + b"\n\n"], 20) == [(b"", b"x" * 14)]
    assert read([line + b"x\n\n"], 20) == [(b"", None)]


def test_an_endless_comment_is_bounded_and_is_still_a_comment() -> None:
    reader = SseReader(limit=100)
    for _ in range(50):
        assert reader.feed(b":" + b"c" * 30) == []
        assert len(reader._tail) <= 131
    assert reader.feed(b"\ndata: a\n\n") == [(None, b""), (b"", b"a")]
