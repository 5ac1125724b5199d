"""The playback server is believed by other tests, so it is tested against its recordings."""

import hashlib
import json
import subprocess
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from playback import Playback, Served, playback
from raw_client import RawReply, body_for, play, play_all
from recordings import CHAT, DONE

pytestmark = pytest.mark.timed

SHORT = "low-143"  # a completion of 18 tokens, 0.34 s
SHORT_CHAT = "low-78"
TRIES = 3
LATE_NS = 5_000_000  # at the 99th percentile: a client or server later than this is no clock


@pytest.fixture(scope="module")
def server() -> Iterator[Playback]:
    with playback() as running:
        yield running


Played = list[tuple[str, RawReply, Served]]


def play_slice(server: Playback) -> Played:
    """Every recording, all at once: (rid, what the client read, what the server logged)."""
    replies = play_all(server.url, list(server.recordings.values()))
    log = {served.rid: served for served in server.log()}
    return [(rid, r, log[rid]) for rid, r in zip(server.recordings, replies, strict=True)]


@pytest.fixture(scope="module")
def played(server: Playback) -> Played:
    return play_slice(server)


def test_the_slice_holds_what_its_readme_says(server: Playback) -> None:
    recordings = list(server.recordings.values())
    assert [r.path for r in recordings].count(CHAT) == 12
    assert len(recordings) == 24
    assert sum(len(r.chunks) for r in recordings) == 2_880
    assert sum(r.output_tokens for r in recordings) == 2_828
    choices = [c for r in recordings for m in r.messages for c in m["choices"]]
    content = [c for c in choices if "role" not in c.get("delta", {})]
    assert len(content) == 2_820
    texts = [c["text"] if "text" in c else c["delta"]["content"] for c in content]
    assert texts.count("") == 1
    assert sum(len(text.split()) == 3 for text in texts) == 4


def test_every_body_is_byte_identical_chunk_by_chunk(server: Playback, played: Played) -> None:
    for rid, reply, _ in played:
        recording = server.recordings[rid]
        assert reply.complete
        assert reply.status == 200
        assert [data for _, data in reply.parts] == [data for _, data in recording.chunks]
        assert reply.head[1:] == [f"{name}: {value}" for name, value in recording.headers]


def late_sends_ns(server: Playback, played: Played) -> list[int]:
    """How long after its recorded time each chunk was handed to the socket."""
    return [
        sent_ns - served.request_ns - due_ns
        for rid, _, served in played
        for sent_ns, (due_ns, _) in zip(
            served.chunks_ns, server.recordings[rid].chunks, strict=True
        )
    ]


def late_reads_ns(_: Playback, played: Played) -> list[int]:
    """How long after the server's stamp the client read each chunk."""
    return [
        read_ns - sent_ns
        for _, reply, served in played
        for (read_ns, _), sent_ns in zip(reply.parts, served.chunks_ns, strict=True)
    ]


@pytest.mark.parametrize("late", [late_sends_ns, late_reads_ns])
def test_chunks_are_sent_and_read_at_their_recorded_times(
    server: Playback, played: Played, late: Callable[[Playback, Played], list[int]]
) -> None:
    """None is early in any run; the best of TRIES counts, since other load only ever adds."""
    p99_ns: list[float] = []
    while not p99_ns or min(p99_ns) >= LATE_NS:
        assert len(p99_ns) < TRIES, f"99th percentiles in ns: {p99_ns}"
        late_ns = late(server, play_slice(server) if p99_ns else played)
        assert min(late_ns) >= 0
        p99_ns.append(float(np.quantile(late_ns, 0.99)))


def test_the_log_holds_the_head_and_the_digest_of_what_was_received(
    server: Playback, played: Played
) -> None:
    for rid, _, served in played:
        body = body_for(server.recordings[rid])
        assert served.body_sha256 == hashlib.sha256(body).hexdigest()
        assert served.head[0] == f"POST {server.recordings[rid].path} HTTP/1.1"
        assert f"x-playback: {rid}" in served.head


def test_the_kth_request_to_a_path_gets_its_kth_recording() -> None:
    with playback() as fresh:
        chats = [r for r in fresh.recordings.values() if r.path == CHAT]
        for expected in chats[:2]:
            command = ["curl", "-sN", "-d", '{"stream": true}', fresh.url + CHAT]
            read = subprocess.run(command, capture_output=True, check=True)
            assert read.stdout == expected.body
        assert [served.rid for served in fresh.log()] == [r.rid for r in chats[:2]]


@pytest.mark.parametrize("rid", [SHORT, SHORT_CHAT])
def test_an_unstreamed_request_gets_the_same_completion_as_one_body(
    server: Playback, rid: str
) -> None:
    recording = server.recordings[rid]
    reply = play(server.url, recording, stream=False)
    completion = json.loads(reply.body)
    assert completion["usage"]["completion_tokens"] == recording.output_tokens
    choice = completion["choices"][0]
    text = choice["message"]["content"] if recording.path == CHAT else choice["text"]
    assert len(text.split()) == recording.output_tokens
    assert completion["object"] == (
        "chat.completion" if recording.path == CHAT else "text_completion"
    )
    assert reply.body == play(server.url, recording, stream=False).body


def test_a_connection_can_be_used_again(server: Playback) -> None:
    url = server.url + server.recordings[SHORT].path
    ask = ["-sN", "-d", '{"stream": true}', "-H", f"x-playback: {SHORT}", url]
    read = subprocess.run(["curl", *ask, "--next", *ask], capture_output=True, check=True)
    assert read.stdout == server.recordings[SHORT].body * 2
    assert len({served.connection for served in server.log()[-2:]}) == 1


def test_an_unknown_recording_is_not_found(server: Playback) -> None:
    command = [
        "curl",
        "-s",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}",
        "-d",
        "{}",
        f"{server.url}/nothing",
    ]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"404"


def test_fault_close_before_headers_closes_with_no_byte(server: Playback) -> None:
    assert play(server.url, server.recordings[SHORT], fault="close-before-headers").raw == b""


def test_fault_close_mid_ends_the_body_before_its_framing(server: Playback) -> None:
    reply = play(server.url, server.recordings[SHORT], fault="close-mid 5")
    assert not reply.complete
    assert reply.body == b"".join(data for _, data in server.recordings[SHORT].chunks[:5])


def test_fault_reset_mid_resets_the_connection(server: Playback) -> None:
    with pytest.raises(ConnectionResetError):
        play(server.url, server.recordings[SHORT], fault="reset-mid")


def test_fault_error_503_answers_json(server: Playback) -> None:
    reply = play(server.url, server.recordings[SHORT], fault="error-503")
    assert reply.status == 503
    assert json.loads(reply.body)["error"]["code"] == 503


def test_fault_not_json_answers_200_with_no_json(server: Playback) -> None:
    reply = play(server.url, server.recordings[SHORT], fault="not-json")
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    with pytest.raises(json.JSONDecodeError):
        json.loads(reply.body)


def test_fault_stall_sends_its_chunks_and_then_nothing(server: Playback) -> None:
    recording = server.recordings[SHORT]
    command = ["curl", "-sN", "-m", "1", "-d", '{"stream": true}', "-H", f"x-playback: {SHORT}"]
    command += ["-H", "x-fault: stall 2", server.url + recording.path]
    read = subprocess.run(command, capture_output=True, check=False)
    assert read.returncode == 28, "curl says that it timed out"
    assert read.stdout == b"".join(data for _, data in recording.chunks[:2])


def test_fault_gzip_compresses_each_chunk_on_its_own(server: Playback) -> None:
    recording = server.recordings[SHORT]
    reply = play(server.url, recording, fault="gzip")
    assert reply.headers["content-encoding"] == "gzip"
    inflate = zlib.decompressobj(wbits=31)
    inflated = [inflate.decompress(data) for _, data in reply.parts]
    assert inflated[: len(recording.chunks)] == [data for _, data in recording.chunks]
    assert inflate.eof


def test_fault_no_done_leaves_out_the_end_mark_only(server: Playback) -> None:
    reply = play(server.url, server.recordings[SHORT], fault="no-done")
    assert reply.complete
    assert reply.body + DONE == server.recordings[SHORT].body
