"""What each fault costs: bytes of replies altered, replies cut, rows and events lost, books.

    ./run bench faults [--only "disk full;SIGTERM"] [--requests 300] [--json FILE] [--list]

Each fault strikes a `tokentape capture` of its own, with real processes, while 8 clients ask a
scripted upstream for streams. Every reply is compared byte for byte with what the upstream sends
for that request; what an upstream or client fault ends early must be what it is without the proxy,
to the byte and to the kind of end. Full disks need root (a tmpfs is mounted), slow ones a compiler.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # what tests share

from proxy_targets import Absent, versions

from conftest import fill
from proxied import (
    Proxied,
    capturing,
    chunk,
    ended,
    post,
    scripted,
    until,
    workers,
    writers,
)
from tokentape.traces.check import check
from tokentape.traces.errors import TokentapeError
from tokentape.traces.reader import Tape, open_tape
from tokentape.traces.recover import recover

CLIENTS = 8
THINK_S = 0.01  # of a client between two requests, on average
TIMEOUT_S = 30
AFTER = 60  # requests that follow a fault at least
FAULTY_ONE_IN = 3  # of the requests, where upstream or client is what fails
LARGE_ONE_IN = 40  # of the requests, where the client reads slowly
PAUSE_S = 2.0  # of a slow client, before it reads at all
DISK_MB = 16
SLOW_WRITE_MS, SLOW_SYNC_MS = 50, 200
NEVER_READ_BYTES = 1 << 16  # a slow client's receive buffer: the rest has to wait in the proxy
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST

NEVER, UNANSWERED, STREAMS = "never", "unanswered", "streams"
WHOLE, EOF, RST, LEFT, SILENT = "whole", "eof", "reset", "left", "timeout"
Row = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What the upstream sends for request `number`; the same on every call."""

    head: bytes
    chunks: list[bytes]
    gap_s: float  # between two events
    events: int

    @property
    def data(self) -> bytes:
        return self.head + b"".join(self.chunks)

    def until(self, events: int) -> bytes:
        return self.head + b"".join(self.chunks[:events])


@lru_cache(maxsize=4096)
def reply(number: int, large: bool) -> Reply:
    """20 to 50 events, three in four replies paced; or 250 large events as fast as they go."""
    rng = random.Random(number)
    events, padding = (250, 16_000) if large else (rng.randint(20, 50), rng.randint(0, 200))
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Number: {number}\r\n"
    chunks = []
    for n in range(events):
        choice = {"index": 0, "text": f" {rng.randbytes(4 + padding // 2).hex()} {n}"}
        message = {"id": f"c{number}", "model": "m", "choices": [choice]}
        chunks.append(chunk(b"data: " + json.dumps(message).encode() + b"\n\n"))
    chunks.append(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    gap_s = rng.uniform(0.001, 0.005) if number % 4 and not large else 0.0
    return Reply(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n", chunks, gap_s, events)


@dataclass(frozen=True)
class Fault:
    """A fault: what strikes whom, and how replies may end because of it."""

    strike: Callable[["Rig"], None] = lambda _: None
    upstream: str = WHOLE  # how the upstream ends one reply in FAULTY_ONE_IN, half way
    client: str = WHOLE  # how the client ends it
    slow: bool = False  # clients read large replies late
    cuts: str = NEVER  # whether it may end replies: STREAMS anywhere, UNANSWERED before a byte
    keep_alive: bool = True
    options: tuple[str, ...] = ()
    disk_mb: int = 0
    slow_disk: bool = False
    final: bool = False  # the capture does not live on after the strike

    def is_faulty(self, number: int) -> bool:
        return (self.upstream, self.client) != (WHOLE, WHOLE) and not number % FAULTY_ONE_IN

    def reply(self, number: int) -> Reply:
        return reply(number, self.slow and not number % LARGE_ONE_IN)

    def cut_at(self, number: int) -> int:
        """Events of a faulty reply that the upstream sends, or the client reads."""
        return self.reply(number).events // 2


@dataclass
class Upstream:
    """Sends each request's reply, and counts the events that it has sent."""

    fault: Fault
    events: int = 0
    arrived: int = 0
    not_freed: int = 0  # stalled connections that stayed open when the client had left
    lock: threading.Lock = field(default_factory=threading.Lock)

    def script(self, connection: socket.socket, request: bytes) -> None:
        number = int(re.search(rb"request (\d+)", request)[1])  # type: ignore[index]
        counted = b"X-Direct" not in request  # only what passed the proxy belongs on the tape
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        how = self.fault.upstream if self.fault.is_faulty(number) else WHOLE
        sent = 0
        try:
            sent = self._send(connection, number, None if how == WHOLE else how)
        finally:
            with self.lock:
                self.events += sent * counted
                self.arrived += counted

    def _send(self, connection: socket.socket, number: int, end: str | None) -> int:
        """Events sent before the end, whoever brought that about."""
        what = self.fault.reply(number)
        stop = self.fault.cut_at(number) if end else len(what.chunks)
        sent = 0
        with contextlib.suppress(OSError):
            connection.sendall(what.head)
            for piece in what.chunks[:stop]:
                connection.sendall(piece)
                sent += 1
                if what.gap_s:
                    time.sleep(what.gap_s)
            if end:
                self._end(connection, end)
        return min(sent, what.events)

    def _end(self, connection: socket.socket, how: str) -> None:
        if how == SILENT:
            connection.settimeout(10)
            try:
                connection.recv(1)
            except TimeoutError:
                with self.lock:
                    self.not_freed += 1
        elif how == RST:
            time.sleep(0.02)  # what was sent has been read: a reset must not overtake it
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        connection.close()


@dataclass(frozen=True)
class Got:
    """What a client received for one request, and how that ended."""

    number: int
    data: bytes
    end: str
    took_s: float
    reused: bool = False  # the connection had carried a request before


class Load:
    """Clients in a closed loop, each request with a number of its own; `go` may hold them."""

    def __init__(self, fault: Fault, address: tuple[str, int]) -> None:
        self.go = threading.Event()
        self.go.set()
        self.over = threading.Event()
        self.in_flight = 0
        self.got: list[Got] = []
        self.refused = 0
        self._fault = fault
        self._address = address
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._client, args=(n,)) for n in range(CLIENTS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Let what is in flight end."""
        self.over.set()
        self.go.set()
        for thread in self._threads:
            thread.join()

    def _client(self, which: int) -> None:
        rng = random.Random(which)
        keep_alive = self._fault.keep_alive and bool(which % 2)
        connection: socket.socket | None = None
        while not self.over.is_set():
            self.go.wait()
            with self._lock:
                number = next(self._numbers)
                self.in_flight += 1
            reused = False
            try:
                if connection and is_stale(connection):
                    connection.close()
                    connection = None
                reused = connection is not None
                connection = connection or connect(self._address, slow=self._fault.slow)
            except OSError:
                with self._lock:
                    self.refused += 1
                    self.in_flight -= 1
                return
            got = ask(connection, self._fault, number, keep_alive)
            with self._lock:
                self.got.append(replace(got, reused=reused))
                self.in_flight -= 1
            if got.end != WHOLE or not keep_alive:
                connection.close()
                connection = None
            time.sleep(rng.uniform(0, 2 * THINK_S))
        if connection:
            connection.close()


def is_stale(connection: socket.socket) -> bool:
    """Closed by the peer while it was idle: clients look before they send on it."""
    return bool(select.select([connection], [], [], 0)[0])  # no reply is due: this is the end


def connect(address: tuple[str, int], *, slow: bool) -> socket.socket:
    connection = socket.socket()
    if slow:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, NEVER_READ_BYTES)
    connection.settimeout(TIMEOUT_S)
    connection.connect(address)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def ask(
    connection: socket.socket, fault: Fault, number: int, keep_alive: bool, *headers: str
) -> Got:
    """Send request `number`, read as the fault has it."""
    what = fault.reply(number)
    leaves = fault.client if fault.is_faulty(number) else WHOLE
    wanted = len(what.data) if leaves == WHOLE else len(what.until(fault.cut_at(number)))
    body = json.dumps({"model": "m", "prompt": f"request {number}", "stream": True}).encode()
    begun_s, data, end = time.monotonic(), bytearray(), WHOLE
    try:
        connection.sendall(post("/v1/completions", body, *headers, close=not keep_alive))
        if fault.slow and not number % LARGE_ONE_IN:
            time.sleep(PAUSE_S)
        while len(data) < wanted:
            piece = connection.recv(min(wanted - len(data), 1 << 18))
            if not piece:
                end = EOF
                break
            data += piece
    except TimeoutError:
        end = SILENT
    except OSError:
        end = RST
    if end == WHOLE and leaves != WHOLE:
        end = LEFT
        if leaves == RST:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    return Got(number, bytes(data), end, time.monotonic() - begun_s)


@dataclass
class Rig:
    """What a strike may reach."""

    proxy: Proxied
    load: Load
    disk: Path
    notes: list[str] = field(default_factory=list)

    def more(self, requests: int) -> None:
        """Wait until so many more replies have come."""
        goal = len(self.load.got) + requests
        until(lambda: len(self.load.got) >= goal, "the load does not go on", 90)

    def for_s(self, seconds: float) -> None:
        """Traffic for so long, and a request at least: it goes on."""
        before = len(self.load.got)
        time.sleep(seconds)
        self.notes.append(
            f"{len(self.load.got) - before} replies in the {seconds:g} s of the fault"
        )
        self.more(1)


def kill_writer(rig: Rig) -> None:
    for pid in writers(rig.proxy):
        os.kill(pid, signal.SIGKILL)


def kill_idle_worker(rig: Rig) -> None:
    """Between requests; it is stopped first, so that the next ones wait when it dies."""
    rig.load.go.clear()
    until(lambda: rig.load.in_flight == 0, "requests in flight")
    time.sleep(0.1)
    (worker,) = workers(rig.proxy)
    os.kill(worker, signal.SIGSTOP)
    rig.load.go.set()
    until(lambda: rig.load.in_flight == CLIENTS, "no requests wait")
    time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    rig.notes.append(f"{CLIENTS} requests waited")


def kill_all(rig: Rig) -> None:
    doomed = [rig.proxy.process.pid, *workers(rig.proxy), *writers(rig.proxy)]
    rig.notes.append(f"{len(doomed)} processes")
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    rig.proxy.process.wait()
    until(lambda: all(ended(p) for p in doomed), "still alive")


def fill_disk(rig: Rig) -> None:
    fill(rig.disk)


def fill_disk_and_free_it(rig: Rig) -> None:
    filler = fill(rig.disk)
    rig.for_s(2)
    filler.unlink()
    rig.more(AFTER)
    begun = len(rig.load.got)
    until(lambda: unsealed(rig.proxy.tape) > begun, "recording does not go on", 20)
    rig.notes.append(f"{len(rig.load.got) - begun} replies until the journal had caught up")


def unsealed(tape: Path) -> int:
    time.sleep(0.2)  # each look reads the whole journal
    return open_tape(tape).unsealed_rows


def stop_writer(rig: Rig) -> None:
    (writer,) = writers(rig.proxy)
    os.kill(writer, signal.SIGSTOP)
    try:
        rig.for_s(3)
    finally:
        os.kill(writer, signal.SIGCONT)


def terminate(rig: Rig) -> None:
    rig.notes.append(f"{rig.load.in_flight} in flight at the signal")
    rig.proxy.process.send_signal(signal.SIGTERM)
    until(lambda: rig.load.refused == CLIENTS, "connections are still taken", 20)


FAULTS = {
    "none (control)": Fault(),
    "kill -9 of the writer": Fault(kill_writer),
    "kill -9 of a worker between requests": Fault(kill_idle_worker, keep_alive=False),
    "kill -9 of everything, then recover": Fault(
        kill_all, cuts=STREAMS, final=True, options=("--workers", "2")
    ),
    "disk full": Fault(fill_disk, disk_mb=DISK_MB),
    "disk full and back": Fault(fill_disk_and_free_it, disk_mb=DISK_MB),
    "slow disk": Fault(slow_disk=True),
    "slow disk, --fsync": Fault(slow_disk=True, options=("--fsync",)),
    "writer stuck for 3 s": Fault(stop_writer),
    "upstream resets mid-stream": Fault(upstream=RST),
    "upstream FIN mid-stream": Fault(upstream=EOF),
    "upstream stalls, client leaves": Fault(upstream=SILENT, client=LEFT),
    "client resets mid-stream": Fault(client=RST),
    "slow client": Fault(slow=True),
    "SIGTERM": Fault(terminate, cuts=UNANSWERED, final=True),
}


@contextlib.contextmanager
def small_disk(folder: Path, size_mb: int) -> Iterator[Path]:
    """A file system of that size at `folder`; 0: no one of its own."""
    if not size_mb:
        yield folder
        return
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(folder)]
    made = subprocess.run(mount, capture_output=True, check=False)
    if made.returncode:
        raise Absent(f"cannot mount a tmpfs here: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def slow_disk(folder: Path) -> dict[str, str]:
    """The environment in which files are slow; Absent where that cannot be had."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise Absent("no C compiler")
    shim = folder / "slow_disk.so"
    source = Path(__file__).with_name("slow_disk.c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(shim), str(source)], check=True)
    environment = {"LD_PRELOAD": str(shim), "SLOW_WRITE_MS": str(SLOW_WRITE_MS)}
    environment["SLOW_SYNC_MS"] = str(SLOW_SYNC_MS)
    probe = "import os, sys; f = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY); "
    probe += "os.write(f, b'x'); os.fsync(f)"
    command = [sys.executable, "-c", probe, str(folder / "probe")]
    begun_s = time.monotonic()
    subprocess.run(command, env=os.environ | environment, check=True)
    if time.monotonic() - begun_s < (SLOW_WRITE_MS + SLOW_SYNC_MS) / 1000:
        raise Absent("LD_PRELOAD does not take hold here")
    return environment


def direct_ends(fault: Fault, upstream: str, numbers: list[int]) -> dict[int, Got]:
    """How the faulty replies end without a proxy."""
    host, _, port = upstream.removeprefix("http://").rpartition(":")
    ends = {}
    for number in numbers:
        with connect((host, int(port)), slow=False) as connection:
            ends[number] = ask(connection, fault, number, False, "X-Direct: 1")
    return ends


def verdict(fault: Fault, got: Got, direct: dict[int, Got]) -> str:
    """same, cut (by the fault itself, and as it should) or altered."""
    truth = fault.reply(got.number).data
    if got.number in direct:
        control = direct[got.number]
        return "cut" if (got.data, got.end) == (control.data, control.end) else "altered"
    if got.end == LEFT:
        return "cut" if truth.startswith(got.data) else "altered"
    if got.end == WHOLE:
        return "same" if got.data == truth else "altered"
    may_cut = fault.cuts == STREAMS or (fault.cuts == UNANSWERED and not got.data)
    return "cut" if may_cut and truth.startswith(got.data) else "altered"


def strike(name: str, requests: int) -> Row:
    """One fault from start to books."""
    fault = FAULTS[name]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        disk = folder / "disk"
        disk.mkdir()
        stack.enter_context(small_disk(disk, fault.disk_mb))
        environment = slow_disk(folder) if fault.slow_disk else {}
        upstream = Upstream(fault)
        url = stack.enter_context(scripted(upstream.script))
        proxy = stack.enter_context(
            capturing(url, disk / "a.tape", *fault.options, environment=environment)
        )
        load = Load(fault, (proxy.host, proxy.port))
        rig = Rig(proxy, load, disk)
        begun_s = time.monotonic()
        load.start()
        try:
            rig.more(requests // 3)
            fault.strike(rig)
            if not fault.final:
                rig.more(max(AFTER, requests - len(load.got)))
        finally:
            load.finish()
        load_s = time.monotonic() - begun_s
        said = end_of(proxy)
        row: Row = {"fault": name, "load_s": load_s, "notes": rig.notes, "said": said}
        faulty = [g.number for g in load.got if fault.is_faulty(g.number)]
        direct = direct_ends(fault, url, faulty) if fault.upstream in (RST, EOF) else {}
        return row | replies(fault, load, direct) | books(fault, rig, upstream)


def end_of(proxy: Proxied) -> str:
    """Stop the capture, unless the fault has ended it; what it said."""
    if proxy.process.poll() is None:
        with contextlib.suppress(AssertionError):
            return proxy.stop()
    assert proxy.process.stdout is not None
    assert proxy.process.stderr is not None
    if proxy.process.stdout.closed:
        return ""
    return proxy.process.stdout.read() + proxy.process.stderr.read()


def replies(fault: Fault, load: Load, direct: dict[int, Got]) -> Row:
    """What the clients got."""
    verdicts = {g.number: verdict(fault, g, direct) for g in load.got}
    found = Counter(verdicts.values())
    odd = [g for g in load.got if verdicts[g.number] == "altered"]
    return {
        "sent": len(load.got),
        "refused": load.refused,
        "compared_mb": sum(len(g.data) for g in load.got) / 1e6,
        "altered": found["altered"],
        "cut": found["cut"],
        "cut_at_0": sum(1 for g in load.got if verdicts[g.number] == "cut" and not g.data),
        "unanswered": dict(Counter(how(g) for g in load.got if not g.data)),
        "slowest_s": max(g.took_s for g in load.got),
        "odd": [f"request {g.number}: {len(g.data)} bytes, {g.end}" for g in odd[:10]],
        "odd_ends": dict(Counter(how(g) for g in odd)),
    }


def how(got: Got) -> str:
    connection = "a reused connection" if got.reused else "a new connection"
    return f"{got.end} {'in a reply' if got.data else 'before a byte'} on {connection}"


def books(fault: Fault, rig: Rig, upstream: Upstream) -> Row:
    """What the tape says, before and after `recover` where rows wait in its journal."""
    tape_path = rig.proxy.tape
    (rig.disk / "filler").unlink(missing_ok=True)
    tape = open_tape(tape_path)
    waiting = tape.unsealed_rows + tape.open_rows
    problems = []
    if waiting or fault.final:
        if rig.proxy.process.returncode == 0:  # a killed capture has not counted yet
            problems += imbalance(tape)
        recover(tape_path)
        tape = open_tape(tape_path)
    problems += imbalance(tape)
    seen = sum(tape.facts.get("seen", {}).values())
    if not fault.final and seen != len(rig.load.got):
        problems.append(f"{seen} seen of {len(rig.load.got)} sent")
    if upstream.not_freed:  # a stalled one, when its client had left
        problems.append(f"{upstream.not_freed} upstream connections not freed")
    columns = ["arrival_ns", "outcome", "events_dropped", "backpressure_ns"]
    rows = tape.read(columns).to_pylist()
    arrivals = [r["arrival_ns"] for r in rows]
    return {
        "rows": tape.rows,
        "waited_for_recover": waiting,
        "outcomes": dict(Counter(r["outcome"] for r in rows)),
        "events": tape.events,
        "events_sent": upstream.events,
        "arrived": upstream.arrived,
        "events_dropped": sum(r["events_dropped"] or 0 for r in rows),
        "gap_s": max((b - a for a, b in itertools.pairwise(arrivals)), default=0) / 1e9,
        "held_back": sum(1 for r in rows if r["backpressure_ns"]),
        "losses": tape.losses,
        "lost_reads": sum(tape.facts.get("lost_reads", {}).values()),
        "seen": seen,
        "problems": problems,
    }


def imbalance(tape: Tape) -> list[str]:
    """What is wrong with the books; empty when they balance."""
    seen = sum(tape.facts.get("seen", {}).values())
    counted = tape.rows + sum(tape.losses.values()) + tape.unsealed_rows
    found = [f"{f.what} ({f.count})" for f in check(tape) if f.severity == "error"]
    return found + ([f"{seen} seen, {counted} accounted for"] if seen != counted else [])


COLUMNS = (
    "fault | requests sent | replies compared (MB) | replies altered | cut by the fault itself | "
    "rows | events on tape of events sent | lost rows | lost_reads | books balance (seen)"
)


def line(row: Row) -> str:
    cut = f"{row['cut']}" + (f" ({row['cut_at_0']} before a byte)" if row["cut_at_0"] else "")
    rows = f"{row['rows']}"
    if row["waited_for_recover"]:
        rows += f" ({row['waited_for_recover']} by `recover`)"
    lost = ", ".join(f"{n} {reason}" for reason, n in row["losses"].items()) or "0"
    balance = "; ".join(row["problems"])
    cells = [row["fault"], row["sent"], f"{row['sent']} ({row['compared_mb']:.1f})", row["altered"]]
    cells += [cut, rows, f"{row['events']} of {row['events_sent']}", lost, row["lost_reads"]]
    cells.append(f"off: {balance}" if balance else f"ok ({row['seen']})")
    return f"| {' | '.join(map(str, cells))} |"


def remarks(row: Row) -> Iterator[str]:
    """What the table has no column for."""
    if row["odd"]:
        yield f"altered: {row['odd_ends']}; {'; '.join(row['odd'])}"
    for word in ("Traceback", "proxy:"):
        if word in row["said"]:
            yield f"it said: {row['said'].strip()[-300:]!r}"
    if row["unanswered"]:
        yield f"unanswered: {row['unanswered']}, {row['arrived']} requests had reached the upstream"
    if row["events_dropped"]:
        yield f"{row['events_dropped']} reads dropped in rows that were kept"
    if row["held_back"]:
        yield f"{row['held_back']} rows held back by a slow client"
    if set(row["outcomes"]) - {"ok"}:
        yield f"outcomes {row['outcomes']}"
    yield from row["notes"]
    yield (
        f"load {row['load_s']:.1f} s, slowest reply {row['slowest_s']:.2f} s, "
        f"longest time between two arrivals on tape {row['gap_s']:.2f} s"
    )


def main() -> None:
    """A Markdown row for each fault as it is measured, then remarks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults by name, separated by ';'")
    parser.add_argument("--requests", type=int, default=300, help="at least so many for each fault")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--list", action="store_true", help="print the names and end")
    options = parser.parse_args()
    if options.list:
        print("\n".join(FAULTS))
        return
    asked = [n.strip() for n in options.only.split(";")] if options.only else list(FAULTS)
    if unknown := [n for n in asked if n not in FAULTS]:
        parser.error(f"no fault named {unknown[0]!r}; --list names them")
    about = versions()
    print(f"Python {about['python']}, kernel {about['kernel']}, {CLIENTS} clients\n", flush=True)
    print(f"| {COLUMNS} |\n{'|---' * (COLUMNS.count(' | ') + 1)}|", flush=True)
    found, failed = [], False
    for name in asked:
        try:
            found.append(strike(name, options.requests))
            print(line(found[-1]), flush=True)
        except (AssertionError, OSError, subprocess.TimeoutExpired, TokentapeError) as why:
            failed = True
            print(f"| {name} | FAILED: {why!r} |{' |' * COLUMNS.count(' | ')}", flush=True)
        except Absent as why:
            print(f"| {name} | not run: {why} |{' |' * COLUMNS.count(' | ')}", flush=True)
    print()
    for row in found:
        print(f"- {row['fault']}: {'; '.join(remarks(row))}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    sys.exit(failed or any(row["altered"] or row["problems"] for row in found))


if __name__ == "__main__":
    main()
