"""Packet captures: packets' own times, any order on the wire, the same rows as a proxy's code."""

import gzip
import itertools
import json
import struct
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokentape.traces.check import check
from tokentape.traces.errors import TapeError, UsageError
from tokentape.traces.importers import import_trace
from tokentape.traces.importers.segments import ACK, FIN, RST, SYN, Flows, Segment
from tokentape.traces.reader import Tape, open_tape

dpkt = pytest.importorskip("dpkt", reason="packet captures are read by dpkt, an extra")
T0_NS = 1_759_813_207_123_456_000
CLIENT, SERVER = (b"\x7f\0\0\1", 40_000), (b"\x7f\0\0\2", 8_000)
SLICE = Path(__file__).parent / "data/vllm-h100-slice.jsonl.gz"
MS = 1_000_000


@dataclass
class Wire:
    """A connection as its packets: (t_ns, from client, flags, seq, data)."""

    client_seq: int = 2**32 - 7  # so that numbers wrap
    server_seq: int = 5_000
    packets: list[tuple[int, bool, int, int, bytes]] = field(default_factory=list)

    def add(self, t_ms: float, from_client: bool, data: bytes = b"", flags: int = ACK) -> None:
        seq = self.client_seq if from_client else self.server_seq
        self.packets.append((T0_NS + round(t_ms * MS), from_client, flags, seq, data))
        step = len(data) + bool(flags & (SYN | FIN))
        if from_client:
            self.client_seq = (self.client_seq + step) % 2**32
        else:
            self.server_seq = (self.server_seq + step) % 2**32

    def open(self, t_ms: float = 0) -> "Wire":
        self.add(t_ms, True, flags=SYN)
        self.add(t_ms, False, flags=SYN | ACK)
        return self

    def close(self, t_ms: float) -> "Wire":
        self.add(t_ms, False, flags=FIN | ACK)
        self.add(t_ms, True, flags=FIN | ACK)
        return self


def frame(from_client: bool, flags: int, seq: int, data: bytes, port: int) -> bytes:
    sides = ((CLIENT[0], CLIENT[1] + port), SERVER)
    source, target = sides if from_client else sides[::-1]
    tcp = dpkt.tcp.TCP(sport=source[1], dport=target[1], seq=seq, flags=flags, data=data)
    ip = dpkt.ip.IP(src=source[0], dst=target[0], p=6, data=tcp)
    ip.len = len(bytes(ip))
    return bytes(dpkt.ethernet.Ethernet(type=0x0800, data=ip))


def written(path: Path, *wires: Wire, nano: bool = False) -> Path:
    packets = [(*packet, port) for port, wire in enumerate(wires) for packet in wire.packets]
    with path.open("wb") as file:
        out = dpkt.pcap.Writer(file, nano=nano)
        for t_ns, from_client, flags, seq, data, port in packets:
            out.writepkt(frame(from_client, flags, seq, data, port), ts=Decimal(t_ns) / 10**9)
    return path


def imported(folder: Path, *wires: Wire, **options: Any) -> tuple[Tape, list[dict[str, Any]]]:
    path = written(folder / "traffic.pcap", *wires, **options)
    tape = open_tape(import_trace("pcap", [path], folder / "p.tape", force=True).tape)
    return tape, tape.read().to_pylist()


def post(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret-key\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ASKED = {"model": "m", "prompt": "secret prompt " * 400, "stream": True, "max_tokens": 3}


def event(text: str) -> bytes:
    message = {"model": "m", "choices": [{"index": 0, "text": text}]}
    return b"data: " + json.dumps(message).encode() + b"\n\n"


def stream(wire: Wire, at_ms: float) -> None:
    wire.add(at_ms, True, post(ASKED))
    wire.add(at_ms + 50, False, SSE)
    for n in range(3):
        wire.add(at_ms + 60 + 10 * n, False, chunk(event(f"w{n}")))
    wire.add(at_ms + 95, False, chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


def test_a_stream_has_its_packets_times_and_nothing_of_its_text(tmp_path: Path) -> None:
    wire = Wire().open()
    stream(wire, 1)
    wire.close(200)
    tape, (row,) = imported(tmp_path, wire)
    assert row["arrival_ns"] == row["send_ns"] == 1 * MS
    assert row["response_headers_ns"] == 51 * MS
    assert row["off_us"] == [60_000, 70_000, 80_000]
    assert (row["first_content_ns"], row["last_content_ns"]) == (61 * MS, 81 * MS)
    assert row["end_ns"] == 96 * MS
    assert (row["outcome"], row["http_status"], row["parse_status"]) == ("ok", 200, "ok")
    assert (row["event_clock"], row["arrival_clock"]) == ("kernel", "kernel")
    assert (row["max_tokens"], row["model"], row["endpoint"]) == (3, "m", "/v1/completions")
    assert row["block_hashes"]
    assert tape.facts["wall_epoch_unix_ns"] == T0_NS
    assert check(tape) == []
    everything = b"".join(p.read_bytes() for p in tape.path.rglob("*.*"))
    assert b"secret" not in everything


def test_a_connection_carries_one_exchange_after_another(tmp_path: Path) -> None:
    wire = Wire().open()
    stream(wire, 1)
    stream(wire, 300)
    wire.add(500, True, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    wire.add(501, False, b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\nno")
    tape, rows = imported(tmp_path, wire.close(600))
    assert [row["upstream_reused"] for row in rows] == [False, True, True]
    assert [row["outcome"] for row in rows] == ["ok", "ok", "http_error"]
    assert [row["operation"] for row in rows] == ["text_completion", "text_completion", "get"]
    assert rows[1]["off_us"] == [60_000, 70_000, 80_000]
    assert tape.facts["source"]["connections"] == 1


def test_who_broke_off_is_said_and_what_the_end_cut_is_kept(tmp_path: Path) -> None:
    client, server, open_end = Wire().open(), Wire().open(), Wire().open()
    for wire in (client, server, open_end):
        wire.add(1, True, post(ASKED))
        wire.add(50, False, SSE + chunk(event("w")))
    client.add(80, True, flags=RST)
    server.add(80, False, flags=FIN | ACK)
    _, rows = imported(tmp_path, client, server, open_end)
    outcomes = sorted(row["outcome"] for row in rows)
    assert outcomes == ["client_abort", "cut", "upstream_abort"]
    assert all(row["off_us"] == [49_000] for row in rows)


def test_traffic_that_is_not_ours_is_counted_and_left_alone(tmp_path: Path) -> None:
    tls, late, good = Wire().open(), Wire(), Wire().open()
    tls.add(1, True, b"\x16\x03\x01\x02\x00" + bytes(range(256)))
    tls.add(2, False, b"\x16\x03\x03" + bytes(300))
    late.add(1, False, chunk(event("x")))  # the capture began in the middle of a reply
    stream(late, 20)
    stream(good, 5)
    holed = Wire().open()
    stream(holed, 30)
    del holed.packets[4]  # an event that the capture missed
    tape, rows = imported(tmp_path, tls, late, good, holed)
    source = tape.facts["source"]
    assert source["connections"] == 4
    assert source["connections_without_http"] == 1
    assert source["connections_with_missed_packets"] == 1
    assert [row["outcome"] for row in rows] == ["ok", "ok", "cut"]


def test_nanoseconds_of_a_pcap_are_kept(tmp_path: Path) -> None:
    wire = Wire().open()
    stream(wire, 1)
    wire.packets = [(t + 7, *rest) for t, *rest in wire.packets]  # type: ignore[misc]
    wire.packets[0] = (T0_NS, *wire.packets[0][1:])
    _, (row,) = imported(tmp_path, wire, nano=True)
    assert row["arrival_ns"] == 1 * MS + 7


def test_a_real_vllm_stream_reads_as_its_own_usage_says(tmp_path: Path) -> None:
    line = json.loads(gzip.decompress(SLICE.read_bytes()).splitlines()[0])
    wire = Wire().open()
    wire.add(1, True, post({"model": "m", "prompt": "x", "stream": True}, line["url"]))
    wire.add(2, False, SSE)
    start = line["chunks"][0][0]
    for t_ns, text in line["chunks"]:
        if text:
            wire.add(3 + (t_ns - start) / MS, False, chunk(text.encode("latin-1")))
    wire.add(5_000_000, False, b"0\r\n\r\n")
    _, (row,) = imported(tmp_path, wire)
    assert row["output_tokens"] == sum(row["ntok"]) == line["n_out"]
    assert row["parse_status"] == "ok"


@settings(deadline=None, max_examples=150)
@given(st.binary(min_size=1, max_size=400), st.data())
def test_bytes_come_out_once_and_in_order_however_packets_travel(
    sent: bytes, data: st.DataObject
) -> None:
    """Cut anywhere, sent again with other cuts, in any order: what is lost comes again."""
    first = data.draw(st.integers(0, 2**32 - 1))
    cuts = data.draw(st.lists(st.integers(0, len(sent)), max_size=8))
    again = data.draw(st.lists(st.integers(0, len(sent)), max_size=8))
    pieces = []
    for some in (cuts, again):
        edges = sorted({0, len(sent), *some})
        pieces += [(a, sent[a:b]) for a, b in itertools.pairwise(edges)]
    flows, got = Flows(), b""
    list(flows.take(Segment(0, CLIENT, SERVER, (first - 1) % 2**32, SYN, b"")))
    for t, (at, piece) in enumerate(data.draw(st.permutations(pieces))):
        segment = Segment(t, CLIENT, SERVER, (first + at) % 2**32, ACK, piece)
        got += b"".join(one.data for _, one in flows.take(segment))
    assert got == sent


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a whole packet capture"),
        (b"nonsense of forty bytes and some more....", "not a whole packet capture"),
        (struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65_535, 1), "no packet in it"),
    ],
)
def test_what_is_no_capture_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.pcap"
    path.write_bytes(content)
    with pytest.raises(TapeError, match=says):
        import_trace("pcap", [path], tmp_path / "t.tape")
    assert not (tmp_path / "t.tape").exists()


def test_a_capture_that_is_cut_off_or_holds_no_request_makes_no_tape(tmp_path: Path) -> None:
    wire = Wire().open()
    stream(wire, 1)
    path = written(tmp_path / "a.pcap", wire)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(TapeError, match="it ends within a packet"):
        import_trace("pcap", [path], tmp_path / "t.tape")
    with pytest.raises(TapeError, match=r"no HTTP/1\.1 request in it \(1 connections"):
        import_trace("pcap", [written(tmp_path / "b.pcap", Wire().open())], tmp_path / "t.tape")
    with pytest.raises(UsageError, match="give one file, not 2"):
        import_trace("pcap", [path, path], tmp_path / "t.tape")
    assert not (tmp_path / "t.tape").exists()


def test_a_tape_is_replaced_only_when_told_and_its_key_stays(tmp_path: Path) -> None:
    wire = Wire().open()
    stream(wire, 1)
    first, rows = imported(tmp_path, wire)
    with pytest.raises(TapeError, match="exists; --force replaces it"):
        import_trace("pcap", [tmp_path / "traffic.pcap"], first.path)
    again, rows_again = imported(tmp_path, wire)
    assert rows[0]["block_hashes"] == rows_again[0]["block_hashes"]
    assert again.facts["key_id"] == first.facts["key_id"]
    assert first.facts["tape_id"] != again.facts["tape_id"]
