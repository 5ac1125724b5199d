"""The supervisor: owns the listening sockets, starts a worker on each, replaces those that die.

The sockets stay open here whatever becomes of a worker, so a crash costs the streams that it had
open, and refuses no connection: new ones wait in the backlog for the replacement. It imports
neither mitmproxy nor pyarrow, and touches no traffic.
"""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tokentape.traces.errors import TapeError, TokentapeError
from tokentape.traces.recording import say

SHORT_LIFE_S = 2.0  # a worker that ends sooner has not come up
MAX_SHORT_LIVES = 5
NOTE_BYTES = 1 << 16

Samples = dict[str, float]


@dataclass
class Slot:
    """One listening socket and the worker on it."""

    name: str
    bound: socket.socket
    process: subprocess.Popen[bytes] | None = None
    control: socket.socket | None = None
    began_s: float = 0.0
    short_lives: int = 0
    ready: bool = False
    samples: Samples = field(default_factory=dict)
    summary: dict[str, Any] | None = None


class Supervisor:
    """Runs workers until it is told to stop; `run` returns the summaries of those that ended well.

    `deaths` counts workers that did not.
    """

    def __init__(self, sockets: list[socket.socket], hello: dict[str, Any], lock_fd: int) -> None:
        self.slots = [Slot(f"w{n}", bound) for n, bound in enumerate(sockets)]
        self.deaths = 0
        self._hello = hello
        self._lock_fd = lock_fd
        self._stops = 0
        self._failed: str | None = None
        self._past: Samples = {}  # counters of the dead
        self._changed = asyncio.Event()

    async def run(self, on_ready: Callable[[], None]) -> list[dict[str, Any]]:
        """Start, keep, stop; TapeError or TokentapeError when the workers do not come up."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop)
        for slot in self.slots:
            self._start(slot)
        try:
            await self._until(lambda: all(s.ready or self._over(s) for s in self.slots))
            if self._failed is None and not self._stops:
                on_ready()
            await self._until(lambda: all(self._over(s) for s in self.slots))
        finally:
            for slot in self.slots:
                if slot.process is not None:
                    slot.process.kill()
        if self._failed is not None:
            raise (
                TapeError(self._failed) if "tape" in self._failed else TokentapeError(self._failed)
            )
        return [s.summary for s in self.slots if s.summary is not None]

    def stop(self) -> None:
        """Let streams in flight end; the second time, end them."""
        self._stops += 1
        for slot in self.slots:
            self._tell_stop(slot)
            slot.bound.close()  # with the worker's own, new connections are refused
        self._changed.set()

    def samples(self) -> dict[str, Samples]:
        """What each worker said last, by slot; under "", the counters of dead ones."""
        return {s.name: s.samples for s in self.slots} | {"": self._past}

    @property
    def healthy(self) -> bool:
        """Whether every slot has a worker that serves."""
        return all(s.ready for s in self.slots) and not self._stops

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop."""
        return self._stops > 0

    async def _until(self, done: Callable[[], bool]) -> None:
        while not done() and self._failed is None:
            self._changed.clear()
            await self._changed.wait()

    def _over(self, slot: Slot) -> bool:
        return slot.process is None and (slot.summary is not None or self._stops > 0)

    def _tell_stop(self, slot: Slot) -> None:
        if slot.control is not None:
            with contextlib.suppress(OSError):
                slot.control.send(b'{"stop":true}')

    def _start(self, slot: Slot) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = (theirs.fileno(), slot.bound.fileno(), self._lock_fd)
        slot.process = subprocess.Popen(
            [sys.executable, "-m", "tokentape.proxy.worker", str(theirs.fileno())],
            pass_fds=fds,
            start_new_session=True,  # Ctrl-C is for the supervisor, which lets streams end
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        slot.control, slot.began_s, slot.ready = ours, time.monotonic(), False
        about = {"worker": slot.name, "listen_fd": fds[1], "lock_fd": fds[2]}
        ours.send(json.dumps(self._hello | about).encode())
        ours.setblocking(False)
        asyncio.get_running_loop().add_reader(ours.fileno(), self._hear, slot)

    def _hear(self, slot: Slot) -> None:
        assert slot.control is not None
        try:
            message = slot.control.recv(NOTE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._ended(slot)
        else:
            note = json.loads(message)
            if "ready" in note:
                slot.ready = True
                if self._stops:
                    self._tell_stop(slot)  # it could not hear the first one yet
            slot.samples = note.get("samples", slot.samples)
            slot.summary = note.get("summary", slot.summary)
            self._failed = note.get("failed", self._failed)
        self._changed.set()

    def _ended(self, slot: Slot) -> None:
        """The worker is gone; a slot without summary gets another one."""
        assert slot.control is not None
        assert slot.process is not None
        asyncio.get_running_loop().remove_reader(slot.control.fileno())
        slot.control.close()
        code = slot.process.wait()
        slot.process = slot.control = None
        if slot.summary is not None or self._failed is not None:
            return
        self.deaths += 1
        for name, value in slot.samples.items():
            if name.partition("{")[0].endswith("_total"):
                self._past[name] = self._past.get(name, 0.0) + value
        short = time.monotonic() - slot.began_s < SHORT_LIFE_S or not slot.ready
        slot.samples, slot.ready = {}, False
        slot.short_lives = slot.short_lives + 1 if short else 0
        if self._stops:
            return
        if slot.short_lives >= MAX_SHORT_LIVES:
            self._failed = f"worker {slot.name} does not come up (exit {code}); see above"
            return
        say(f"worker {slot.name} died ({_how(code)}); its open streams are cut, it is replaced")
        asyncio.get_running_loop().call_later(0.05 * slot.short_lives, self._restart, slot)

    def _restart(self, slot: Slot) -> None:
        if not self._stops:
            self._start(slot)
        self._changed.set()


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit {code}"


def bind(host: str, port: int, count: int, backlog: int) -> list[socket.socket]:
    """Listening sockets of one address, one per worker; port 0 for any. OSError when it is taken.

    The protocol number matters: without it asyncio leaves Nagle's delay on for accepted sockets,
    which adds 40 ms to short replies.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sockets: list[socket.socket] = []
    with contextlib.ExitStack() as undo:
        for n in range(count):
            bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            undo.callback(bound.close)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if n:  # not the first: it must find the port taken by another program
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound.bind((host, port))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(count > 1))
            port = bound.getsockname()[1]
            sockets.append(bound)
        for bound in sockets:
            bound.listen(backlog)
        undo.pop_all()
    return sockets
