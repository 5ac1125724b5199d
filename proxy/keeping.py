"""Keeps a capture's tape within its limits while it runs: a pass at once, then each minute.

The passes are processes of their own (`traces/retention.py`); of those that fail the first is said.
"""

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tokentape.traces.recording import say

EVERY_S = 60.0


@contextlib.contextmanager
def kept_within(tape: Path, retain_s: float | None, max_bytes: int | None) -> Iterator[None]:
    """Delete what is over the limits while the block runs; None is no limit."""
    if retain_s is None and max_bytes is None:
        yield
        return
    command = [sys.executable, "-m", "tokentape.traces.retention"]
    command += [str(tape), str(retain_s or 0), str(max_bytes or 0)]
    over = threading.Event()
    thread = threading.Thread(target=_passes, args=(command, tape, over))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _passes(command: list[str], tape: Path, over: threading.Event) -> None:
    complained = False
    while True:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode and not complained:
            why = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
            say(f"{tape}: old segments were not deleted: {why}")
        complained = bool(done.returncode)
        if over.wait(EVERY_S):
            return
