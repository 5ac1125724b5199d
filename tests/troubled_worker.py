"""A worker of a capture in trouble, in a process of its own, for tests.

    python troubled_worker.py UPSTREAM TAPE TROUBLE [NTH]

TROUBLE is a method of the recorder, which raises at its NTH call (0: at every call), `layer`
(mitmproxy's own machine raises while it sends a reply), `watchdog` (mitmproxy's patience is 1 s) or
`late` (the event loop is, from one SIGUSR1 to the next; the breaker is quick).
Says its address on stdout, and when it has ended what it counted, as JSON.
"""

import asyncio
import importlib
import json
import signal
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokentape.proxy import master, pulse, worker
from tokentape.proxy.addon import Capture
from tokentape.proxy.loop import RelayLoop
from tokentape.proxy.options import CaptureOptions
from tokentape.proxy.supervisor import bind
from tokentape.traces.recording import Recorder

PATIENCE_S = 1


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def break_recorder(recorder: Recorder, method: str, nth: int) -> None:
    work = getattr(recorder, method)
    calls = 0

    def fails(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if nth in (0, calls):
            raise OSError("no space left on device")
        return work(*args, **named)

    setattr(recorder, method, fails)


def break_layer() -> None:
    server: Any = importlib.import_module("mitmproxy.proxy.layers.http._http1").Http1Server

    def send(_self: Any, _event: Any) -> Any:
        raise ValueError("a defect of mitmproxy")
        yield

    server.send = send


def make_impatient() -> None:
    build = master.build

    def impatient(*args: Any) -> Any:
        made = build(*args)
        made.options.update(tcp_timeout=PATIENCE_S)
        return made

    vars(master)["build"] = impatient


def run_late(loop: asyncio.AbstractEventLoop) -> None:
    """Block the loop for longer than the breaker allows, again and again, while it is asked to."""
    asked = [False]

    def toggle() -> None:
        asked[0] = not asked[0]
        block()

    def block() -> None:
        if asked[0]:
            time.sleep(pulse.LATE_S + pulse.BEAT_S)  # no beat is in time
            loop.call_later(0.005, block)

    loop.add_signal_handler(signal.SIGUSR1, toggle)


def main() -> None:
    upstream, tape, trouble, *nth = sys.argv[1:]
    about: dict[str, Any] = {"role": "capture", "command": [], "options": {}, "facts": {}}
    recorder = Recorder.start(Path(tape), key=b"k" * 32, **about)
    if trouble == "layer":
        break_layer()
    elif trouble == "watchdog":
        make_impatient()
        pulse.BEATS_PER_KEEPING = 2
    elif trouble == "late":
        pulse.LATE_BEATS = pulse.CALM_BEATS = pulse.BEATS_PER_SAMPLE = 2
    else:
        break_recorder(recorder, trouble, int(nth[0]))
    made: list[Capture] = []

    def kept(*args: Any) -> Capture:
        made.append(Capture(*args))
        return made[0]

    vars(worker)["Capture"] = kept
    (bound,) = bind("127.0.0.1", 0, 1, 16)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    say(str(bound.getsockname()[1]))
    options = CaptureOptions(upstream, Path(tape))
    with asyncio.Runner(loop_factory=RelayLoop) as runner:
        if trouble == "late":
            run_late(runner.get_loop())
        errors = runner.run(worker._serve(theirs, options, bound, recorder, "w0"))
    ours.close()
    found = {"errors": errors, "relayed": made[0].relays.reads}
    found |= asdict(recorder.finish())
    say(json.dumps(found))


if __name__ == "__main__":
    main()
