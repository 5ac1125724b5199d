"""The sampling process: reads each source once a second and writes what it reads to the tape.

A niced process of its own, so that no page, however large or slow, delays a request that is sent or
relayed. A thread for each source: a slow one costs the others nothing. It ends when its input ends,
with a last sample of each, so that the first and the last bracket the run. Samples wait in memory
for up to a minute; a kill loses those.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic_ns
from typing import Any, Protocol

from tokentape.traces.clock import TapeClock
from tokentape.traces.errors import TokentapeError
from tokentape.traces.facts import read_facts
from tokentape.traces.gpu import SOURCE as NVML
from tokentape.traces.gpu import Gpus
from tokentape.traces.pages import Page, PageError, Sample
from tokentape.traces.writer import TapeWriter

NS_PER_S = 1_000_000_000
EVERY_NS = NS_PER_S
SEAL_EVERY_S = 60.0
SETTLE_S = 0.3  # engines count a request some steps after its last token left
MEMORY_BYTES = 64 << 20  # of samples that a full disk does not take
NICE = 10
WORKER = "telemetry"


class Source(Protocol):
    """What can be sampled."""

    @property
    def source(self) -> str:
        """Its name on the tape."""

    def read(self) -> Sequence[Sample]:
        """What it says now; PageError when it says nothing."""


class Sampling:
    """Samples some sources onto a tape, from `start` until `finish`."""

    def __init__(self, writer: TapeWriter, clock: TapeClock, sources: Sequence[Source]) -> None:
        self.failed: dict[str, str] = {}  # why a source last said nothing
        self._writer = writer
        self._clock = clock
        self._sources = list(sources)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def sample_all(self) -> None:
        """One sample of each source, side by side."""
        with ThreadPoolExecutor(max(1, len(self._sources))) as pool:
            list(pool.map(self._sample, self._sources))

    def start(self) -> None:
        """Sample each source once a second from now on, and seal now and then."""
        targets = [(self._repeat, (source,)) for source in self._sources]
        self._threads = [threading.Thread(target=t, args=a, daemon=True) for t, a in targets]
        self._threads.append(threading.Thread(target=self._seal_now_and_then, daemon=True))
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """A last sample of each source, once their counters have settled; all is sealed then."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        time.sleep(SETTLE_S)
        self.sample_all()
        self._writer.close()

    def _repeat(self, source: Source) -> None:
        due_ns = monotonic_ns() + EVERY_NS
        while not self._stop.wait(max(0, due_ns - monotonic_ns()) / NS_PER_S):
            self._sample(source)
            due_ns += max(1, -(-(monotonic_ns() - due_ns) // EVERY_NS)) * EVERY_NS

    def _sample(self, source: Source) -> None:
        """Read and keep; `up` says whether there was anything, as Prometheus has it."""
        began_ns, found = monotonic_ns(), list[Sample]()
        try:
            found = list(source.read())
            self.failed.pop(source.source, None)
        except PageError as error:
            self.failed[source.source] = str(error)
        begin, end = (self._clock.tape_ns(t) for t in (began_ns, monotonic_ns()))
        found.append(("up", "{}", float(source.source not in self.failed)))
        with self._lock:
            for name, labels, value in found:
                self._writer.append_telemetry((begin, end, source.source, name, labels, value))

    def _seal_now_and_then(self) -> None:
        while not self._stop.wait(SEAL_EVERY_S):
            with self._lock:
                try:
                    self._writer.seal()
                except OSError:  # a full disk: later, or with less
                    if self._writer.pending_bytes > MEMORY_BYTES:
                        self._writer.drop_pending("disk_full")


def main() -> None:
    """Sample until stdin ends; its first line says what, the first line out how it began."""
    hello = json.loads(sys.stdin.readline())
    os.nice(NICE)
    tape = Path(hello["tape"])
    clock = TapeClock.start(read_facts(tape)["wall_epoch_unix_ns"], WORKER)
    writer = TapeWriter(tape, hello["lock_fd"], clock.footer(), WORKER)
    ca = Path(hello["ca"]) if hello["ca"] else None
    sources: list[Source] = [Page.parse(url, ca) for url in hello["urls"]]
    note: dict[str, Any] = {"failed": {}, "gpu": {}}
    if hello["gpu"]:
        try:
            sources.append(gpus := Gpus())
            note["gpu"] = gpus.facts()
        except PageError as error:
            note["failed"][NVML] = str(error)
    sampling = Sampling(writer, clock, sources)
    sampling.sample_all()
    note["failed"] |= sampling.failed
    sys.stdout.write(json.dumps(note) + "\n")
    sys.stdout.flush()
    sampling.start()
    sys.stdin.read()
    sampling.finish()


if __name__ == "__main__":
    try:
        main()
    except (TokentapeError, OSError) as error:
        sys.exit(f"tokentape: telemetry: {error}")
