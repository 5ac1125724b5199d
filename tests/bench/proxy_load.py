"""Load and truth for the bench of the proxy: our server and our client in C, compiled when asked.

The server (refserver.c) writes into each event when it sent it; the client (load.c) keeps the
kernel's receive stamp of each read and parses only after the run. Python would cost more on the
core that both share than the proxies that are measured.
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SOURCES = Path(__file__).parent / "refserver"
REQUEST = np.dtype(
    [(n, "<u8") for n in ("begun", "sent", "ended")]
    + [(n, "<u4") for n in ("status", "slot", "fresh", "pad")]
)
EVENT = np.dtype([(n, "<u8") for n in ("kernel", "user", "srv")] + [("req", "<u4"), ("idx", "<u4")])
TRUTH = np.dtype([("sent", "<u8"), ("planned", "<u8"), ("req", "<u4"), ("idx", "<u4")])
LOAD_CORE = 0
START_S = 60.0


def compiled(name: str) -> Path:
    """The program of refserver/NAME.c, kept in the temp folder; FileNotFoundError: no compiler."""
    source = SOURCES / f"{name}.c"
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("cc")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"tokentape-bench-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    program = folder / f"{name}-{digest}"
    if not program.exists():
        made = program.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, "-O2", "-o", str(made), str(source)], check=True)
        made.rename(program)
    return program


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_served(port: int, process: subprocess.Popen[Any]) -> None:
    """Return once `port` takes connections; RuntimeError when the process ends or is too slow."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"{process.args!r} does not serve port {port}")


def first_in_line(pinned: bool, priority: int) -> list[str]:
    """What to put before a command: its core and, where that is allowed, real-time priority.

    Load and truth must not be disturbed by what they measure.
    """
    if not pinned:
        return []
    core = ["taskset", "-c", str(LOAD_CORE)]
    probe = subprocess.run(["chrt", "-f", "1", "true"], capture_output=True, check=False)
    return [*core, "chrt", "-f", str(priority)] if probe.returncode == 0 else core


class Server:
    """The ground truth server while it runs; `port` is where."""

    def __init__(self, folder: Path, *, first_us: int, gap_us: int, pinned: bool) -> None:
        self.port = free_port()
        self._prefix = folder / "truth"
        command = [str(compiled("refserver")), "-p", str(self.port), "-j"]
        command += ["-1", str(first_us), "-2", str(gap_us), "-l", str(self._prefix)]
        self._process = subprocess.Popen([*first_in_line(pinned, 50), *command])
        wait_until_served(self.port, self._process)

    def _get(self, path: str) -> None:
        with socket.create_connection(("127.0.0.1", self.port)) as link:
            link.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert link.recv(4096).startswith(b"HTTP/1.1 200")

    def reset(self) -> None:
        self._get("/__reset")

    def lateness_us(self) -> np.ndarray[Any, Any]:
        """How late each event was sent, against the server's own plan."""
        self._get("/__dump")
        events = np.fromfile(f"{self._prefix}.ev.bin", TRUTH)
        return (events["sent"].astype(np.int64) - events["planned"].astype(np.int64)) / 1e3

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@dataclass
class Seen:
    """One run of the client: what it counted, its requests and, of the window, its events."""

    summary: dict[str, Any]
    requests: np.ndarray[Any, Any]
    events: np.ndarray[Any, Any]

    @property
    def window_s(self) -> float:
        return float(self.summary["end_ns"] - self.summary["begin_ns"]) / 1e9

    def _inside(self, stamps: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        begin, end = self.summary["begin_ns"], self.summary["end_ns"]
        inside: np.ndarray[Any, Any] = (stamps >= begin) & (stamps < end)
        return inside

    def latency_us(self) -> np.ndarray[Any, Any]:
        """From the server's send to the client's kernel, of each event of the window."""
        kept = self.events[self._inside(self.events["kernel"])]
        late: np.ndarray[Any, Any] = kept["kernel"].astype(np.int64) - kept["srv"].astype(np.int64)
        return late / 1e3

    def ttft_us(self) -> np.ndarray[Any, Any]:
        """From the beginning of the request (of its connection, if new) to its first event."""
        first = self.events[self.events["idx"] == 0]
        begun = self.requests["begun"][first["req"]]
        kept = self._inside(begun)
        arrived = first["kernel"][kept].astype(np.int64)
        waited: np.ndarray[Any, Any] = arrived - begun[kept].astype(np.int64)
        return waited / 1e3

    def refused(self) -> int:
        """Requests that failed or were answered with anything but 200."""
        answered = self.requests["status"][self.requests["status"] > 0]
        return int(self.summary["failed"]) + int((answered != 200).sum())


def drive(
    folder: Path,
    port: int,
    *options: str,
    pinned: bool,
    on_begin: Callable[[], None],
    on_end: Callable[[], None],
) -> Seen:
    """Run the client; `on_begin` and `on_end` are called at the edges of its window."""
    prefix = folder / "load"
    command = [*first_in_line(pinned, 40), str(compiled("load")), "-p", str(port)]
    client = subprocess.Popen(
        [*command, "-o", str(prefix), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert client.stdin is not None
    assert client.stdout is not None
    for word, call in (("begin", on_begin), ("end", on_end)):
        heard = client.stdout.readline().strip()
        if heard == "end" and word == "begin":
            raise RuntimeError("the client reached its last request before the window began")
        if heard != word:
            raise RuntimeError(f"the client said {heard!r}, not {word!r}")
        call()
    rest, _ = client.communicate("\n")
    if client.returncode:
        raise RuntimeError(f"the client failed ({client.returncode})")
    requests = np.fromfile(f"{prefix}.requests", REQUEST)
    return Seen(json.loads(rest), requests, np.fromfile(f"{prefix}.events", EVENT))
