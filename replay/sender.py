"""Sends a plan: each request at its own absolute instant, whatever the others do (open loop).

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
from tokentape.replay.health import Health, Watch, return_memory
from tokentape.replay.progress import Progress
from tokentape.replay.start import Start, StartAt
from tokentape.replay.timer import AbsoluteTimer, precise_wakeups
from tokentape.replay.transport import Body, Client, Exchange, Reply

Ints = NDArray[np.int64]

NS_PER_S = 1_000_000_000
ARMS_PER_TURN = 4  # reads wait no longer than these
RELEASES_PER_TURN = 64  # of about 40 us
NO_ARM_NS = 800_000  # before a due time
SPIN_NS = 60_000  # `precise`: the timer wakes us so much early, the rest is waited for awake
LATE_NS = 1_000_000  # a later send names its cause
AHEAD_BYTES = 64 << 20  # requests held ready
AHEAD_LEAST = 64  # bodies that are ready even when there is never a quiet moment
QUIET_NS = 2_000_000  # a body is built where nothing is due within this time
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
    workers: dict[str, Any] = field(default_factory=dict)
    dead: list[str] = field(default_factory=list)


@dataclass
class Armed:
    """A request that is ready to be released, or was."""

    exchange: Exchange
    outgoing: Outgoing
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
        self._due_ns = memoryview(due)  # as plain integers, and eight bytes each
        self._ahead = Ahead(prepare, len(due), ahead_bytes)
        self._warm = warm
        self._timeout_s = None if timeout_ns is None else timeout_ns / NS_PER_S
        first_ns = first_byte_timeout_ns
        self._first_byte_s = None if first_ns is None else first_ns / NS_PER_S
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
        self._next = self._worst_ns = 0
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
        not_sent = len(self._due_ns) - self._next
        return Sent(
            self._t0_ns,
            self._next,
            not_sent,
            self._stopped,
            warmed,
            health,
            self._outcomes,
            self._client.clock.steps,
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
        return await self._client.connector.warm(self._ahead.first.url, self._warm)

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

    def _set_timer(self) -> None:
        """Wake at the next due time, or at the next time to arm."""
        if self._next == len(self._due_ns):
            self._posted.set()
            return
        at_ns = self._due_ns[self._next] - self._spin_ns
        if self._next_arm < len(self._arm_ns):
            at_ns = min(at_ns, self._arm_ns[self._next_arm])
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
        due, count, t0_ns = self._due_ns, len(self._due_ns), self._t0_ns
        released: list[Armed] = []
        more = False
        while self._next < count:
            early_ns = t0_ns + due[self._next] - monotonic_ns()
            if early_ns > self._spin_ns:
                break
            more = len(released) == RELEASES_PER_TURN
            if more:
                break
            while early_ns > 0:
                early_ns = t0_ns + due[self._next] - monotonic_ns()
            released.append(self._release())
            self._next += 1
        for armed in released:  # after the writes: no row must delay a send
            self._open(armed)
        return more

    def _release(self) -> "Armed":
        """Let the next request go; it is armed on the spot if that has not been done."""
        if not self._armed:
            self._arm()
        armed = self._armed.popleft()
        while armed.task.done() or armed.body.stale:  # its connection went away, nothing was sent
            armed.task.cancel()
            armed = self._launch(armed.outgoing, armed.due_ns)
        armed.body.release()
        if not armed.task.done():
            self._set_deadlines(armed)
        return armed

    def _set_deadlines(self, armed: "Armed") -> None:
        """Those of a client; only a stream has a first byte that is not also its last."""
        exchange = armed.exchange
        if self._timeout_s is not None and exchange.deadline is not None:
            exchange.deadline.reschedule(self._loop.time() + self._timeout_s)
        if self._first_byte_s is not None and armed.outgoing.row.get("stream"):
            exchange.first_by = self._loop.call_later(self._first_byte_s, exchange.give_up)

    def _arm_ahead(self) -> bool:
        """Arm a turn's share of those whose time to be armed has come; whether more wait."""
        for _ in range(ARMS_PER_TURN):
            if self._next_arm == len(self._due_ns):
                return False
            now = monotonic_ns() - self._t0_ns
            if self._arm_ns[self._next_arm] > now:
                return False
            if self._next < self._next_arm and self._due_ns[self._next] - now < NO_ARM_NS:
                return False  # the timer stands at that; arming goes on behind it
            self._arm()
        return True

    def _arm(self) -> None:
        due_ns = self._t0_ns + self._due_ns[self._next_arm]
        self._next_arm += 1
        self._armed.append(self._launch(self._ahead.take(), due_ns))

    def _launch(self, outgoing: Outgoing, due_ns: int) -> "Armed":
        exchange = Exchange(self._recorder)
        body = Body(outgoing.body, exchange)
        armed = Armed(exchange, outgoing, due_ns, body)
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

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (defect := task.exception()) is not None:
            self._fail(defect)
        if not self._tasks and self._posted.is_set():
            self._ended.set()

    def _refill(self) -> None:
        """Build bodies in quiet moments; when none come, keep AHEAD_LEAST ready all the same."""
        if not self._filling and not self._ahead.full:
            self._filling = True
            self._loop.call_soon(self._fill)

    def _fill(self) -> None:
        self._filling = False
        if self._stopped or self._ahead.full or self._next >= len(self._due_ns):
            return
        quiet = self._t0_ns + self._due_ns[self._next] - monotonic_ns() > QUIET_NS
        if quiet or len(self._ahead) < AHEAD_LEAST:
            self._ahead.build()
            self._refill()

    # -- rows -----------------------------------------------------------------------------------

    def _open(self, armed: "Armed") -> None:
        exchange, outgoing, due_ns = armed.exchange, armed.outgoing, armed.due_ns
        if exchange.stream is not None:
            return
        row = outgoing.row | self._where
        row |= {"scheduled_ns": due_ns, "arrival_ns": due_ns, "prompt_bytes": len(outgoing.body)}
        if exchange.send_ns:
            row["send_ns"] = exchange.send_ns
        exchange.stream = self._recorder.open(exchange.release_ns, row)

    def _close(self, armed: "Armed") -> None:
        self._open(armed)
        exchange, due_ns = armed.exchange, armed.due_ns
        sent_ns = exchange.send_end_ns
        if sent_ns and exchange.kernel_send_ns:  # the call may return long after
            sent_ns = max(exchange.send_ns, min(sent_ns, exchange.kernel_send_ns))
        late_ns = (sent_ns or exchange.end_ns) - due_ns
        self._worst_ns = max(self._worst_ns, late_ns)
        cause = late_cause(exchange, due_ns) if late_ns > LATE_NS else None
        if cause is not None:
            self._late_by[cause] = self._late_by.get(cause, 0) + 1
        self._outcomes[exchange.outcome] = self._outcomes.get(exchange.outcome, 0) + 1
        row: dict[str, Any] = {
            "outcome": exchange.outcome,
            "error_type": exchange.error_type,
            "origin": "upstream" if exchange.head_ns else None,
            "late_cause": cause,
            "conn_id": exchange.conn_id,
            "connect_ns": exchange.connect_ns,
        }
        if exchange.send_ns:
            row |= {
                "send_ns": exchange.send_ns,
                "send_end_ns": sent_ns or None,
                "kernel_send_ns": exchange.kernel_send_ns or None,
                "acked_ns": exchange.acked_ns or None,
                "send_clock": "kernel" if exchange.kernel_send_ns else "callback",
                "upstream_reused": exchange.reused,
            }
        assert exchange.stream is not None
        self._recorder.close(
            exchange.stream, exchange.end_ns, {k: v for k, v in row.items() if v is not None}
        )

    # -- the end --------------------------------------------------------------------------------

    async def _finish(self) -> None:
        """Wait until all is sent and answered; once stopped, only GRACE_S for the answers."""
        await self._posted.wait()
        for armed in self._armed:  # stopped before they were due: they were never sent
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
        return len(self._tasks) - len(self._armed)

    def _state(self, now_ns: int) -> Progress:
        return Progress(
            elapsed_s=max(0, now_ns - self._t0_ns) / NS_PER_S,
            total=len(self._due_ns),
            sent=self._next,
            done=self._next - self._in_flight(),
            in_flight=self._in_flight(),
            late=sum(self._late_by.values()),
            late_causes=dict(self._late_by),
            worst_late_ms=self._worst_ns / 1e6,
            span_s=self._due_ns[-1] / NS_PER_S if len(self._due_ns) else 0.0,
        )


def late_cause(exchange: Exchange, due_ns: int) -> str:
    """The largest part of a lateness: our own loop, the connect, or the write."""
    began = exchange.send_ns or exchange.end_ns
    parts = {
        "scheduler": exchange.release_ns - due_ns,
        "connection": began - exchange.release_ns,
        "write": (exchange.send_end_ns or exchange.end_ns) - began,
    }
    if exchange.send_ns and exchange.connect_ns is None:  # the wait was for us, not for a connect
        parts["scheduler"] += parts.pop("connection")
    return max(parts, key=lambda name: parts[name])


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
