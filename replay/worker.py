"""A worker process of a replay: sends its share of the plan, records it, and tells how it goes.

It is told what to do on its control socket; its share lies in memory that it inherits, so that no
header value is in argv or on disk. It ends early when the socket says stop or is closed: what is in
flight ends and its part of the tape is sealed all the same.
"""

import asyncio
import contextlib
import json
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokentape.replay.progress import Progress
from tokentape.replay.sending import run_loop, send_share
from tokentape.replay.share import Share
from tokentape.traces.errors import TokentapeError
from tokentape.traces.recording import Recorder

NOTE_BYTES = 1 << 16


class Told:
    """The control socket, as the worker uses it: what is heard here ends waits and runs."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._warm = asyncio.Event()
        self._t0_ns: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._stop: Callable[[], None] = lambda: None
        self._stops = 0
        control.setblocking(False)
        asyncio.get_running_loop().add_reader(control.fileno(), self._hear)

    def _hear(self) -> None:
        try:
            note = json.loads(self._control.recv(NOTE_BYTES) or b'{"gone":true}')
        except OSError:
            return
        if "warm" in note:
            self._warm.set()
        if "t0_ns" in note and not self._t0_ns.done():
            self._t0_ns.set_result(note["t0_ns"])
        if "gone" in note:
            self.close()
        if "stop" in note or "gone" in note:
            self._stops += 1
            self._stop()

    def tell(self, **note: Any) -> None:
        """Say something to the crew's leader, if it still listens."""
        with contextlib.suppress(OSError):  # not fast enough: the next note says more
            self._control.send(json.dumps(note).encode())

    async def prepared(self) -> None:
        """Wait until all others are as far (see `Start`)."""
        self.tell(prepared=True)
        await self._warm.wait()

    async def instant(self, lead_ns: int) -> int:
        """The start that all workers get."""
        self.tell(ready=lead_ns)
        return await self._t0_ns

    def progress(self, state: Progress) -> None:
        """Pass on how it stands."""
        self.tell(progress=asdict(state))

    @contextmanager
    def stops(self, stop: Callable[[], None]) -> Iterator[None]:
        """Call `stop` for each stop that is heard, or was."""
        self._stop = stop
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stop)
        for _ in range(self._stops):
            stop()
        yield
        loop.remove_signal_handler(signal.SIGTERM)

    def close(self) -> None:
        """Hear no more."""
        asyncio.get_running_loop().remove_reader(self._control.fileno())


def main() -> None:
    """Send until all is sent or a stop is heard; the control socket's descriptor is in argv."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the crew's leader
    control = socket.socket(fileno=int(sys.argv[1]))
    hello = json.loads(control.recv(NOTE_BYTES))
    try:
        ended = _work(control, hello)
    except TokentapeError as error:
        ended = {"failed": str(error)}
    control.setblocking(True)
    with contextlib.suppress(OSError):
        control.send(json.dumps(ended).encode())


def _work(control: socket.socket, hello: dict[str, Any]) -> dict[str, Any]:
    with os.fdopen(hello["share_fd"], "rb") as memory:
        share: Share = pickle.load(memory)  # noqa: S301 - of our own parent, in private memory
    about = {"worker": hello["worker"], "content": "structure", "key": "", "fsync": False}
    about |= {"anchor": hello["anchor"]}
    recorder = Recorder(Path(hello["tape"]), hello["lock_fd"], about)
    try:
        sent = run_loop(_send(control, share, recorder, hello["worker"]))
    finally:
        recorder.finish()
    return {"sent": asdict(sent)}


async def _send(control: socket.socket, share: Share, recorder: Recorder, worker: str) -> Any:
    told = Told(control)
    try:
        return await send_share(
            share, recorder, told.stops, worker=worker, start=told, progress=told.progress
        )
    finally:
        told.close()


if __name__ == "__main__":
    main()
