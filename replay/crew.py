"""The workers of a replay: started, let go at one instant, listened to, and missed when they die.

Each has its share of the plan and its own segments of the one tape, whose lock the leader holds. A
worker that dies is not replaced and nothing of it is sent again: the load would be another one. The
leader sends no request and touches no reply.
"""

import asyncio
import contextlib
import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokentape.replay.health import Health
from tokentape.replay.progress import Progress, added
from tokentape.replay.sender import PROGRESS_EVERY_S, Sent
from tokentape.replay.sending import Stops, Tell
from tokentape.replay.sessions import Numbers
from tokentape.replay.share import Share
from tokentape.replay.start import StartAt
from tokentape.replay.tally import WorkerEnd
from tokentape.replay.worker import NOTE_BYTES
from tokentape.traces.clock import take_anchor
from tokentape.traces.errors import TokentapeError
from tokentape.traces.recording import say

KILL_AT = 3  # Ctrl-C so many times ends what hangs


@dataclass
class Member:
    """A worker; `sent` when it has ended well, `died` when it has not."""

    name: str
    numbers: Numbers  # of its requests in the plan
    process: subprocess.Popen[bytes] | None = None
    control: socket.socket | None = None
    prepared: bool = False
    ready_ns: int | None = None  # how long arming takes before the start
    progress: Progress | None = None
    sent: Sent | None = None
    failed: str = ""
    died: str = ""

    @property
    def over(self) -> bool:
        """Nothing more comes of it."""
        return self.process is None

    @property
    def end(self) -> WorkerEnd:
        """What became of it."""
        return WorkerEnd(self.name, len(self.numbers), self.sent, self.failed or self.died)

    def settle(self, sent: int | None) -> None:
        """Nothing of it is in flight any more."""
        if (last := self.progress) is not None:
            sent = last.sent if sent is None else sent
            self.progress = replace(last, sent=sent, done=sent, in_flight=0)

    def tell(self, **note: Any) -> None:
        """Say something to it, if it still listens."""
        if self.control is not None:
            with contextlib.suppress(OSError):
                self.control.send(json.dumps(note).encode())


class Crew:
    """Runs the members to their ends; each gets its part of `whole`."""

    def __init__(self, whole: Share, members: list[Member], tape: Path, lock_fd: int) -> None:
        self.members = members
        self._whole = whole
        self._tape = tape
        self._lock_fd = lock_fd
        self._changed = asyncio.Event()
        self._stops = 0
        self._let_go = False

    async def run(self, stops: Stops, start: StartAt, progress: Tell | None = None) -> None:
        """Start all, let them go together, wait for all.

        TokentapeError when one does not get as far as the start: then none has sent anything.
        """
        telling = asyncio.ensure_future(self._report(progress)) if progress is not None else None
        try:
            with stops(self.stop):
                anchor = take_anchor().as_dict()
                for member in self.members:
                    self._begin(member, anchor)
                await self._together(start)
                await self._until(lambda: all(m.over for m in self.members))
        finally:
            if telling is not None:
                telling.cancel()
            for member in self.members:
                self._end(member)

    def stop(self) -> None:
        """No member sends any more; what is in flight gets a moment, the second time none.

        The third time members that still live are killed: what they have told is sealed.
        """
        self._stops += 1
        for member in self.members:
            member.tell(stop=True)
            if self._stops >= KILL_AT and member.process is not None:
                member.process.kill()
        self._changed.set()

    async def _together(self, start: StartAt) -> None:
        """Bring all to the start and let them go, or none."""
        try:
            await self._until(lambda: self._all(lambda m: m.prepared))
            await self._unless_stopped(start.prepared())
            for member in self.members:
                member.tell(warm=True)
            await self._until(lambda: self._all(lambda m: m.ready_ns is not None))
            if not self._stops:
                t0_ns = await start.instant(max(m.ready_ns or 0 for m in self.members))
                self._let_go = True
                for member in self.members:
                    member.tell(t0_ns=t0_ns)
        except TokentapeError:
            self.stop()
            await self._until(lambda: all(m.over for m in self.members))
            raise

    def _all(self, so_far: Callable[[Member], bool]) -> bool:
        """Whether all are so far; TokentapeError when one will never be."""
        for member in self.members:
            if member.over and not self._stops:
                raise TokentapeError(
                    member.failed or f"worker {member.name} ended before the start ({member.died})"
                )
        return self._stops > 0 or all(so_far(m) for m in self.members)

    async def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            self._changed.clear()
            await self._changed.wait()

    async def _unless_stopped(self, waiting: Any) -> None:
        task = asyncio.ensure_future(waiting)
        task.add_done_callback(lambda _: self._changed.set())
        await self._until(lambda: task.done() or self._all(lambda _: False))
        task.cancel()

    def _begin(self, member: Member, anchor: dict[str, int]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        peak = self._whole.peak_in_flight
        memory_fd = os.memfd_create("tokentape-share", os.MFD_CLOEXEC)
        with os.fdopen(memory_fd, "wb") as memory:
            share = self._whole.part(member.numbers, -(-peak // len(self.members)))
            pickle.dump(share, memory, protocol=5)
            del share
            memory.flush()
            os.lseek(memory_fd, 0, os.SEEK_SET)
            member.process = subprocess.Popen(
                [sys.executable, "-m", "tokentape.replay.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(), memory_fd, self._lock_fd),
                start_new_session=True,  # Ctrl-C is for the leader, which lets replies end
                stdin=subprocess.DEVNULL,
            )
        theirs.close()
        member.control = ours
        about = {"worker": member.name, "tape": str(self._tape), "anchor": anchor}
        member.tell(share_fd=memory_fd, lock_fd=self._lock_fd, **about)
        ours.setblocking(False)
        asyncio.get_running_loop().add_reader(ours.fileno(), self._hear, member)

    def _hear(self, member: Member) -> None:
        assert member.control is not None
        try:
            note = json.loads(member.control.recv(NOTE_BYTES) or b"{}")
        except BlockingIOError:
            return
        except OSError:
            note = {}
        if not note:
            self._gone(member)
        member.prepared |= "prepared" in note
        member.ready_ns = note.get("ready", member.ready_ns)
        member.failed = note.get("failed", member.failed)
        if "progress" in note:
            member.progress = Progress(**note["progress"])
        if "sent" in note:
            health = Health(**note["sent"].pop("health"))
            member.sent = Sent(**note["sent"], health=health)
            member.settle(member.sent.sent)
        self._changed.set()

    def _gone(self, member: Member) -> None:
        """The process has ended, or is about to."""
        assert member.process is not None
        self._close(member)
        code = member.process.wait()
        member.process = None
        if member.sent is None:
            member.died = f"signal {-code}" if code < 0 else f"exit {code}"
            member.settle(None)
            if self._let_go and not member.failed:
                say(
                    f"worker {member.name} died ({member.died}): its requests are not sent again; "
                    "the others go on, Ctrl-C ends them"
                )

    def _end(self, member: Member) -> None:
        """Leave nothing behind, whatever happened."""
        self._close(member)
        if member.process is not None:
            member.process.kill()
            member.process.wait()
            member.process = None

    def _close(self, member: Member) -> None:
        if member.control is not None:
            asyncio.get_running_loop().remove_reader(member.control.fileno())
            member.control.close()
            member.control = None

    async def _report(self, progress: Tell) -> None:
        while True:
            await asyncio.sleep(PROGRESS_EVERY_S)
            states = [m.progress for m in self.members if m.progress is not None]
            if states:
                progress(added(states))
