"""One life of a writer process, seen from the hot process: its start, its channel, its end.

The hot process outlives its writers: when one dies, the next life begins under a new name, takes
over what the dead one left in its journal, and is sent again what had not got there.
"""

import contextlib
import json
import mmap
import os
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokentape.traces import blocks
from tokentape.traces.identity import incarnation
from tokentape.traces.journal_files import counter_path

READY_TIMEOUT_S = 30.0


class WriterLife:
    """A writer process and the shared memory to it; `counters` is the page of `blocks`."""

    def __init__(
        self,
        tape: Path,
        lock_fd: int,
        hello: dict[str, Any],
        on_trouble: Callable[[str], None],
        ancestors: dict[str, int] | None = None,
        before: "WriterLife | None" = None,
    ) -> None:
        """Start the process; OSError when it cannot be started. `ready` may come later.

        Args: ancestors: dead writers whose work it may go on with (see `inherit.py`). before: the
        last one of them, whose counts go on.
        """
        self._on_trouble = on_trouble
        self.incarnation = incarnation(str(hello["worker"]))
        self.began_s = time.monotonic()
        self.ready: dict[str, int] | None = None  # what it recovered of the life before
        self.summary: dict[str, Any] | None = None
        self.served: dict[str, float] = {}  # counts of finished requests, see `served.py`
        self.took_over = not ancestors  # nothing of a dead writer is in its journal alone
        page = counter_path(tape, self.incarnation)
        if before is None:
            self.counters = _counter_page(page)
        else:
            self.counters = before.counters
            self.counters[blocks.SLOT_AT] = blocks.NO_SLOT
            with contextlib.suppress(OSError):  # one page for all lives, under the name of each
                os.link(counter_path(tape, before.incarnation), page)
        self.channel, writer_socket, memory_fd = blocks.channel_pair()
        command = [sys.executable, "-m", "tokentape.traces.writer_process"]
        command += [str(writer_socket.fileno()), str(memory_fd), str(lock_fd)]
        try:
            self.process = subprocess.Popen(
                command,
                pass_fds=(writer_socket.fileno(), memory_fd, lock_fd),
                start_new_session=True,  # Ctrl-C is for the hot process; the writer ends after it
                stdin=subprocess.DEVNULL,
            )
        finally:
            writer_socket.close()
            os.close(memory_fd)
        about = {
            "tape": str(tape),
            "incarnation": self.incarnation,
            "ancestors": ancestors or {},
        }
        self.channel.note(json.dumps(about | hello).encode())
        self.sender = blocks.BlockSender(self.channel)

    def wait_ready(self) -> bool:
        """Wait for the process to say that it is ready; False when it ends instead."""
        self.channel.sock.settimeout(READY_TIMEOUT_S)
        try:
            message = self.channel.sock.recv(1 << 16)
        except OSError:
            message = b""
        self.channel.sock.setblocking(False)
        if message:
            self._learn(json.loads(message[1:]))
        return bool(message)

    def poll(self) -> None:
        """Take the notes that came, and pass troubles on."""
        for note in map(json.loads, self.sender.poll()):
            self._learn(note)
            self.summary = note.get("summary", self.summary)
            self.served = note.get("served", self.served)
            if "trouble" in note:
                self._on_trouble(note["trouble"])

    def _learn(self, note: dict[str, Any]) -> None:
        self.ready = note.get("ready", self.ready)
        self.took_over = note.get("took_over", self.took_over)

    def ask_to_finish(self, facts: dict[str, Any], losses: dict[str, int], deadline: float) -> None:
        """Wait for the summary, until the process is gone or the time is up; it is dead after."""
        if self.sender.alive:
            self.channel.sock.setblocking(True)
            try:
                self.channel.note(json.dumps({"finish": facts, "losses": losses}).encode())
            except OSError:
                self.sender.alive = False
            self.channel.sock.setblocking(False)
        while self.summary is None and self.sender.alive and time.monotonic() < deadline:
            self.poll()
            time.sleep(0.002)
        self._end()

    def _end(self) -> None:
        if self.summary is None:
            self.process.kill()
        self.process.wait()
        self.sender.alive = False
        self.channel.close()

    def bury(self) -> None:
        """Let go of a dead process."""
        self._end()


def _counter_page(path: Path) -> Any:
    """A page of 64-bit counters that survives this process; of memory only, on a full disk."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, blocks.COUNTER_BYTES)  # else a full disk is a SIGBUS later
            page = memoryview(mmap.mmap(fd, blocks.COUNTER_BYTES)).cast("Q")
        finally:
            os.close(fd)
    except OSError:
        page = memoryview(array("Q", bytes(blocks.COUNTER_BYTES)))
    page[blocks.SLOT_AT] = blocks.NO_SLOT
    return page
