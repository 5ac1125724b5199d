"""Limits of the proxy: memory and pauses at 2,000 streams, leaks, big uploads, cost of recording.

    ./run bench limits [--only streams,leak,upload,events,requests,stamps] [--runs 3]
        [--seconds 5] [--json FILE]

streams   2,000 streams of a token a second: memory per stream, latency, pauses by phase
leak      a worker's memory after 2,000 to 20,000 requests of one token
upload    what a body of 60 MB adds to the peak memory of worker and writer
events    recording on and off, 8,000 events/s; `requests`: in a closed loop of 16
stamps    the arrival on the tape against the client's own stamp; lateness as the rows carry it

Processes are pinned as in the bench of the proxy, whose load and server these are.
"""

import argparse
import contextlib
import hashlib
import json
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from bench_proxy import Row, events, median_of, one, quantiles, requests, steal_s, with_added
from proxy_load import START_S, Seen, Server, compiled, drive
from proxy_targets import HERE, TARGETS, Target, tokentape, versions

from tokentape.traces.reader import Tape, open_tape

STREAMS, RAMP_S, SETTLE_S, STREAMS_S = 2_000, 10.0, 3.0, 20.0
CHECKPOINTS = (2_000, 5_000, 10_000, 20_000)  # requests so far
UPLOAD_BYTES, PIECE_BYTES = 60_000_000, 1 << 18
EVENTS_PER_S = 8_000
STAMPED: dict[str, tuple[dict[str, int], list[str]]] = {
    "20 requests/s": ({"first_us": 0, "gap_us": 1_000}, ["-r", "20", "-t", "1"]),
    "500 requests/s": ({"first_us": 0, "gap_us": 1_000}, ["-r", "500", "-t", "1"]),
    "4000 events/s": ({"first_us": 20_000, "gap_us": 50_000}, ["-n", "200", "-t", "100"]),
}
STAMPS_S = 10.0


def unrecorded(folder: Path, upstream: int) -> Target:
    """As `tokentape`, with recording paused from the start."""
    script = str(HERE / "proxy_unrecorded.py")
    return tokentape(folder, upstream, program=(script, "tokentape"))


TARGETS["unrecorded"] = unrecorded


# -- what the kernel and the tape say -------------------------------------------------------------


def status_mb(pid: int, field: str) -> float:
    """A size of /proc/PID/status, in MB of 1024 KiB as everywhere in these benches."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+)", text, re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def memory_mb(target: Target) -> Row:
    """PSS and RSS of worker and writer now."""
    held: Row = {f"{role}_pss_mb": mb for role, mb in target.pss_mb().items()}
    for pid, role in target.roles().items():
        held[f"{role}_rss_mb"] = status_mb(pid, "VmRSS")
    return held


def tape_of(folder: Path) -> Tape:
    """The one tape that a run left in its folder."""
    (path,) = folder.glob("*.tape")
    return open_tape(path)


def monotonic_offset_ns(tape: Tape) -> int:
    """What makes an instant of the tape one of CLOCK_MONOTONIC, which the client stamps with."""
    segment = tape.segments[0]
    anchor = segment.anchors[0]
    epoch_ns = int(segment.metadata["wall_epoch_unix_ns"])
    return epoch_ns - anchor["wall_unix_ns"] + anchor["monotonic_ns"]


def loop_lags(tape: Tape) -> list[tuple[int, int, float]]:
    """(begin, end in CLOCK_MONOTONIC ns, longest lag in ms between) as the worker told them."""
    offset_ns = monotonic_offset_ns(tape)
    samples = [s for file in tape.telemetry_files for s in pq.read_table(file).to_pylist()]
    mine = [s for s in samples if s["name"] == "tokentape_loop_lag_max_seconds"]
    return [(s["ts_ns"] + offset_ns, s["end_ns"] + offset_ns, s["value"] * 1e3) for s in mine]


# -- 2,000 streams --------------------------------------------------------------------------------


def streams(folder: Path, name: str) -> Row:
    """Memory before and while all are open; latency and pauses of opening and of running."""
    truth = Server(folder, first_us=20_000, gap_us=1_000_000, pinned=True)
    target: Target | None = None
    stolen = steal_s()
    try:
        target = TARGETS[name](folder, truth.port)
        row = {f"{key}_idle": mb for key, mb in memory_mb(target).items()}
        edges: list[tuple[float, dict[str, float], Row]] = []

        def edge() -> None:
            assert target is not None
            edges.append((time.monotonic(), target.cpu_s(), memory_mb(target)))

        warm_s = RAMP_S + SETTLE_S
        load = ["-n", str(STREAMS), "-t", "1000", "-a", str(RAMP_S), "-w", str(warm_s)]
        load += ["-s", str(STREAMS_S)]
        seen = drive(folder, target.port, *load, pinned=True, on_begin=edge, on_end=edge)
    finally:
        if target is not None:
            target.stop()
        truth.stop()
    (begun, before, _), (ended, after, held) = edges
    row |= held | {"refused": seen.refused(), "steal_s": steal_s() - stolen}
    if "worker_pss_mb" in row:
        for kind in ("pss", "rss"):
            grown = row[f"worker_{kind}_mb"] - row[f"worker_{kind}_mb_idle"]
            row[f"kib_per_stream_{kind}"] = grown * 1024 / STREAMS
        row["worker_cpu"] = (after["worker"] - before["worker"]) / (ended - begun)
        row |= lag_by_phase(tape_of(folder), seen)
    row |= quantiles(seen.latency_us(), "ms")
    return row | latency_by_phase(seen)


def phases(seen: Seen) -> dict[str, tuple[int, int]]:
    """From when to when streams were opened, all just ran, and were closed all at once."""
    begin, end = seen.summary["begin_ns"], seen.summary["end_ns"]
    opened = begin - int(SETTLE_S * 1e9)
    first = opened - int(RAMP_S * 1e9)
    return {"opening": (first, opened), "running": (begin, end), "closing": (end, 1 << 62)}


def lag_by_phase(tape: Tape, seen: Seen) -> Row:
    """The longest lag of the worker's loop; a beat each 100 ms sees the pause it falls into."""
    found: Row = {}
    lags = loop_lags(tape)
    for phase, (begin, end) in phases(seen).items():
        # A sample is of a second: one that reaches into the closing is not of the running.
        inside = [ms for since, until, ms in lags if begin <= until < end]
        if phase == "running":
            inside = [ms for since, until, ms in lags if begin <= since and until < end]
        found[f"lag_ms_{phase}"] = max(inside, default=float("nan"))
    delays = tape.read(["lag_max_us"])["lag_max_us"].drop_null().to_numpy()
    # Of all reads, from the kernel's stamp on: no pause longer than this one met any data.
    return found | {"read_delay_ms_max": float(delays.max()) / 1e3 if len(delays) else 0.0}


def latency_by_phase(seen: Seen) -> Row:
    """The longest latency of an event: what pauses and queues did to any stream."""
    found: Row = {}
    at = seen.events["kernel"]
    latency = at.astype(np.int64) - seen.events["srv"].astype(np.int64)
    for phase in ("opening", "running"):
        begin, end = phases(seen)[phase]
        inside = latency[(at >= begin) & (at < end)]
        found[f"ms_max_{phase}"] = float(inside.max()) / 1e6 if len(inside) else float("nan")
    return found


# -- leak -----------------------------------------------------------------------------------------


def leak(folder: Path) -> list[Row]:
    """Memory of a worker after so many requests, while the last client's connections are open."""
    truth = Server(folder, first_us=0, gap_us=1_000, pinned=True)
    target: Target | None = None
    try:
        target = tokentape(folder, truth.port)
        found = [{"target": "0 requests"} | memory_mb(target)]
        done = 0
        for goal in CHECKPOINTS:
            held: Row = {}
            drive(
                folder,
                target.port,
                *("-n", "16", "-t", "1", "-m", str(goal - done), "-w", "0", "-s", "300"),
                pinned=True,
                on_begin=lambda: None,
                on_end=lambda held=held, target=target: held.update(memory_mb(target)),  # type: ignore[misc]
            )
            done = goal
            found.append({"target": f"{goal} requests"} | held)
    finally:
        if target is not None:
            target.stop()
        truth.stop()
    return found


# -- upload ---------------------------------------------------------------------------------------


class Sink(BaseHTTPRequestHandler):
    """Reads a body piece by piece, keeps its length and hash, answers with one small reply."""

    protocol_version = "HTTP/1.1"
    got: tuple[int, str] = (0, "")

    def do_POST(self) -> None:
        digest, size = hashlib.sha256(), 0
        for piece in self._pieces():
            digest.update(piece)
            size += len(piece)
        Sink.got = (size, digest.hexdigest())
        reply = b'{"id":"x","object":"chat.completion","model":"m","choices":[{"index":0,'
        reply += b'"message":{"role":"assistant","content":"ok"},"finish_reason":"stop"}]}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def _pieces(self) -> Iterator[bytes]:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            yield from self._read(int(self.headers["Content-Length"]))
            return
        while size := int(self.rfile.readline(), 16):
            yield from self._read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _read(self, size: int) -> Iterator[bytes]:
        while size:
            piece = self.rfile.read(min(size, PIECE_BYTES))
            size -= len(piece)
            yield piece

    def log_message(self, *_: Any) -> None:
        """One line a request is of no use here."""


@contextlib.contextmanager
def sink() -> Iterator[int]:
    """The port of a running Sink."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Sink) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def big_body() -> bytes:
    """A chat request of UPLOAD_BYTES, of numbered words: no two of its prompt blocks are alike."""
    head, tail = b'{"model":"m","messages":[{"role":"user","content":"', b'"}]}'
    words = b" ".join(b"w%d" % n for n in range(UPLOAD_BYTES // 8))
    return head + words[: UPLOAD_BYTES - len(head) - len(tail)] + tail


def post(port: int, body: bytes, *, chunked: bool) -> None:
    """Send the body in pieces; return once the reply has begun, which must be 200."""
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{framing}\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as link:
        link.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
        for at in range(0, len(body), PIECE_BYTES):
            piece = body[at : at + PIECE_BYTES]
            link.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
        if chunked:
            link.sendall(b"0\r\n\r\n")
        assert link.recv(4096).startswith(b"HTTP/1.1 200")


def wait_until_idle(target: Target) -> None:
    """Until a second passes in which nobody works: then the writer has parsed what it got."""
    used, deadline = -1.0, time.monotonic() + START_S
    while sum(target.cpu_s().values()) - used > 0.03 and time.monotonic() < deadline:
        used = sum(target.cpu_s().values())
        time.sleep(1.0)


def upload(folder: Path, name: str) -> Row:
    """Peak memory of each process over one upload; `name` is what is kept of content, framing."""
    content, framing = name.split(", ")
    body = big_body()
    with sink() as upstream:
        target = tokentape(folder, upstream, "--content", content)
        try:
            post(target.port, b'{"model":"m"}', chunked=False)  # what is first loaded is not meant
            wait_until_idle(target)
            pids = {role: pid for pid, role in target.roles().items()}
            for pid in pids.values():
                Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew
            row: Row = {f"{role}_before_mb": status_mb(p, "VmHWM") for role, p in pids.items()}
            shared = {role: status_mb(pid, "RssShmem") for role, pid in pids.items()}
            begun = time.monotonic()
            post(target.port, body, chunked=framing == "chunked")
            row["seconds"] = time.monotonic() - begun
            wait_until_idle(target)
            for role, pid in pids.items():
                row[f"{role}_peak_mb"] = status_mb(pid, "VmHWM")
                row[f"{role}_added_mb"] = row[f"{role}_peak_mb"] - row[f"{role}_before_mb"]
                row[f"{role}_shared_mb"] = status_mb(pid, "RssShmem") - shared[role]
                row[f"{role}_left_mb"] = status_mb(pid, "VmRSS") - row[f"{role}_before_mb"]
        finally:
            target.stop()
    whole = Sink.got == (len(body), hashlib.sha256(body).hexdigest())
    kept = tape_of(folder).read(["prompt_bytes", "parse_status"]).to_pylist()[-1]
    row |= {"every_byte": float(whole), "prompt_mb": (kept["prompt_bytes"] or 0) / 1e6}
    return row | {"parsed": str(kept["parse_status"])}


# -- stamps ---------------------------------------------------------------------------------------


def stamps(folder: Path, name: str) -> Row:
    """The arrival of each request, on the tape and as the client had sent it."""
    server, load = STAMPED[name]
    row, seen = one(folder, "tokentape", server, load, STAMPS_S)
    tape = tape_of(folder)
    rows = tape.read(["arrival_ns", "arrival_clock", "event_clock", "lag_max_us"]).to_pylist()
    row |= {"target": name, "rows": len(rows), "unmatched": 0.0}
    with_events = [r["event_clock"] for r in rows if r["event_clock"] is not None]
    row["arrival_kernel_%"] = 100 * np.mean([r["arrival_clock"] == "kernel" for r in rows])
    row["event_kernel_%"] = 100 * np.mean([c == "kernel" for c in with_events])
    arrived = np.array([r["arrival_ns"] for r in rows]) + monotonic_offset_ns(tape)
    lags_us = np.array([r["lag_max_us"] or 0 for r in rows])
    # A fresh worker's first requests queue behind its warming up: of the window, and of all.
    inside = (arrived >= seen.summary["begin_ns"]) & (arrived < seen.summary["end_ns"])
    for q in (50, 99, 100):
        row[f"lag_us_p{q}"] = float(np.percentile(lags_us[inside], q))
    row["lag_us_max_with_start"] = float(lags_us.max())
    asked = seen.requests[seen.requests["sent"] > 0]
    if len(asked) != len(arrived):
        return row | {"unmatched": float(len(asked) - len(arrived))}
    # Requests carry no mark: both sides in order. The k-th to arrive is the k-th that was sent.
    for stamp in ("begun", "sent"):
        error_us = (np.sort(arrived) - np.sort(asked[stamp].astype(np.int64))) / 1e3
        row[f"after_{stamp}_us_p50"] = float(np.median(error_us))
        row[f"after_{stamp}_us_p99"] = float(np.percentile(np.abs(error_us), 99))
    return row


# -- the rest -------------------------------------------------------------------------------------


def in_turns(names: list[str], what: Callable[[Path, str], Row], runs: int) -> list[Row]:
    """Medians of several runs; names take turns, so that the machine's drift falls on all alike."""
    found: dict[str, list[Row]] = {name: [] for name in names}
    for _ in range(runs):
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(what(Path(folder), name))
    return [median_of(rows) | {"target": name} for name, rows in found.items()]


def checkpoints(runs: int) -> list[Row]:
    """Medians of each checkpoint of `leak`."""
    found = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            found.append(leak(Path(folder)))
    return [median_of(list(rows)) for rows in zip(*found, strict=True)]


def shown(value: Any) -> str:
    """Three digits, but no powers of ten."""
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(title: str, rows: list[Row], columns: str) -> None:
    """Markdown; a column that a row lacks is a dash."""
    names = columns.split()
    print(f"\n**{title}**\n\n| | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for row in rows:
        cells = (shown(row[n]) if n in row else "-" for n in names)
        print(f"| {row['target']} | {' | '.join(cells)} |", flush=True)


def measure(part: str, runs: int, seconds: float) -> list[Row]:
    """One part: its table on stdout, its rows."""
    three = ["direct", "unrecorded", "tokentape"]
    if part == "streams":
        rows = with_added(in_turns(["direct", "tokentape"], streams, runs), "ms")
        for title, columns in (
            ("memory, MB", "worker_pss_mb_idle worker_pss_mb worker_rss_mb_idle worker_rss_mb"),
            ("memory, more", "kib_per_stream_pss writer_pss_mb_idle writer_pss_mb writer_rss_mb"),
            ("latency, ms", "ms_p50 ms_p99 ms_p999 added_p50 added_p99 worker_cpu refused"),
            ("longest, ms", "ms_max_opening ms_max_running read_delay_ms_max steal_s"),
            ("loop lag, ms", "lag_ms_opening lag_ms_running lag_ms_closing"),
        ):
            table(f"{STREAMS} streams of 1 token/s: {title}", rows, columns)
    elif part == "leak":
        rows = checkpoints(runs)
        columns = "worker_rss_mb worker_pss_mb writer_rss_mb writer_pss_mb"
        table("memory after so many requests of one token, 16 at once", rows, columns)
    elif part == "upload":
        rows = in_turns(
            [f"{c}, {f}" for c in ("structure", "none") for f in ("length", "chunked")],
            upload,
            runs,
        )
        for role in ("worker", "writer"):
            columns = " ".join(
                f"{role}_{c}_mb" for c in ("before", "peak", "added", "shared", "left")
            )
            table(
                f"upload of 60 MB: {role}", rows, f"{columns} seconds every_byte prompt_mb parsed"
            )
    elif part == "events":
        what = lambda folder, name: events(folder, name, EVENTS_PER_S, seconds)  # noqa: E731
        rows = with_added(in_turns(three, what, runs), "ms")
        columns = "events_per_s ms_p50 ms_p99 added_p50 added_p99 worker_us_per_event"
        columns += " writer_us_per_event worker_cpu worker_mb server_late_p99_us steal_s"
        table(f"recording on and off, {EVENTS_PER_S} events/s (ms)", rows, columns)
    elif part == "requests":
        what = lambda folder, name: requests(folder, name, ["-n", "16"], seconds)  # noqa: E731
        rows = with_added(in_turns(three, what, runs), "ttft_ms")
        columns = "requests_per_s ttft_ms_p50 ttft_ms_p99 worker_ms_per_request worker_cpu"
        table("recording on and off, closed loop of 16 (ms)", rows, f"{columns} steal_s")
    else:
        rows = in_turns(list(STAMPED), stamps, runs)
        columns = "rows unmatched arrival_kernel_% event_kernel_% lag_us_p50 lag_us_p99 lag_us_p100"
        columns += " lag_us_max_with_start"
        table("stamps as the rows carry them", rows, columns)
        columns = (
            "after_begun_us_p50 after_begun_us_p99 after_sent_us_p50 after_sent_us_p99 steal_s"
        )
        table("arrival on the tape, after the client's own stamps (p99 of its size)", rows, columns)
    return rows


PARTS = ("streams", "leak", "upload", "events", "requests", "stamps")


def main() -> None:
    """Run what is asked for; tables on stdout, everything in --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        compiled("load")
    except FileNotFoundError:
        parser.exit(1, "this bench needs a C compiler (apt-get install gcc libc6-dev)\n")
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"no part named {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    print(", ".join(f"{k} {v}" for k, v in versions().items() if k != "nginx"))
    stolen = steal_s()
    found = {part: measure(part, options.runs, options.seconds) for part in wanted}
    print(f"\nsteal: {steal_s() - stolen:.2f} s")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, default=float))


if __name__ == "__main__":
    main()
