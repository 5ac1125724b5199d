"""Compressed bodies: read as plain ones are, with the times of their wire bytes; bombs are not."""

import json
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import brotli
import pytest
import zstandard

from test_traces_inherit import journaled, kill
from test_traces_recording import SSE as SSE_HEAD
from test_traces_recording import start
from tokentape.traces.check import check
from tokentape.traces.reader import open_tape
from tokentape.traces.wire.encoding import Decoder, decoded
from tokentape.traces.wire.reply import WHOLE_LIMIT
from wire_streams import JSON, SAMPLES, read, untimed

CODINGS = ["gzip", "deflate", "br", "zstd"]
every_coding = pytest.mark.parametrize("coding", CODINGS)
CANARY = "CANARYdonotkeepthis"


def packed(coding: str, parts: list[bytes], wbits: int | None = None) -> list[bytes]:
    """Each part as a server sends it that flushes behind each; the body's end comes by itself."""
    if coding == "br":
        squeeze: Any = brotli.Compressor()
        flushed = [squeeze.process(part) + squeeze.flush() for part in parts]
        return [*flushed, squeeze.finish()]
    if coding == "zstd":
        squeeze = zstandard.ZstdCompressor().compressobj()
        block = zstandard.COMPRESSOBJ_FLUSH_BLOCK
        return [squeeze.compress(p) + squeeze.flush(block) for p in parts] + [squeeze.flush()]
    squeeze = zlib.compressobj(wbits=wbits or (31 if coding == "gzip" else 15))
    flushed = [squeeze.compress(p) + squeeze.flush(zlib.Z_SYNC_FLUSH) for p in parts]
    return [*flushed, squeeze.flush()]


def without_size(reply: Any) -> dict[str, Any]:
    told = untimed(reply)
    return {**told, "columns": {**told["columns"], "response_bytes": 0}}


@every_coding
@pytest.mark.parametrize("name", SAMPLES)
def test_trap_10_a_compressed_stream_has_the_events_of_the_plain_one_at_its_wire_times(
    name: str, coding: str
) -> None:
    sample = SAMPLES[name]
    wire_bytes = packed(coding, sample.parts)
    plain = read(sample.wire_format, sample.parts, kind=sample.kind)
    reply = read(sample.wire_format, wire_bytes, kind=sample.kind, encoding=coding)
    assert without_size(reply) == without_size(plain)
    assert list(reply.t_ns) == list(plain.t_ns)
    assert list(reply.aux_t_ns) == list(plain.aux_t_ns)
    assert reply.columns["response_bytes"] == sum(map(len, wire_bytes))


@every_coding
def test_trap_10_a_compressed_stream_cut_at_every_byte_is_read_the_same(coding: str) -> None:
    body = b"".join(packed(coding, SAMPLES["openai"].parts))
    expected = untimed(read("openai.chat", [body], encoding=coding))
    assert expected["columns"]["parse_status"] == "ok"
    for cut in range(len(body)):
        pieces = [body[:cut], body[cut:]]
        reply = read("openai.chat", pieces, encoding=coding, same_read=True)
        assert untimed(reply) == expected, cut
    each = [bytes([byte]) for byte in body]
    assert untimed(read("openai.chat", each, encoding=coding, same_read=True)) == expected


@every_coding
def test_trap_10_a_stream_without_its_last_block_is_whole_if_its_end_mark_came(coding: str) -> None:
    parts = packed(coding, SAMPLES["openai"].parts)[:-1]
    reply = read("openai.chat", parts, encoding=coding)
    assert reply.done and reply.columns["parse_status"] == "ok"
    reply = read("openai.chat", parts[:3], encoding=coding)
    assert reply.columns["parse_status"] == "partial"
    assert len(reply.t_ns) == 2


@every_coding
def test_a_compressed_whole_reply_is_read(coding: str) -> None:
    body = {"choices": [{"message": {"content": CANARY}, "finish_reason": "stop"}]}
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    parts = packed(coding, [json.dumps({**body, "usage": usage}).encode()])
    reply = read("openai.chat", parts, kind=JSON, encoding=coding.upper(), stream=False)
    assert (reply.columns["parse_status"], reply.columns["output_tokens"]) == ("ok", 4)
    cut = read("openai.chat", parts[:-1], kind=JSON, encoding=coding, stream=False)
    assert cut.columns["parse_status"] == "ok"  # the JSON was complete


def test_deflate_without_zlibs_head_is_read() -> None:
    parts = packed("deflate", SAMPLES["openai"].parts, wbits=-15)
    assert read("openai.chat", parts, encoding="deflate").columns["parse_status"] == "ok"


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_a_body_may_be_of_several_members_and_padding(coding: str) -> None:
    members = [b"".join(packed(coding, [part])) for part in SAMPLES["openai"].parts]
    reply = read("openai.chat", [*members, b"\0\0"], encoding=coding)
    assert reply.columns["parse_status"] == "ok"
    assert reply.columns["output_tokens"] == 5


@every_coding
def test_a_damaged_stream_keeps_what_came_before(coding: str) -> None:
    parts = packed(coding, SAMPLES["openai"].parts)
    reply = read("openai.chat", [*parts[:4], b"\xff\x00damage" * 9, *parts[4:]], encoding=coding)
    assert reply.columns["parse_status"] == "error"
    assert [*reply.t_ns][:3] == [1001, 1002, 1003]
    nothing = read("openai.chat", [b"data: plain, whatever its head says\n\n"], encoding=coding)
    assert nothing.columns["parse_status"] == "error"


@pytest.mark.parametrize("encoding", ["compress", "gzip, br", "other", "aws-chunked"])
def test_another_coding_is_counted_and_not_read(encoding: str) -> None:
    reply = read("openai.chat", [b"\x1f\x8b", b"abc"], encoding=encoding)
    assert reply.columns == {"parse_status": "encoded", "response_bytes": 5}


def bomb(coding: str, size: int) -> bytes:
    if coding == "br":
        return bytes(brotli.compress(bytes(size)))
    if coding == "zstd":
        return zstandard.ZstdCompressor().compress(bytes(size))
    return zlib.compress(bytes(size), wbits=31 if coding == "gzip" else 15)


@every_coding
@pytest.mark.parametrize("stream", [True, False])
def test_a_bomb_is_given_up_early_in_bounded_memory_and_said(coding: str, stream: bool) -> None:
    data = bomb(coding, 64 << 20)
    kind = "text/event-stream" if stream else JSON
    tracemalloc.start()
    try:
        reply = read("openai.chat", [data, b"more"], kind=kind, encoding=coding, stream=stream)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reply.columns["parse_status"] == "truncated"
    assert reply.columns["response_bytes"] == len(data) + 4
    assert peak < WHOLE_LIMIT + (16 << 20)


@every_coding
def test_no_damaged_body_raises_or_gives_pieces_without_bound(coding: str) -> None:
    body = b"".join(packed(coding, [bytes(range(256)) * 40, b"data: x\n\n" * 3000]))
    for at in range(0, len(body), 7):
        spoiled = bytearray(body)
        spoiled[at] ^= 0x55
        decoder = Decoder(coding)
        for piece in decoder.feed(bytes(spoiled)):
            assert len(piece) <= 8 << 20
        list(decoder.feed(b"behind it"))


@every_coding
def test_a_whole_body_decodes_or_says_why_not(coding: str) -> None:
    body = b"".join(packed(coding, [b"text" * 100]))
    assert decoded(body, coding, 1 << 20) == (bytearray(b"text" * 100), None)
    assert decoded(body, coding, 399) == (bytearray(), "truncated")
    assert decoded(body[:-6], coding, 1 << 20)[1] == "partial"
    assert decoded(body, "lzma", 1 << 20) == (bytearray(), "encoded")


# -- through the writer -------------------------------------------------------------------------

PROMPT = {"model": "m", "stream": True, "max_tokens": 3, "prompt": CANARY + " word" * 400}


def record(
    tape: Path, coding: str, body: bytes, pieces: list[bytes], kill_at: int = -1
) -> dict[str, Any]:
    """The row of one request whose body and reply are encoded; the writer may be killed."""
    recorder = start(tape, on_trouble=lambda _: None)
    now = time.monotonic_ns()
    header = (b"Content-Encoding", coding.encode())
    stream = recorder.open(now, {"arrival_ns": now}, (b"POST", b"/v1/completions", [header]))
    half = len(body) // 2
    recorder.request_body(stream, now, body[:half])
    recorder.request_body(stream, now, body[half:])
    recorder.mark(stream, "request_end_ns", now)
    recorder.reply_head(stream, now + 2_000_000, 200, [*SSE_HEAD, header])
    for n, piece in enumerate(pieces):
        if n == kill_at:
            journaled(recorder, n)
            kill(recorder)
            recorder.flush()
        recorder.reply_data(stream, now + (n + 3) * 1_000_000, piece)
    recorder.close(stream, now + 90_000_000, {"outcome": "ok", "send_ns": now + 1_000_000})
    summary = recorder.finish()
    assert (summary.rows, summary.losses) == (1, {})
    opened = open_tape(tape)
    assert check(opened) == []
    for file in tape.rglob("*"):
        assert file.is_dir() or CANARY.encode() not in file.read_bytes(), file
    (row,) = opened.read().to_pylist()
    return dict(row)


def texts(count: int) -> list[bytes]:
    one = {"choices": [{"index": 0, "text": CANARY}]}
    return [b"data: %s\n\n" % json.dumps(one).encode()] * count + [b"data: [DONE]\n\n"]


@every_coding
def test_trap_10_the_writer_decodes_requests_and_replies_and_keeps_no_text(
    tmp_path: Path, coding: str
) -> None:
    asked = json.dumps(PROMPT).encode()
    body, pieces = b"".join(packed(coding, [asked])), packed(coding, texts(5))
    row = record(tmp_path / "a.tape", coding, body, pieces)
    assert row["off_us"] == [2000, 3000, 4000, 5000, 6000]
    assert (row["content_encoding"], row["parse_status"]) == (coding, "ok")
    assert (row["model_requested"], row["max_tokens"], row["stream"]) == ("m", 3, True)
    assert len(row["block_hashes"]) == len(PROMPT["prompt"]) // 512  # type: ignore[arg-type]
    assert (row["prompt_bytes"], row["response_bytes"]) == (len(body), sum(map(len, pieces)))


def test_a_compressed_stream_that_outlives_its_writer_keeps_what_came_and_says_so(
    tmp_path: Path,
) -> None:
    body, pieces = json.dumps(PROMPT).encode(), packed("gzip", texts(9))
    squeezed = zlib.compress(body, wbits=31)
    row = record(tmp_path / "a.tape", "gzip", squeezed, pieces, kill_at=4)
    assert row["off_us"] == [2000, 3000, 4000, 5000]
    assert (row["parse_status"], row["events_dropped"]) == ("partial", 1)
    assert row["output_tokens"] is None
    assert row["response_bytes"] == sum(map(len, pieces))


def test_a_compressed_request_that_is_a_bomb_costs_its_own_columns_only(tmp_path: Path) -> None:
    row = record(tmp_path / "a.tape", "gzip", bomb("gzip", 64 << 20), packed("gzip", texts(2)))
    assert row["model_requested"] is None and not row["block_hashes"]
    assert (len(row["off_us"]), row["parse_status"]) == (2, "truncated")
