"""What holds for the streams of every dialect: cut anywhere, damaged anyhow, resumed, private."""

import random
from typing import Any

import pytest

from tokentape.traces import wire
from tokentape.traces.wire.reply import StreamParser
from wire_streams import SAMPLES, Sample, fits_the_schema, read, untimed

CANARY = "CANARYdonotkeepthis"
FUZZED = 5_000  # damaged streams, over all dialects
every_dialect = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)


def read_sample(sample: Sample, parts: list[bytes], **more: Any) -> Any:
    return read(sample.wire_format, parts, kind=sample.kind, **more)


@every_dialect
def test_a_complete_stream_is_read_without_a_doubt(sample: Sample) -> None:
    reply = read_sample(sample, sample.parts)
    assert list(reply.cls) == sample.events
    assert reply.done and not reply.stream_error
    assert reply.columns["parse_status"] == "ok"
    assert reply.columns["response_bytes"] == sum(map(len, sample.parts))
    assert list(reply.t_ns) == sorted(reply.t_ns)
    assert reply.first_content_ns == reply.t_ns[0]


@every_dialect
def test_trap_1_and_3_a_stream_split_at_every_byte_is_read_the_same(sample: Sample) -> None:
    stream = b"".join(sample.parts)
    expected = untimed(read_sample(sample, [stream]))
    for cut in range(len(stream)):
        pieces = [stream[:cut], stream[cut:]]
        assert untimed(read_sample(sample, pieces, same_read=True)) == expected, cut
    each = [bytes([byte]) for byte in stream]
    assert untimed(read_sample(sample, each, same_read=True)) == expected


@every_dialect
def test_trap_12_a_stream_cut_anywhere_keeps_what_came(sample: Sample) -> None:
    stream = b"".join(sample.parts)
    seen = 0
    for cut in (*range(0, len(stream), 3), len(stream)):
        reply = read_sample(sample, [stream[:cut]], complete=False)
        assert reply.columns["parse_status"] in ("ok", "partial", "unknown_format")
        assert len(reply.t_ns) >= seen - 1  # half an event may look like one without text
        seen = max(seen, len(reply.t_ns))
    assert seen == len(sample.events)


def damaged(stream: bytes, rng: random.Random) -> bytes:
    """The stream after a few random edits."""
    out = bytearray(stream)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(7):
            case 0:
                out[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del out[at : at + rng.randint(1, 40)]
            case 2:
                out[at:at] = out[at : at + rng.randint(1, 200)]
            case 3:
                odd = [b"null", b"[]", b"{}", b"-1", b"1e999", b"9" * 30, b'"', b"\\ud800", b"true"]
                out[at:at] = rng.choice(odd)
            case 4:
                colon = out.find(b":", at)
                end = out.find(b",", colon + 1)
                if 0 <= colon < end:
                    odd = [b"null", b"[]", b"{}", b"-1", b'"x"', b"1.5", b"[[]]", b"true"]
                    out[colon + 1 : end] = rng.choice(odd)
            case 5:
                out[at:at] = rng.choice([b"\n", b"\r", b"\n\n", b"\r\n", b"\x00", b"\xef\xbb\xbf"])
            case _:
                del out[at:]
    return bytes(out)


def survives(count: int, seed: int) -> None:
    rng = random.Random(seed)
    samples = list(SAMPLES.values())
    for n in range(count):
        sample = samples[n % len(samples)]
        stream = damaged(b"".join(sample.parts), rng)
        cut = rng.randrange(len(stream) + 1)
        kind = sample.kind if n % 9 else "application/json"
        parser = wire.reply_parser(sample.wire_format, True, 200, kind, "")
        parser.feed(stream[:cut], 1, 1)
        parser.feed(stream[cut:], 2, 2)
        reply = parser.finish(3, n % 2 == 0)
        if n % 16 < 2:
            fits_the_schema(reply)
        assert len(reply.t_ns) == len(reply.ntok) == len(reply.cls)


def test_no_damaged_stream_of_any_dialect_raises() -> None:
    survives(FUZZED, 7)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("share", range(20))  # so that several processes share them
def test_no_damaged_stream_of_a_million_raises(share: int) -> None:
    survives(50_000, 8 + share)


def going_on_at(sample: Sample, at: int) -> Any:
    """The reply as a second parser reads it that took over before part `at`."""
    first = wire.reply_parser(sample.wire_format, True, 200, sample.kind, "")
    second = wire.reply_parser(sample.wire_format, True, 200, sample.kind, "")
    assert isinstance(first, StreamParser) and isinstance(second, StreamParser)
    for i, part in enumerate(sample.parts[:at]):
        first.feed(part, 1000 + i, i)
    arrays = [first.t_ns, first.ntok, first.cls, first.choice, first.aux_t_ns, first.aux_cls]
    second.resume(first.progress, [list(a) for a in arrays], first.body_bytes)
    second.facts.model, second.facts.response_id = first.facts.model, first.facts.response_id
    for i, part in enumerate(sample.parts[at:], at):
        second.feed(part, 1000 + i, second.events.read + 1)
    return second.finish(9000, True)


@every_dialect
def test_another_process_goes_on_with_a_stream_at_any_message(sample: Sample) -> None:
    expected = read_sample(sample, sample.parts)
    for at in range(len(sample.parts) + 1):
        reply = going_on_at(sample, at)
        assert reply.columns == expected.columns, at
        assert list(reply.t_ns) == list(expected.t_ns), at
        assert sum(reply.ntok) == sum(expected.ntok), at
        assert bytes(reply.aux_cls) == bytes(expected.aux_cls), at


@every_dialect
def test_what_is_handed_on_holds_no_text(sample: Sample) -> None:
    stream = b"".join(sample.parts)
    for text in ("Grüße 😀", "你好😀", "let me see", "Zürich"):
        stream = stream.replace(text.encode(), CANARY.encode())
    parser = wire.reply_parser(sample.wire_format, True, 200, sample.kind, "")
    assert isinstance(parser, StreamParser)
    for at in range(0, len(stream), 11):
        parser.feed(stream[at : at + 11], 1, 1)
        assert CANARY not in repr(parser.progress)
    assert CANARY not in repr(parser.finish(2, complete=True))
