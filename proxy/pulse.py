"""The worker's pulse: how late it runs itself, what it costs, and when recording must yield.

A beat every 100 ms notes how late the event loop was; a sample each second goes to the tape as
telemetry rows, and to whoever watches. While lateness stays above a limit, the breaker pauses
recording and nothing else; the rows say when, and the losses how much.
"""

import asyncio
import gc
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

from tokentape.proxy.addon import Capture
from tokentape.proxy.relay import ADDED_KEPT
from tokentape.traces.recording import Recorder

BEAT_S = 0.1
BEATS_PER_SAMPLE = 10
BEATS_PER_KEEPING = 100  # 10 s; mitmproxy waits a day, and 2,000 relays take 2.4 ms
LATE_S = 0.05  # a loop that is this late delays each event of each stream by as much
LATE_BEATS = 20  # of lateness in a row, before recording yields: 2 s
CALM_BEATS = 50  # without it in a row, before recording goes on: 5 s
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

Samples = dict[str, float]  # by name, labels included: name{"label":"value"}


class Breaker:
    """Opens after LATE_BEATS late beats in a row, closes after CALM_BEATS calm ones."""

    def __init__(self) -> None:
        self.open = False
        self.trips = 0
        self._run = 0

    def beat(self, late_s: float) -> bool:
        """Take a beat's lateness; True while recording must yield."""
        against = (late_s < LATE_S) if self.open else (late_s >= LATE_S)
        self._run = self._run + 1 if against else 0
        if self._run >= (CALM_BEATS if self.open else LATE_BEATS):
            self.open = not self.open
            self.trips += self.open
            self._run = 0
        return self.open


class Collections:
    """The garbage collector's pauses: the longest since it was last asked, and what was found."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self.collected = 0
        self._begun_s = 0.0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        """As gc.callbacks has it."""
        if phase == "start":
            self._begun_s = time.perf_counter()
            return
        self.longest_s = max(self.longest_s, time.perf_counter() - self._begun_s)
        self.collected += info["collected"]


class Pulse:
    """Beats on a loop from `start` to `stop`; `samples` is the latest sample."""

    def __init__(
        self,
        capture: Capture,
        recorder: Recorder,
        worker: str,
        on_sample: Callable[[Samples], None],
    ) -> None:
        self._capture = capture
        self._recorder = recorder
        self._source = f"tokentape/{worker}"
        self._on_sample = on_sample
        self._breaker = Breaker()
        self._beats = 0
        self._late_max_s = 0.0
        self._since_ns = time.monotonic_ns()
        self._timer: asyncio.TimerHandle | None = None
        self._reads_seen = 0
        self._collections = Collections()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to beat."""
        gc.callbacks.append(self._collections)
        self._arm(loop)

    def stop(self) -> None:
        """Beat no more, after a last sample."""
        if self._timer is not None:
            self._timer.cancel()
        gc.callbacks.remove(self._collections)
        self._sample()

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + BEAT_S
        self._timer = loop.call_at(due, self._beat, loop, due)

    def _beat(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        late_s = loop.time() - due
        self._arm(loop)
        self._late_max_s = max(self._late_max_s, late_s)
        was_open = self._breaker.open
        if self._breaker.beat(late_s) != was_open:
            self._recorder.pause(paused=not was_open)
        self._capture.clock.refresh()
        self._beats += 1
        if self._beats % BEATS_PER_KEEPING == 0:
            self._capture.relays.keep_alive()
        if self._beats % BEATS_PER_SAMPLE == 0:
            self._sample()

    def _sample(self) -> None:
        now_ns = time.monotonic_ns()
        samples = self.samples()
        rows = [_row(name, value) for name, value in samples.items()]
        self._recorder.telemetry(self._since_ns, now_ns, self._source, rows)
        self._since_ns = now_ns
        self._late_max_s = self._collections.longest_s = 0.0
        self._on_sample(samples | self._recorder.served)

    def samples(self) -> Samples:
        """What there is to say now; counters are totals of this process."""
        capture, relays, recorder = self._capture, self._capture.relays, self._recorder
        used = resource.getrusage(resource.RUSAGE_SELF)
        found = {
            "tokentape_loop_lag_max_seconds": self._late_max_s,
            "tokentape_gc_pause_max_seconds": self._collections.longest_s,
            "tokentape_gc_collected_objects_total": float(self._collections.collected),
            "tokentape_cpu_seconds_total": used.ru_utime + used.ru_stime,
            "tokentape_resident_bytes": _resident_bytes(),
            "tokentape_open_requests": float(len(capture.open_flows)),
            'tokentape_reply_reads_total{"path":"relay"}': float(relays.reads),
            'tokentape_reply_reads_total{"path":"mitmproxy"}': float(capture.stock_reads),
            "tokentape_recording": float(not self._breaker.open),
            "tokentape_breaker_trips_total": float(self._breaker.trips),
            "tokentape_clock_steps_total": float(capture.clock.steps),
            "tokentape_waiting_bytes": float(recorder.waiting_bytes),
            "tokentape_recording_errors_total": float(capture.errors + relays.failures),
        }
        for reason, count in recorder.losses.items():
            found[f"tokentape_requests_lost_total{json.dumps({'reason': reason})}"] = float(count)
        return found | self._added()

    def _added(self) -> Samples:
        """Quantiles of the time from the kernel's stamp to our send, over the latest reads."""
        relays = self._capture.relays
        fresh = min(relays.reads - self._reads_seen, ADDED_KEPT)
        self._reads_seen = relays.reads
        if not fresh:
            return {}
        end = relays.reads & (ADDED_KEPT - 1)
        ring = relays.added_ns
        latest = ring[max(0, end - fresh) : end] + (ring[end - fresh :] if fresh > end else [])
        latest.sort()
        return {
            f'tokentape_added_seconds{{"quantile":"{q}"}}': latest[int(q * (len(latest) - 1))] / 1e9
            for q in (0.5, 0.99)
        }


def _row(name: str, value: float) -> tuple[str, str, float]:
    bare, brace, labels = name.partition("{")
    return bare, brace + labels or "{}", value


def _resident_bytes() -> float:
    """Resident memory, from the second field of statm."""
    return float(Path("/proc/self/statm").read_bytes().split()[1]) * PAGE_BYTES
