"""What a plan asks of this machine, against what it has: the impossible is told before the run.

CPU by what a sender was measured to cost (docs/accuracy.md: 471 us a request of 8 events, 20 us an
event of long streams); connections by the limit of open files and the local ports; memory by the
bodies held ready and in flight. These are estimates: a run that stays under them may still be late,
which its verdict says. One that is over them by this much cannot offer the recorded load.
"""

import contextlib
import os
import resource
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokentape.replay.ahead import ROW_BYTES
from tokentape.replay.health import cores
from tokentape.replay.sender import AHEAD_BYTES
from tokentape.replay.transport import SPARE_FILES

REQUEST_US, EVENT_US = 300, 20
WORKER_BYTES = 150 << 20  # with its writer, of a short tape; long ones take up to 450 MB
TOKEN_BYTES = 7  # of prompt text or token ids; measured on neither, about right for both
STREAM_GAP_S = 0.02  # of a token: replies outlast a short plan, and spread its events
SURE = 1.25  # estimates may be off by that much: 50,000 events/s were measured to fit in a core
BURST_S = 2.0  # CPU that the busiest second may take: its last request leaves a second late
NO_PORTS = 64_511  # all that are not reserved, where the kernel does not say


@dataclass(frozen=True)
class Demand:
    """What a plan needs, of all its workers together."""

    workers: int
    requests_per_s: float  # mean
    events_per_s: float  # mean
    peak_requests_per_s: float
    in_flight: int
    body_bytes: float  # of the mean request

    @property
    def mean_cores(self) -> float:
        """Cores that sending and reading take all the time."""
        return (self.requests_per_s * REQUEST_US + self.events_per_s * EVENT_US) / 1e6

    @property
    def peak_s(self) -> float:
        """CPU seconds that the busiest second takes, to send alone."""
        return self.peak_requests_per_s * REQUEST_US / 1e6

    @property
    def memory_bytes(self) -> float:
        """Of all processes at the peak."""
        held = self.workers * (WORKER_BYTES + AHEAD_BYTES)
        return held + self.in_flight * (self.body_bytes + ROW_BYTES)


@dataclass(frozen=True)
class Machine:
    """What there is: `files` and `ports` are connections, of each worker and of all."""

    cores: int
    files: int | None  # None: no limit
    files_now: int | None  # what the limit is before it is raised
    ports: int
    memory_bytes: int

    @classmethod
    def here(cls) -> "Machine":
        """The one that this process runs on, as it may use it."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        memory = [_number(Path("/sys/fs/cgroup/memory.max")), _total_memory()]
        low, high = _ports()
        return cls(
            cores(),
            None if hard == resource.RLIM_INFINITY else max(0, hard - SPARE_FILES),
            None if soft == resource.RLIM_INFINITY else max(0, soft - SPARE_FILES),
            high - low + 1,
            min(m for m in memory if m is not None),
        )


@dataclass(frozen=True)
class Fit:
    """A demand beside a machine."""

    demand: Demand
    machine: Machine

    def impossible(self) -> list[str]:
        """Why the machine cannot offer this load, with what it can do; empty: nothing is known."""
        need, has, found = self.demand, self.machine, list[str]()
        usable = min(need.workers, has.cores)
        said = f"{need.workers} worker{'s' * (need.workers > 1)} on {has.cores} cores"
        if need.mean_cores > usable * SURE:
            share = usable / need.mean_cores
            found.append(
                f"sending it takes {need.mean_cores:.1f} cores, {said} have {usable}: about "
                f"{share * need.requests_per_s:,.0f} requests/s and "
                f"{share * need.events_per_s:,.0f} tokens/s of this kind are possible"
            )
        elif need.peak_s > usable * BURST_S:
            found.append(
                f"its busiest second has {need.peak_requests_per_s:,.0f} requests, {said} send "
                f"about {usable * 1e6 / REQUEST_US:,.0f} in a second"
            )
        each = -(-need.in_flight // need.workers)
        if has.files is not None and each > has.files:
            found.append(
                f"about {each:,} connections in a process, the limit of open files (ulimit -Hn) "
                f"allows {has.files:,}"
            )
        if need.in_flight > has.ports:
            found.append(
                f"about {need.in_flight:,} connections to one address, this machine has "
                f"{has.ports:,} local ports (net.ipv4.ip_local_port_range)"
            )
        if need.memory_bytes > has.memory_bytes:
            found.append(
                f"about {need.memory_bytes / 1e9:.1f} GB of memory, of {has.memory_bytes / 1e9:.1f}"
            )
        return found

    def text(self) -> str:
        """One line for a plan: need of each thing, and what there is of it."""
        need, has = self.demand, self.machine
        each = -(-need.in_flight // need.workers)
        raised = has.files_now is not None and each > has.files_now
        files = "no limit" if has.files is None else f"{has.files:,}{' (raised)' if raised else ''}"
        return (
            f"needs about {need.mean_cores:.2f} of {has.cores} cores to send, {each:,} connections "
            f"a worker of {files}, {need.memory_bytes / 1e9:.1f} of "
            f"{has.memory_bytes / 1e9:.1f} GB of memory"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON and the tape."""
        return {
            "machine": asdict(self.machine),
            "mean_cores": round(self.demand.mean_cores, 4),
            "memory_bytes": round(self.demand.memory_bytes),
            "impossible": self.impossible(),
            "basis": f"{REQUEST_US} us of CPU a request, {EVENT_US} us an event",
        }


def _number(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _total_memory() -> int:
    return resource.getpagesize() * os.sysconf("SC_PHYS_PAGES")


def _ports() -> tuple[int, int]:
    with contextlib.suppress(OSError, ValueError):
        low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
        return low, high
    return 1, NO_PORTS
