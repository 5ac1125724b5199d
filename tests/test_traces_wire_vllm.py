"""Streams of a real vLLM on an H100, read as they were recorded."""

import gzip
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tokentape.traces import wire
from tokentape.traces.schema import EMPTY, ROLE, USAGE
from tokentape.traces.wire import Reply

DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data" / "vllm-h100"
pytestmark = pytest.mark.skipif(
    not DATA.exists(), reason="the recordings of a real vLLM are absent"
)


def recorded(name: str) -> list[dict[str, Any]]:
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


def read(request: dict[str, Any], chunks: Iterator[tuple[int, bytes]]) -> Reply:
    headers = {k.lower(): v for k, v in request["headers"].items()}
    parser = wire.reply_parser(
        wire.wire_format(request["url"]), True, request["status"], headers["content-type"], ""
    )
    t_ns = request["t_headers"]
    for i, (t_ns, data) in enumerate(chunks):
        parser.feed(data, t_ns, i)
    return parser.finish(t_ns, True)


def as_recorded(request: dict[str, Any]) -> Iterator[tuple[int, bytes]]:
    return ((t_ns, text.encode("latin-1")) for t_ns, text in request["chunks"])


def in_pieces(request: dict[str, Any], size: int) -> Iterator[tuple[int, bytes]]:
    body = b"".join(data for _, data in as_recorded(request))
    return ((0, body[i : i + size]) for i in range(0, len(body), size))


@pytest.mark.parametrize(
    ("name", "requests", "events", "empty", "output"),
    [("warm", 20, 2_876, 0, 2_876), ("low", 166, 27_423, 1, 27_435)],
)
def test_every_event_and_token_of_a_recording_is_found(
    name: str, requests: int, events: int, empty: int, output: int
) -> None:
    pairs = [(request, read(request, as_recorded(request))) for request in recorded(name)]
    assert len(pairs) == requests
    for request, reply in pairs:
        assert reply.columns["output_tokens"] == sum(reply.ntok) == request["n_out"]
        assert reply.columns["ntok_source"] == "usage_spread"
        assert reply.columns["finish_reason"] == ["length"]
        assert reply.columns["parse_status"] == "ok"
        assert reply.columns["model"] == "m"
        assert reply.done
        assert not reply.stream_error
        assert reply.choice is None
        assert list(reply.t_ns) == sorted(reply.t_ns)
        assert reply.aux_cls.count(ROLE) == ("chat" in request["url"])
        assert reply.aux_cls.count(USAGE) == 1
    replies = [reply for _, reply in pairs]
    assert sum(len(reply.t_ns) for reply in replies) == events
    assert sum(reply.cls.count(EMPTY) for reply in replies) == empty
    assert sum(sum(reply.ntok) for reply in replies) == output


def test_events_that_carry_three_tokens_are_found() -> None:
    replies = [read(request, as_recorded(request)) for request in recorded("low")]
    several = [k for k in chain.from_iterable(reply.ntok for reply in replies) if k != 1]
    assert several == [3] * 6


@pytest.mark.parametrize("size", [1, 100, 1_000, 65_536])
def test_pieces_of_any_size_hold_the_same_events(size: int) -> None:
    for request in recorded("warm")[:4]:
        whole, pieces = read(request, as_recorded(request)), read(request, in_pieces(request, size))
        for reply in (whole, pieces):
            del reply.columns["coalesced_reads"]
        assert pieces.columns == whole.columns
        assert pieces.ntok == whole.ntok
        assert pieces.cls == whole.cls
        assert pieces.aux_cls == whole.aux_cls
