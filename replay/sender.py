"""Sends a plan: each request at its own absolute instant, whatever the others do (open loop).

One kernel timer stands at the next due time; on wake everything due is fired. No relative sleep, no
queue between the timer and the socket, no garbage collection, and no body built late while there is
time to build it early. A request that is late is sent all the same, and its row says why.
"""

import asyncio
import gc
import platform
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import Any, Protocol

from yarl import URL

from tokentape.replay.health import Health, Watch
from tokentape.replay.timer import AbsoluteTimer, precise_wakeups
from tokentape.replay.transport import Client, Exchange, Reply

NS_PER_S = 1_000_000_000
START_AFTER_NS = 100_000_000  # from "all is ready" to the first due time
POSTS_PER_TURN = 4  # a post costs about 0.3 ms; reads wait no longer than four of them
LATE_NS = 1_000_000  # a later send names its cause
AHEAD_BYTES = 256 << 20  # bodies held ready
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


@dataclass(frozen=True)
class Outgoing:
    """One request, ready to be sent; `row` holds what its row says whatever happens."""

    url: URL
    headers: dict[str, str]
    body: bytes
    row: dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """How a run stands."""

    elapsed_s: float
    total: int
    sent: int
    done: int
    in_flight: int
    late: int
    worst_late_ms: float


@dataclass
class Sent:
    """What became of a plan: `t0_ns` is the instant that due times count from (monotonic)."""

    t0_ns: int
    sent: int
    not_sent: int
    stopped: bool
    warmed: int
    health: Health
    outcomes: dict[str, int] = field(default_factory=dict)


class Ahead:
    """Bodies built before they are due, bounded by bytes."""

    def __init__(self, prepare: Callable[[int], Outgoing], count: int, limit_bytes: int) -> None:
        self._prepare = prepare
        self._count = count
        self._limit_bytes = limit_bytes
        self._ready: deque[Outgoing] = deque()
        self._bytes = 0
        self._built = 0

    def __len__(self) -> int:
        return len(self._ready)

    @property
    def first(self) -> Outgoing:
        """The next one to take, which is ready."""
        return self._ready[0]

    @property
    def full(self) -> bool:
        """True when nothing more is to be built now."""
        return self._built == self._count or self._bytes >= self._limit_bytes

    def build(self) -> None:
        """Build the next one."""
        outgoing = self._prepare(self._built)
        self._built += 1
        self._bytes += len(outgoing.body)
        self._ready.append(outgoing)

    def take(self) -> Outgoing:
        """The next in order; built on the spot if none is ready."""
        if not self._ready:
            self.build()
        outgoing = self._ready.popleft()
        self._bytes -= len(outgoing.body)
        return outgoing


class Sender:
    """One worker's share of a run; `run` sends it all, `stop` ends it early."""

    def __init__(
        self,
        client: Client,
        recorder: Recording,
        due_ns: list[int],
        prepare: Callable[[int], Outgoing],
        *,
        warm: int = 1,
        timeout_ns: int | None = None,
        progress: Callable[[Progress], None] | None = None,
        ahead_bytes: int = AHEAD_BYTES,
        worker: str = "w0",
    ) -> None:
        self._client = client
        self._recorder = recorder
        self._due_ns = due_ns
        self._ahead = Ahead(prepare, len(due_ns), ahead_bytes)
        self._warm = warm
        self._timeout_s = None if timeout_ns is None else timeout_ns / NS_PER_S
        self._progress = progress
        self._where = {"host": platform.node(), "worker": worker, "attempt": 1, "copy_index": 0}
        self._tasks: set[asyncio.Task[None]] = set()
        self._outcomes: dict[str, int] = {}
        self._next = self._late = self._worst_ns = 0
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
        watch = Watch(self._loop)
        try:
            with _collector_off():
                self._t0_ns = monotonic_ns() + START_AFTER_NS
                self._recorder.flush_every(self._loop)
                watch.start()
                reports = self._loop.create_task(self._report(watch))
                self._arm()
                await self._finish()
                reports.cancel()
        finally:
            self._timer.close()
            health = watch.stop()
        if self._defect is not None:
            raise self._defect
        not_sent = len(self._due_ns) - self._next
        return Sent(
            self._t0_ns, self._next, not_sent, self._stopped, warmed, health, self._outcomes
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
        if not self._due_ns or self._stopped:
            self._posted.set()
            return 0
        return await self._client.connector.warm(self._ahead.first.url, self._warm)

    # -- sending --------------------------------------------------------------------------------

    def _arm(self) -> None:
        if self._next < len(self._due_ns):
            self._timer.at(self._t0_ns + self._due_ns[self._next])
        else:
            self._posted.set()

    def _fire(self) -> None:
        """Send everything that is due, a few per turn of the loop so that replies are read."""
        if self._stopped:
            return
        try:
            self._send_due()
        except Exception as defect:  # noqa: BLE001 - told by run(), which would else wait for ever
            self._fail(defect)

    def _fail(self, defect: BaseException) -> None:
        self._defect = self._defect or defect
        self.stop()

    def _send_due(self) -> None:
        due, count = self._due_ns, len(self._due_ns)
        for _ in range(POSTS_PER_TURN):
            if self._next == count or self._t0_ns + due[self._next] > monotonic_ns():
                self._arm()
                self._refill()
                return
            self._launch(self._t0_ns + due[self._next])
            self._next += 1
        self._loop.call_soon(self._fire)

    def _launch(self, due_ns: int) -> None:
        outgoing = self._ahead.take()
        exchange = Exchange(self._recorder)
        exchange.launch_ns = monotonic_ns()
        task = asyncio.Task(
            self._follow(exchange, outgoing, due_ns), loop=self._loop, eager_start=True
        )
        self._tasks.add(task)
        task.add_done_callback(self._done)
        self._open(exchange, outgoing, due_ns)  # after the write: the row must not delay the send

    async def _follow(self, exchange: Exchange, outgoing: Outgoing, due_ns: int) -> None:
        try:
            await self._client.perform(
                exchange, outgoing.url, outgoing.headers, outgoing.body, self._timeout_s
            )
        finally:
            self._close(exchange, outgoing, due_ns)

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

    def _open(self, exchange: Exchange, outgoing: Outgoing, due_ns: int) -> None:
        if exchange.stream is not None:
            return
        row = outgoing.row | self._where
        row |= {"scheduled_ns": due_ns, "arrival_ns": due_ns, "prompt_bytes": len(outgoing.body)}
        if exchange.send_ns:
            row["send_ns"] = exchange.send_ns
        exchange.stream = self._recorder.open(exchange.launch_ns, row)

    def _close(self, exchange: Exchange, outgoing: Outgoing, due_ns: int) -> None:
        self._open(exchange, outgoing, due_ns)
        sent = exchange.send_end_ns or exchange.end_ns
        late_ns = sent - due_ns
        self._worst_ns = max(self._worst_ns, late_ns)
        self._late += late_ns > LATE_NS
        self._outcomes[exchange.outcome] = self._outcomes.get(exchange.outcome, 0) + 1
        row: dict[str, Any] = {
            "outcome": exchange.outcome,
            "error_type": exchange.error_type,
            "origin": "upstream" if exchange.head_ns else None,
            "late_cause": late_cause(exchange, due_ns) if late_ns > LATE_NS else None,
            "conn_id": exchange.conn_id,
            "connect_ns": exchange.connect_ns,
        }
        if exchange.send_ns:
            row |= {
                "send_ns": exchange.send_ns,
                "send_end_ns": exchange.send_end_ns or None,
                "send_clock": "callback",
                "upstream_reused": exchange.reused,
            }
        if exchange.head_ns:
            row["event_clock"] = "callback"
        assert exchange.stream is not None
        self._recorder.close(
            exchange.stream, exchange.end_ns, {k: v for k, v in row.items() if v is not None}
        )

    # -- the end --------------------------------------------------------------------------------

    async def _finish(self) -> None:
        """Wait until all is sent and answered; once stopped, only GRACE_S for the answers."""
        await self._posted.wait()
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
            samples = watch.last_second()
            samples.append(("tokentape_in_flight", "{}", float(len(self._tasks))))
            self._recorder.telemetry(now, now, "tokentape replay", samples)
            if self._progress is not None:
                self._progress(self._state(now))

    def _state(self, now_ns: int) -> Progress:
        return Progress(
            elapsed_s=max(0, now_ns - self._t0_ns) / NS_PER_S,
            total=len(self._due_ns),
            sent=self._next,
            done=self._next - len(self._tasks),
            in_flight=len(self._tasks),
            late=self._late,
            worst_late_ms=self._worst_ns / 1e6,
        )


def late_cause(exchange: Exchange, due_ns: int) -> str:
    """The largest part of a lateness: our own loop, the connect, or the write."""
    began = exchange.send_ns or exchange.end_ns
    parts = {
        "scheduler": exchange.launch_ns - due_ns,
        "connection": began - exchange.launch_ns,
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
