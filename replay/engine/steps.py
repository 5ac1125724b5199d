"""The step loop: the batch's simulated steps in real time, on absolute instants.

A step begins where the one before it ended, not when this process noticed, so times never drift;
how late the process noticed is counted. When a step ends, the next one begins before its tokens are
written, as engines with asynchronous scheduling do. Everything runs in timer callbacks of one event
loop: no task, lock or await per token.
"""

import asyncio
import os
import sys
import time
from collections.abc import Callable
from typing import Protocol

from tokentape.replay.engine.batching import Batch, Sequence
from tokentape.replay.engine.counters import Counters
from tokentape.replay.engine.profile import Profile

# Behind by more than this, the loop gives up catching up and counts the step as slipped.
CATCH_UP_NS = 250_000_000


class Listener(Protocol):
    """Who is told of a sequence's tokens; must neither block nor raise."""

    finish_reason: str

    def on_token(self, sequence: Sequence) -> None:
        """The sequence has made a token; `sequence.finished` after its last."""


class Alarm:
    """Calls back once at an absolute instant: by timerfd, or by asyncio's timer (1 ms late)."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None
        self._fd = -1
        if sys.version_info >= (3, 13) and sys.platform == "linux":
            flags = os.TFD_NONBLOCK | os.TFD_CLOEXEC
            self._fd = os.timerfd_create(time.CLOCK_MONOTONIC, flags=flags)
            loop.add_reader(self._fd, self._on_timer)

    def set(self, at_ns: int) -> None:
        """Replace the instant; one that has passed fires on the loop's next turn."""
        if sys.version_info >= (3, 13) and sys.platform == "linux":
            os.timerfd_settime_ns(self._fd, flags=os.TFD_TIMER_ABSTIME, initial=at_ns)
            return
        if self._handle is not None:
            self._handle.cancel()
        self._handle = self._loop.call_at(at_ns / 1e9, self._callback)

    def close(self) -> None:
        """Never call back again."""
        if self._handle is not None:
            self._handle.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)

    def _on_timer(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # set anew since it fired
            return
        self._callback()


class StepLoop:
    """Runs a Batch against the clock and tells each sequence's listener of its tokens."""

    def __init__(self, profile: Profile, counters: Counters) -> None:
        self.batch = Batch(profile)
        self._frontend_ns = round(profile.frontend_ms * 1e6)
        self._counters = counters
        self._listeners: dict[Sequence, Listener] = {}
        self._end_ns = 0  # of the step ended last
        self._alarm = Alarm(asyncio.get_running_loop(), self._on_alarm)

    def submit(self, sequence: Sequence, listener: Listener) -> None:
        """Queue a sequence; it can be in a step once the front end is done with it."""
        self.batch.arrive(sequence, time.monotonic_ns() + self._frontend_ns)
        self._listeners[sequence] = listener
        if self.batch.step is None:
            self._alarm.set(self.batch.waiting[0].queued_ns)

    def abort(self, sequence: Sequence) -> None:
        """Drop a sequence that has not finished; nothing happens to one that has."""
        if self._listeners.pop(sequence, None) is not None:
            self.batch.abort(sequence)
            self._counters.finished["abort"] += 1

    def close(self) -> None:
        """Stop; sequences under way make no more tokens."""
        self._alarm.close()

    def _on_alarm(self) -> None:
        now_ns = time.monotonic_ns()
        step = self.batch.step
        if step is None:
            self._begin(now_ns)
            return
        made = self.batch.end()
        self._end_ns = step.end_ns
        self._counters.count_step(step, made, max(0, now_ns - step.end_ns))
        self._begin(now_ns)
        for sequence in made:
            self._tell(sequence)
        self._counters.step_written.add((time.monotonic_ns() - step.end_ns) / 1e9)

    def _begin(self, now_ns: int) -> None:
        """Begin the next step at the simulated instant, or wait for the next arrival."""
        batch = self.batch
        begin_ns = self._end_ns
        if not batch.running and batch.waiting:
            begin_ns = max(begin_ns, batch.waiting[0].queued_ns)
        if begin_ns > now_ns:
            self._alarm.set(begin_ns)
            return
        if now_ns - begin_ns > CATCH_UP_NS and (batch.running or batch.waiting):
            self._counters.steps_slipped += 1
            begin_ns = now_ns
        step = batch.begin(begin_ns)
        if step is not None:
            self._alarm.set(step.end_ns)

    def _tell(self, sequence: Sequence) -> None:
        listener = self._listeners.get(sequence)
        if listener is None:
            return
        if sequence.finished:
            del self._listeners[sequence]
            self._counters.count_finished(sequence, listener.finish_reason)
        listener.on_token(sequence)
