"""Sends a plan: each request at its own absolute instant; those that wait for others as they end.

A request is armed ahead: body built, connection taken, head serialized. One kernel timer stands at
the next due time; on wake all that is due is released, each in one write. No relative sleep, no
queue between the timer and the socket, no garbage collection. A request that is late is sent all
the same, and its row says why.
"""

import asyncio
import gc
import json
import platform
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tokentape.replay.ahead import Ahead, ArmTimes, Outgoing
from tokentape.replay.exchange import ABORTED, Exchange, Reply
from tokentape.replay.health import Health, Watch, return_memory
from tokentape.replay.later import FAR_NS, Later
from tokentape.replay.progress import Progress
from tokentape.replay.sent_rows import LATE_NS, end_columns, late_cause, sent_end_ns
from tokentape.replay.start import Start, StartAt
from tokentape.replay.timer import AbsoluteTimer, never_early_s, precise_wakeups
from tokentape.replay.transport import Body, Client
from tokentape.replay.turns import Followers, Waits

Ints = NDArray[np.int64]

NS_PER_S = 1_000_000_000
ARMS_PER_TURN = 4  # reads wait no longer than these
RELEASES_PER_TURN = 64  # of about 40 us
NO_ARM_NS = 800_000  # before a due time
SPIN_NS = 60_000  # `precise`: the timer wakes us so much early, the rest is waited for awake
AHEAD_BYTES = 64 << 20  # requests held ready
AHEAD_LEAST = 64  # bodies that are ready even when there is never a quiet moment
QUIET_NS = 2_000_000  # a body is built where nothing is due within this time
FAILED_STATUS = 400
GRACE_S = 2.0  # for what is in flight when the user stops a run
PROGRESS_EVERY_S = 1.0


class Recording(Reply, Protocol):
    """What the sender needs of traces' Recorder."""

    def open(self, t_ns: int, row: dict[str, Any]) -> int:
        """Begin a row; its stream number."""

    def close(self, stream: int, t_ns: int, row: dict[str, Any]) -> None:
        """End a row."""

    def telemetry(
        self, t_ns: int, end_ns: int, source: str, samples: list[tuple[str, str, float]]
    ) -> None:
        """Samples of one instant."""

    def flush_every(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hand blocks over from now on."""


@dataclass
class Sent:
    """What became of a plan: `t0_ns` is the instant that due times count from (monotonic).

    workers: what the tape says of each of several. dead: what is missing of those that died.
    """

    t0_ns: int
    sent: int
    not_sent: int
    stopped: bool
    warmed: int
    health: Health
    outcomes: dict[str, int] = field(default_factory=dict)
    clock_steps: int = 0  # of the wall clock: stamps near one are the process's own
    after_failure: int = 0  # requests that waited for one that failed, and were sent all the same
    workers: dict[str, Any] = field(default_factory=dict)
    dead: list[str] = field(default_factory=list)


@dataclass
class Armed:
    """A request that is ready to be released, or was."""

    exchange: Exchange
    outgoing: Outgoing
    number: int  # in the plan
    due_ns: int
    body: Body
    task: asyncio.Task[None] = field(init=False)


class Sender:
    """One worker's share of a run; `run` sends it all, `stop` ends it early."""

    def __init__(
        self,
        client: Client,
        recorder: Recording,
        due_ns: Ints | Sequence[int],
        prepare: Callable[[int], Outgoing],
        *,
        waits: Waits | None = None,
        warm: int = 1,
        timeout_ns: int | None = None,
        first_byte_timeout_ns: int | None = None,
        progress: Callable[[Progress], None] | None = None,
        ahead_bytes: int = AHEAD_BYTES,
        worker: str = "w0",
        start: Start | None = None,
        precise: bool = False,
    ) -> None:
        self._client = client
        self._recorder = recorder
        due = np.ascontiguousarray(due_ns, dtype=np.int64)
        self._planned_ns = memoryview(due)  # as plain integers, and eight bytes each
        self._later: Later[Armed] | None = None
        self._first: memoryview | None = None  # the numbers of those that wait for none, if not all
        if waits is not None:
            followers = Followers(waits, len(due))
            self._later = Later(followers, prepare, self._launch)
            self._first = memoryview(followers.first)
            due = due[followers.first]
        self._due_ns = memoryview(due)
        self._ahead = Ahead(lambda at: prepare(self._number(at)), len(due), ahead_bytes)
        self._warm = warm
        self._timeout_s = never_early_s(timeout_ns)
        self._first_byte_s = never_early_s(first_byte_timeout_ns)
        self._progress = progress
        self._start = start or StartAt()
        self._labels = json.dumps({"worker": worker})
        self._where = {"host": platform.node(), "worker": worker, "attempt": 1}
        self._spin_ns = SPIN_NS if precise else 0
        self._arm_ns = ArmTimes(due)
        self._armed: deque[Armed] = deque()  # those of numbers _next to _next_arm
        self._next_arm = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._outcomes: dict[str, int] = {}
        self._late_by: dict[str, int] = {}
        self._next = self._sent = self._worst_ns = 0
        self._build_ns = 0  # what the last body took
        self._moved = self._most_moved_ns = 0  # sent later than planned, because of a parent
        self._t0_ns = 0
        self._filling = self._stopped = False
        self._posted = asyncio.Event()  # nothing more will be sent
        self._ended = asyncio.Event()  # and nothing is in flight, or the run is being stopped
        self._defect: BaseException | None = None

    async def run(self) -> Sent:
        """Send everything; returns when the last reply has ended, or after `stop`."""
        self._loop = asyncio.get_running_loop()
        warmed = await self._prepare_start()
        self._timer = AbsoluteTimer(self._loop, self._fire)
        watch = Watch(self._loop, self._labels)
        with _collector_off():
            try:
                ahead_ns = -min(self._arm_ns[0], 0) if len(self._arm_ns) else 0
                t0_ns = await self._unless_stopped(self._start.instant(ahead_ns))
                self._t0_ns = t0_ns or monotonic_ns()
                self._recorder.flush_every(self._loop)
                watch.start()
                reports = self._loop.create_task(self._report(watch))
                self._set_timer()
                await self._finish()
                reports.cancel()
            finally:
                self._timer.close()
                health = watch.stop()
        if self._defect is not None:
            raise self._defect
        return Sent(
            self._t0_ns,
            self._sent,
            len(self._planned_ns) - self._sent,
            self._stopped,
            warmed,
            health,
            self._outcomes,
            self._client.clock.steps,
            self._later.after_failure if self._later else 0,
        )

    def stop(self) -> None:
        """Send nothing more; what is in flight gets GRACE_S. A second call ends it at once."""
        if self._stopped:
            self._cut()
        self._stopped = True
        self._posted.set()
        self._ended.set()

    async def _prepare_start(self) -> int:
        """Build bodies and open connections while nothing is due yet; the connections opened."""
        precise_wakeups()
        while not (self._ahead.full or self._stopped):
            self._ahead.build()
            if len(self._ahead) % 64 == 0:
                await asyncio.sleep(0)  # a signal may want to stop us
        return_memory()
        await self._unless_stopped(self._start.prepared())
        if not len(self._due_ns) or self._stopped:
            self._posted.set()
            return 0
        return await self._client.connector.warm(self._ahead.peers, self._warm)

    async def _unless_stopped[T](self, waiting: Awaitable[T]) -> T | None:
        """Wait for it, or until the run is stopped: None then."""
        both = [asyncio.ensure_future(waiting), asyncio.ensure_future(self._posted.wait())]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            return both[0].result() if both[0].done() else None
        finally:
            for one in both:
                one.cancel()

    # -- sending --------------------------------------------------------------------------------

    def _number(self, at: int) -> int:
        """The number in the plan of one of those that wait for none."""
        return at if self._first is None else int(self._first[at])

    def _first_due_ns(self) -> int:
        """When the next request is due, as far as that is known; FAR_NS: none is."""
        planned_ns = self._due_ns[self._next] if self._next < len(self._due_ns) else FAR_NS
        return planned_ns if self._later is None else min(planned_ns, self._later.due_ns)

    def _set_timer(self) -> None:
        """Wake at the next due time, or at the next time to arm."""
        at_ns = self._first_due_ns() - self._spin_ns
        if self._next == len(self._due_ns) and (self._later is None or self._later.over):
            self._posted.set()
        elif at_ns + self._spin_ns < FAR_NS:  # else all that is left waits for replies
            if self._next_arm < len(self._arm_ns):
                at_ns = min(at_ns, self._arm_ns[self._next_arm])
            if self._later is not None:
                at_ns = min(at_ns, self._later.arm_ns)
            self._timer.at(self._t0_ns + at_ns)

    def _fire(self) -> None:
        """Release what is due, arm what will be, a few per turn so that replies are read."""
        if self._stopped:
            return
        try:
            more = self._release_due()
            if not more:
                more = self._arm_ahead()
        except Exception as defect:  # noqa: BLE001 - told by run(), which would else wait for ever
            self._fail(defect)
            return
        if more:
            self._loop.call_soon(self._fire)
        else:
            self._set_timer()
            self._refill()

    def _fail(self, defect: BaseException) -> None:
        self._defect = self._defect or defect
        self.stop()

    def _release_due(self) -> bool:
        """Release a turn's share of what is due; whether more is."""
        t0_ns = self._t0_ns
        released: list[Armed] = []
        more = False
        while (due_ns := self._first_due_ns()) < FAR_NS:
            early_ns = t0_ns + due_ns - monotonic_ns()
            if early_ns > self._spin_ns:
                break
            more = len(released) == RELEASES_PER_TURN
            if more:
                break
            while early_ns > 0:
                early_ns = t0_ns + due_ns - monotonic_ns()
            released.append(self._release())
        for armed in released:  # after the writes: no row must delay a send
            self._open(armed)
        return more

    def _release(self) -> "Armed":
        """Let the next request go; it is armed on the spot if that has not been done."""
        if self._later is not None and self._later.due_ns == self._first_due_ns():
            armed = self._later.take()
        else:
            if not self._armed:
                self._arm()
            armed = self._armed.popleft()
            self._next += 1
        while armed.task.done() or armed.body.stale:  # its connection went away, nothing was sent
            armed.task.cancel()
            armed = self._launch(armed.outgoing, armed.number, armed.due_ns - self._t0_ns)
        armed.body.release()
        self._sent += 1
        if not armed.task.done():
            self._set_deadlines(armed)
        return armed

    def _set_deadlines(self, armed: "Armed") -> None:
        """Those of a client; only a stream has a first byte that is not also its last."""
        exchange = armed.exchange
        if self._timeout_s is not None and exchange.deadline is not None:
            exchange.deadline.reschedule(self._loop.time() + self._timeout_s)
        if self._first_byte_s is not None and armed.outgoing.row.get("stream"):
            exchange.timers.append(self._loop.call_later(self._first_byte_s, exchange.give_up))
        if (after_ns := armed.outgoing.leave_after_ns) is not None:
            exchange.timers.append(self._loop.call_later(after_ns / NS_PER_S, exchange.leave))

    def _arm_ahead(self) -> bool:
        """Arm a turn's share of those whose time to be armed has come; whether more wait."""
        for _ in range(ARMS_PER_TURN):
            now = monotonic_ns() - self._t0_ns
            planned_ns = (
                self._arm_ns[self._next_arm] if self._next_arm < len(self._arm_ns) else FAR_NS
            )
            later_ns = self._later.arm_ns if self._later is not None else FAR_NS
            if min(planned_ns, later_ns) > now:
                return False
            if self._armed_due_ns() - now < NO_ARM_NS:
                return False  # the timer stands at that; arming goes on behind it
            if planned_ns <= later_ns:
                self._arm()
            elif self._later is not None:
                self._later.arm()
        return True

    def _armed_due_ns(self) -> int:
        """When the first armed request is due; FAR_NS: none is armed."""
        planned_ns = self._due_ns[self._next] if self._armed else FAR_NS
        return planned_ns if self._later is None else min(planned_ns, self._later.armed_due_ns)

    def _arm(self) -> None:
        at = self._next_arm
        self._next_arm += 1
        self._armed.append(self._launch(self._ahead.take(), self._number(at), self._due_ns[at]))

    def _launch(self, outgoing: Outgoing, number: int, due_ns: int) -> "Armed":
        """Arm a request; `due_ns` counts from the start of the run."""
        exchange = Exchange(self._recorder)
        if outgoing.leave_events:
            exchange.leave_events = outgoing.leave_events
            exchange.wire_format = outgoing.row["wire_format"]
        body = Body(outgoing.body, exchange)
        armed = Armed(exchange, outgoing, number, self._t0_ns + due_ns, body)
        armed.task = asyncio.Task(self._follow(armed), loop=self._loop, eager_start=True)
        self._tasks.add(armed.task)
        armed.task.add_done_callback(self._done)
        return armed

    async def _follow(self, armed: "Armed") -> None:
        try:
            await self._client.perform(
                armed.exchange, armed.outgoing.url, armed.outgoing.headers, armed.body
            )
        finally:
            if armed.exchange.release_ns:
                self._close(armed)
                if self._later is not None:
                    self._let_follow(armed)

    def _let_follow(self, armed: "Armed") -> None:
        """Tell those that wait for this one that it has ended, however it did."""
        assert self._later is not None
        exchange = armed.exchange
        failed = exchange.outcome not in ("ok", ABORTED) or exchange.status >= FAILED_STATUS
        end_ns = exchange.end_ns - self._t0_ns
        if self._later.ended(armed.number, end_ns, failed=failed) and not self._stopped:
            self._set_timer()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (defect := task.exception()) is not None:
            self._fail(defect)
        if not self._tasks and self._posted.is_set():
            self._ended.set()

    def _refill(self) -> None:
        """Build bodies in quiet moments; when none come, keep AHEAD_LEAST ready all the same."""
        if not self._filling and not (self._ahead.full and self._later is None):
            self._filling = True
            self._loop.call_soon(self._fill)

    def _fill(self) -> None:
        self._filling = False
        if self._stopped:
            return
        began_ns = monotonic_ns()
        quiet_ns = self._t0_ns + self._first_due_ns() - began_ns
        quiet = quiet_ns > QUIET_NS + self._build_ns  # as if the next took as long as the last one
        if not self._ahead.full and (quiet or len(self._ahead) < AHEAD_LEAST):
            self._ahead.build()
        elif not (quiet and self._later is not None and self._later.build()):
            return
        self._build_ns = monotonic_ns() - began_ns
        self._refill()

    # -- rows -----------------------------------------------------------------------------------

    def _open(self, armed: "Armed") -> None:
        exchange, outgoing, due_ns = armed.exchange, armed.outgoing, armed.due_ns
        if exchange.stream is not None:
            return
        row = outgoing.row | self._where
        planned_ns = self._t0_ns + self._planned_ns[armed.number]
        row |= {"scheduled_ns": planned_ns, "arrival_ns": due_ns}
        row["prompt_bytes"] = len(outgoing.body)
        if self._later is not None:
            row |= self._later.sent(armed.number, due_ns - self._t0_ns)
        if exchange.send_ns:
            row["send_ns"] = exchange.send_ns
        exchange.stream = self._recorder.open(exchange.release_ns, row)

    def _close(self, armed: "Armed") -> None:
        self._open(armed)
        exchange, due_ns = armed.exchange, armed.due_ns
        late_ns = (sent_end_ns(exchange) or exchange.end_ns) - due_ns
        moved_ns = due_ns - self._t0_ns - self._planned_ns[armed.number]
        self._worst_ns = max(self._worst_ns, late_ns)
        self._most_moved_ns = max(self._most_moved_ns, moved_ns)
        cause = None
        if late_ns > LATE_NS:  # our own lateness is named before that of others
            cause = late_cause(exchange, due_ns)
            self._late_by[cause] = self._late_by.get(cause, 0) + 1
        elif moved_ns > LATE_NS:
            cause = "predecessor"
        self._moved += moved_ns > LATE_NS
        self._outcomes[exchange.outcome] = self._outcomes.get(exchange.outcome, 0) + 1
        assert exchange.stream is not None
        self._recorder.close(exchange.stream, exchange.end_ns, end_columns(exchange, cause))

    # -- the end --------------------------------------------------------------------------------

    async def _finish(self) -> None:
        """Wait until all is sent and answered; once stopped, only GRACE_S for the answers."""
        await self._posted.wait()
        for armed in self._all_armed():  # stopped before they were due: they were never sent
            armed.task.cancel()
        if self._tasks:
            await self._ended.wait()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=GRACE_S)
            self._cut()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _cut(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _report(self, watch: Watch) -> None:
        """Progress and telemetry about once a second; late reports delay nothing."""
        while True:
            await asyncio.sleep(PROGRESS_EVERY_S)
            now = monotonic_ns()
            self._client.clock.refresh()
            samples = watch.last_second()
            samples.append(
                ("tokentape_clock_steps_total", self._labels, float(self._client.clock.steps))
            )
            samples.append(("tokentape_in_flight", self._labels, float(self._in_flight())))
            self._recorder.telemetry(now, now, "tokentape replay", samples)
            if self._progress is not None:
                self._progress(self._state(now))

    def _in_flight(self) -> int:
        return len(self._tasks) - len(self._all_armed())

    def _all_armed(self) -> list["Armed"]:
        return [*self._armed, *(self._later.armed if self._later is not None else ())]

    def _state(self, now_ns: int) -> Progress:
        return Progress(
            elapsed_s=max(0, now_ns - self._t0_ns) / NS_PER_S,
            total=len(self._planned_ns),
            sent=self._sent,
            done=self._sent - self._in_flight(),
            in_flight=self._in_flight(),
            late=sum(self._late_by.values()),
            late_causes=dict(self._late_by),
            worst_late_ms=self._worst_ns / 1e6,
            span_s=self._planned_ns[-1] / NS_PER_S if len(self._planned_ns) else 0.0,
            moved=self._moved,
            most_moved_s=self._most_moved_ns / NS_PER_S,
        )


@contextmanager
def _collector_off() -> Iterator[None]:
    """No pause for garbage while requests are due; what exists now is never looked at again."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
