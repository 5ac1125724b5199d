"""A writer that is killed amid streams of every dialect: the next one goes on with each of them."""

import json
import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from test_traces_inherit import OWN, journaled, kill, since_arrival
from test_traces_recording import start
from tokentape.traces.check import check
from tokentape.traces.reader import open_tape
from wire_streams import SAMPLES, Sample

KILLS = (2, 5)  # before which reads of each reply
SHARES = (0.05, 0.5, 0.9)  # of a message that the first dead writer held
WINDOW_BITS = {"gzip": 31, "deflate": 15}  # as zlib wants them
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "openai.chat": ("/v1/chat/completions", {"messages": [], "stream": True}),
    "openai.responses": ("/v1/responses", {"input": [], "stream": True}),
    "anthropic": ("/v1/messages", {"messages": [], "stream": True}),
    "sglang": ("/generate", {"text": "x", "stream": True}),
    "gemini": ("/v1beta/models/gemini-x:streamGenerateContent", {"contents": []}),
    "ollama.chat": ("/api/chat", {"messages": []}),
    "ollama.generate": ("/api/generate", {"prompt": "x"}),
    "tgi": ("/generate_stream", {"inputs": "x"}),
    "llama.cpp": ("/completion", {"prompt": "x", "stream": True}),
    "triton": ("/v2/models/m/generate_stream", {"text_input": "x"}),
    "bedrock.converse": ("/model/m/converse-stream", {"messages": []}),
    "bedrock.invoke": ("/model/m/invoke-with-response-stream", {"prompt": "x"}),
}


class Read(NamedTuple):
    """The reads of one reply."""

    sample: Sample
    parts: list[bytes]
    coding: str = ""


def torn(sample: Sample, share: float) -> list[bytes]:
    """The first message, the second one in two reads, and so on."""
    first, second, *others = sample.parts
    cut = max(1, int(len(second) * share))
    return [first, second[:cut], second[cut:], *others]


def packed(sample: Sample, coding: str) -> list[bytes]:
    packer = zlib.compressobj(wbits=WINDOW_BITS[coding])
    parts = [packer.compress(p) + packer.flush(zlib.Z_SYNC_FLUSH) for p in sample.parts]
    return [*parts, packer.flush()]


REPLIES: dict[tuple[str, Any], Read] = {
    **{(name, "whole"): Read(s, s.parts) for name, s in SAMPLES.items()},
    **{(name, share): Read(s, torn(s, share)) for name, s in SAMPLES.items() for share in SHARES},
    **{(name, c): Read(s, packed(s, c), c) for name, s in SAMPLES.items() for c in WINDOW_BITS},
}
type Rows = dict[tuple[str, Any], dict[str, Any]]


def record(tape: Path, now: int, kills: tuple[int, ...]) -> Rows:
    """The rows of REPLIES, which run beside each other."""
    recorder = start(tape, on_trouble=lambda _: None)
    streams = []
    for n, reply in enumerate(REPLIES.values()):
        endpoint, body = ASKED[reply.sample.wire_format]
        stream = recorder.open(now + n, {"arrival_ns": now + n}, (b"POST", endpoint.encode(), []))
        recorder.request_body(stream, now + n, json.dumps(body).encode())
        recorder.mark(stream, "request_end_ns", now + n)
        head = [(b"Content-Type", reply.sample.kind.encode())]
        if reply.coding:
            head.append((b"Content-Encoding", reply.coding.encode()))
        recorder.reply_head(stream, now + n + 2_000_000, 200, head)
        streams.append(stream)
    sent = 0
    for at in range(max(len(reply.parts) for reply in REPLIES.values())):
        if at in kills:
            journaled(recorder, sent)
            kill(recorder)
            recorder.flush()
        for n, reply in enumerate(REPLIES.values()):
            if at < len(reply.parts):
                recorder.reply_data(streams[n], now + n + (at + 3) * 1_000_000, reply.parts[at])
                sent += 1
    for n, stream in enumerate(streams):
        columns = {"outcome": "ok", "send_ns": now + n + 1_000_000}
        recorder.close(stream, now + n + 90_000_000, columns)
    summary = recorder.finish()
    assert (summary.seen, summary.losses, summary.lost_reads) == (len(REPLIES), {}, 0)
    opened = open_tape(tape)
    assert check(opened) == []
    rows = sorted(opened.read().to_pylist(), key=lambda row: int(row["arrival_ns"]))
    return dict(zip(REPLIES, rows, strict=True))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rows, Rows]:
    """The rows as they are, and as they are when the writer dies twice."""
    folder, now = tmp_path_factory.mktemp("dialects"), time.monotonic_ns()
    return record(folder / "a.tape", now, ()), record(folder / "b.tape", now, KILLS)


def told(row: dict[str, Any], *but: str) -> dict[str, Any]:
    left_out = {*since_arrival(row), *OWN, *but}
    return {name: value for name, value in row.items() if name not in left_out}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_stream_of_any_dialect_that_outlives_its_writers_has_the_row_that_it_would_have_had(
    recorded: tuple[Rows, Rows], name: str
) -> None:
    whole, gone_on = (rows[name, "whole"] for rows in recorded)
    assert (whole["parse_status"], len(whole["off_us"])) == ("ok", len(SAMPLES[name].events))
    assert sum(gone_on["ntok"]) == sum(whole["ntok"])
    # Text sizes are not journaled, so a total that is spread over events is spread evenly.
    spread = ["ntok"] if whole["ntok_source"] == "usage_spread" else []
    assert told(gone_on, *spread) == told(whole, *spread)
    assert since_arrival(gone_on) == since_arrival(whole)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", SAMPLES)
def test_of_any_dialect_a_message_that_a_dead_writer_held_half_of_is_the_only_one_lost(
    recorded: tuple[Rows, Rows], name: str, share: float
) -> None:
    whole, gone_on = (rows[name, share] for rows in recorded)
    torn_at_us = 4_000  # since it was sent
    for times in ("off_us", "aux_off_us"):
        kept = [t for t in whole[times] or [] if t != torn_at_us]
        assert list(gone_on[times] or []) == kept, times
    assert (gone_on["events_dropped"], gone_on["parse_status"]) == (1, "partial")
    total = None if name == "triton" else whole["output_tokens"]  # each of its messages adds some
    assert (gone_on["output_tokens"], gone_on["finish_reason"]) == (total, whole["finish_reason"])


@pytest.mark.parametrize("coding", WINDOW_BITS)
@pytest.mark.parametrize("name", SAMPLES)
def test_of_a_compressed_stream_the_times_before_the_writer_died_are_kept_and_the_rest_admitted(
    recorded: tuple[Rows, Rows], name: str, coding: str
) -> None:
    whole, gone_on = (rows[name, coding] for rows in recorded)
    assert (whole["parse_status"], len(whole["off_us"])) == ("ok", len(SAMPLES[name].events))
    before = [t for t in whole["off_us"] if t < (KILLS[0] + 2) * 1_000]
    assert list(gone_on["off_us"]) == before
    assert gone_on["parse_status"] == "partial"
    assert gone_on["events_dropped"] >= 1
    assert gone_on["response_bytes"] == whole["response_bytes"]
