"""A worker process: mitmproxy on one listening socket, recording to the supervisor's tape.

It is told what to do on its control socket, and ends when that says stop or is closed: when the
supervisor is gone, streams in flight end and the tape is sealed all the same.
"""

import asyncio
import contextlib
import json
import signal
import socket
import sys
from dataclasses import asdict
from typing import Any

from tokentape.proxy import master
from tokentape.proxy.addon import Capture
from tokentape.proxy.loop import RelayLoop
from tokentape.proxy.options import CaptureOptions, from_json
from tokentape.proxy.pulse import Pulse
from tokentape.proxy.supervisor import NOTE_BYTES
from tokentape.traces.crash import hide_values
from tokentape.traces.errors import TokentapeError
from tokentape.traces.recording import Recorder


def main() -> None:
    """Serve until told to stop; the control socket's descriptor is in argv."""
    hide_values()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the supervisor
    control = socket.socket(fileno=int(sys.argv[1]))
    hello = json.loads(control.recv(NOTE_BYTES))
    try:
        summary = _work(control, hello)
    except TokentapeError as error:
        _tell(control, failed=str(error))
        sys.exit(1)
    control.setblocking(True)
    _tell(control, summary=summary)


def _work(control: socket.socket, hello: dict[str, Any]) -> dict[str, Any]:
    options, worker = from_json(hello["options"]), hello["worker"]
    bound = socket.socket(fileno=hello["listen_fd"])
    about = {
        "worker": worker,
        "content": options.content,
        "key": hello["key"],
        "content_key": hello["content_key"],
        "fsync": options.fsync,
        "keep": options.keep.as_dict() if options.keep is not None else None,
        "session_headers": options.session_headers,
    }
    recorder = Recorder(options.tape, hello["lock_fd"], about)
    control.setblocking(False)
    with asyncio.Runner(loop_factory=RelayLoop) as runner:
        errors = runner.run(_serve(control, options, bound, recorder, worker))
    done = recorder.finish()
    return asdict(done) | {"proxy_errors": errors, "incarnations": recorder.incarnations}


async def _serve(
    control: socket.socket,
    options: CaptureOptions,
    bound: socket.socket,
    recorder: Recorder,
    worker: str,
) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_reader(control.fileno(), _hear, control, stop)
    recorder.flush_every(loop)
    addon = Capture(recorder, worker)
    pulse = Pulse(addon, recorder, worker, lambda samples: _tell(control, samples=samples))
    pulse.start(loop)
    errors = await master.serve(
        options, options.upstream, bound, addon, stop, lambda: _tell(control, ready=True)
    )
    pulse.stop()
    loop.remove_reader(control.fileno())
    return errors + addon.errors + addon.relays.failures


def _hear(control: socket.socket, stop: asyncio.Event) -> None:
    """Whatever comes means stop, the end of the supervisor too."""
    with contextlib.suppress(OSError):
        if not control.recv(NOTE_BYTES):
            asyncio.get_running_loop().remove_reader(control.fileno())
    stop.set()


def _tell(control: socket.socket, **note: Any) -> None:
    with contextlib.suppress(OSError):  # nobody listens, or not fast enough: traffic goes on
        control.send(json.dumps(note).encode())


if __name__ == "__main__":
    main()
