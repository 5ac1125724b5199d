"""Watches the replay process and its machine: loop stalls, garbage, CPU, full sockets, steal.

A replay that was late or stalled must not be read as a slow candidate, so this runs in every run
and ends up in its verdict and, each second, in its telemetry. It must cost next to nothing.
"""

import asyncio
import contextlib
import ctypes
import gc
import os
import time
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic_ns
from typing import Any

import numpy as np
import pyarrow as pa

from tokentape.replay.timer import AbsoluteTimer

TICK_NS = 10_000_000  # 100 wake-ups per second: stalls of 10 ms and more cannot hide between them
NS_PER_S = 1_000_000_000
STALL_NS = 5_000_000  # a tick later than this is counted as a stall
MAX_TICKS = 1_000_000  # 8 MB; a longer run keeps every second, fourth, ... tick


@dataclass(frozen=True)
class Health:
    """How the sending process itself fared; times in ns, shares of 1."""

    ticks: int
    late_p50_ns: int
    late_p99_ns: int
    late_max_ns: int
    missed_ticks: int
    cpu_share: float  # of one core, by this process
    steal_share: float | None  # of all cores, by the hypervisor; None where the kernel does not say
    stalls: int = 0  # ticks later than STALL_NS
    gc_runs: int = 0  # collections while it ran
    gc_ns: int = 0  # and the time that they took
    windows_closed: int | None = None  # full receive buffers, of all sockets in this network space

    def as_dict(self) -> dict[str, Any]:
        """For the tape."""
        return asdict(self)


class Watch:
    """Ticks every 10 ms on a kernel timer and keeps how late the loop took each tick."""

    def __init__(self, loop: asyncio.AbstractEventLoop, labels: str = "{}") -> None:
        """Args: labels: of its telemetry, as JSON."""
        self._labels = labels
        self._timer = AbsoluteTimer(loop, self._tick)
        self._late_ns = array("q")
        self._missed = 0
        self._every = 1
        self._count = 0
        self._next_ns = 0
        self._second_max_ns = 0
        self._began_ns = monotonic_ns()
        self._began_cpu_ns = time.process_time_ns()
        self._began_stat = _cpu_times()
        self._began_windows = _windows_closed()
        self._stalls = self._gc_runs = self._gc_ns = self._gc_began_ns = 0

    def start(self) -> None:
        """Begin to watch; what came before does not count."""
        now = monotonic_ns()
        self._began_ns, self._began_cpu_ns = now, time.process_time_ns()
        self._began_stat = _cpu_times()
        self._began_windows = _windows_closed()
        gc.callbacks.append(self._collected)
        self._next_ns = now + TICK_NS
        self._timer.at(self._next_ns, TICK_NS)

    def _tick(self) -> None:
        late = monotonic_ns() - self._next_ns
        skipped, _ = divmod(late, TICK_NS)
        self._missed += skipped
        self._next_ns += (skipped + 1) * TICK_NS
        self._second_max_ns = max(self._second_max_ns, late)
        self._stalls += late > STALL_NS
        self._count += 1
        if self._count % self._every == 0:
            self._late_ns.append(late)
            if len(self._late_ns) > MAX_TICKS:
                self._late_ns, self._every = self._late_ns[::2], self._every * 2

    def _collected(self, phase: str, _: dict[str, Any]) -> None:
        """A garbage collection begins or ends; while it runs nothing is read."""
        if phase == "start":
            self._gc_began_ns = monotonic_ns()
        else:
            self._gc_runs += 1
            self._gc_ns += monotonic_ns() - self._gc_began_ns

    def last_second(self) -> list[tuple[str, str, float]]:
        """Telemetry samples since the last call: (name, labels, value)."""
        worst, self._second_max_ns = self._second_max_ns, 0
        return [
            ("tokentape_loop_late_max_seconds", self._labels, worst / NS_PER_S),
            ("tokentape_process_cpu_seconds_total", self._labels, time.process_time()),
            ("tokentape_gc_seconds_total", self._labels, self._gc_ns / NS_PER_S),
        ]

    def stop(self) -> Health:
        """End the watch and sum it up."""
        self._timer.close()
        if self._collected in gc.callbacks:
            gc.callbacks.remove(self._collected)
        late = np.array(self._late_ns, dtype=np.int64)
        p50, p99 = np.quantile(late, [0.5, 0.99], method="higher") if len(late) else (0, 0)
        elapsed = max(1, monotonic_ns() - self._began_ns)
        return Health(
            ticks=self._count,
            late_p50_ns=int(p50),
            late_p99_ns=int(p99),
            late_max_ns=int(late.max()) if len(late) else 0,
            missed_ticks=self._missed,
            cpu_share=round((time.process_time_ns() - self._began_cpu_ns) / elapsed, 4),
            steal_share=_steal_share(self._began_stat, _cpu_times()),
            stalls=self._stalls,
            gc_runs=self._gc_runs,
            gc_ns=self._gc_ns,
            windows_closed=_since(self._began_windows, _windows_closed()),
        )


def _cpu_times() -> list[int]:
    """Jiffies of all cores: user, nice, system, idle, iowait, irq, softirq, steal, ..."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
        return [int(word) for word in first.split()[1:]]
    except (OSError, ValueError):
        return []


def _steal_share(began: list[int], ended: list[int]) -> float | None:
    if len(began) < 8 or len(ended) < 8:
        return None
    total = sum(ended[:8]) - sum(began[:8])
    return round((ended[7] - began[7]) / total, 4) if total > 0 else None


def _windows_closed() -> int | None:
    """How often a receive buffer of this network space was full; None where nobody counts it."""
    try:
        lines = [line.split() for line in Path("/proc/net/netstat").read_text().splitlines()]
    except OSError:
        return None
    for names, values in zip(lines[::2], lines[1::2], strict=False):
        if names[0] == "TcpExt:" and "TCPToZeroWindowAdv" in names:
            return int(values[names.index("TCPToZeroWindowAdv")])
    return None


def _since(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def return_memory() -> None:
    """Give the memory that planning took and left back to the system: 100 MB of a long tape."""
    pa.default_memory_pool().release_unused()
    with contextlib.suppress(AttributeError, OSError):  # it is the GNU library's own
        ctypes.CDLL(None).malloc_trim(0)
