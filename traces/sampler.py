"""Starts the sampling process (`sampling.py`) on a tape, hears how it began, and ends it.

Used by proxy and replay alike; it imports nothing that costs time and touches no traffic.
"""

import contextlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tokentape.traces import facts as tape_facts
from tokentape.traces.errors import TokentapeError
from tokentape.traces.gpu import check_installed
from tokentape.traces.pages import Page

END_TIMEOUT_S = 30.0  # a last sample of each source, and the disk


@dataclass(frozen=True)
class Sources:
    """What is sampled: Prometheus pages, and more.

    gpu: the GPUs of this machine as well. ca: PEM of who signed the pages' certificates.
    """

    urls: tuple[str, ...] = ()
    gpu: bool = False
    ca: Path | None = None

    def __bool__(self) -> bool:
        return bool(self.urls) or self.gpu

    @property
    def names(self) -> list[str]:
        """What the tape calls the pages."""
        return [Page.parse(url).source for url in self.urls]

    def check(self) -> None:
        """UsageError for a page's URL that cannot be one, or a library that is not there."""
        assert self.names is not None
        if self.gpu:
            check_installed()


class Sampler:
    """A running sampling process; `stop` it, or leave the `with` block."""

    def __init__(self, tape: Path, lock_fd: int, sources: Sources) -> None:
        """Start it on a tape whose lock is held."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tokentape.traces.sampling"],
            pass_fds=(lock_fd,),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for whoever started it
            text=True,
        )
        hello = {"tape": str(tape), "lock_fd": lock_fd, "urls": sources.urls, "gpu": sources.gpu}
        hello["ca"] = str(sources.ca) if sources.ca else None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(hello) + "\n")
            self._process.stdin.flush()

    def began(self) -> dict[str, Any]:
        """Wait for the first sample of each source; why some `failed`, and facts of the `gpu`.

        TokentapeError where the process ends instead.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise TokentapeError("the telemetry process did not start; see above")
        return dict(json.loads(line))

    def stop(self) -> None:
        """Let it take a last sample and seal; whatever hangs is killed."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def keep_facts(tape: Path, began: dict[str, Any]) -> None:
    """Keep what the GPUs are among the tape's facts; what the user said of them goes before it."""
    if began["gpu"]:
        with tape_facts.changing(tape) as facts:
            candidate = facts["candidate"]
            candidate["given"] = began["gpu"] | candidate.get("given", {})
