"""`tokentape capture` that records no request: the control for what recording costs.

    python proxy_unrecorded.py tokentape capture --upstream URL --tape TAPE ...

Recording is paused as the breaker pauses it, from the start and for good. All else is the worker as
it is: kernel stamps, the fast path, telemetry, a writer process that has little to do.
"""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

from tokentape.cli import run
from tokentape.proxy import pulse, supervisor, worker
from tokentape.traces.recording import Recorder

WORKER = "tokentape.proxy.worker"


class OpenBreaker(pulse.Breaker):
    """Open from the beginning, however calm it is."""

    def __init__(self) -> None:
        super().__init__()
        self.open = True

    def beat(self, late_s: float) -> bool:
        return True


class PausedRecorder(Recorder):
    """Paused at once: the pulse pauses only when the breaker changes, and this one never does."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.pause(paused=True)


def start_this(command: list[str], **how: Any) -> subprocess.Popen[bytes]:
    """In place of `python -m tokentape.proxy.worker FD`: this script, told to be that worker."""
    assert command[1:3] == ["-m", WORKER], command
    return subprocess.Popen([command[0], __file__, WORKER, *command[3:]], **how)


def main() -> None:
    """The worker if argv says so, else the command line, whose workers are this script."""
    sys.argv = sys.argv[1:]  # what each of the two finds there when it is started itself
    if sys.argv[0] == WORKER:
        vars(pulse)["Breaker"], vars(worker)["Recorder"] = OpenBreaker, PausedRecorder
        worker.main()
    else:
        there = {"Popen": start_this, "DEVNULL": subprocess.DEVNULL}
        vars(supervisor)["subprocess"] = SimpleNamespace(**there)
        run()


if __name__ == "__main__":
    main()
