"""The capture command: a proxy in front of one upstream, and a tape behind it.

Runs until SIGINT or SIGTERM, then drains: streams in flight end, and only then is the tape sealed.
"""

import asyncio
import secrets
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass

from tokentape.proxy import master
from tokentape.proxy.addon import Capture
from tokentape.proxy.loop import RelayLoop
from tokentape.proxy.options import CaptureOptions, checked_listen, checked_upstream
from tokentape.proxy.pulse import Pulse
from tokentape.traces.errors import UsageError
from tokentape.traces.facts import refuse_foreign
from tokentape.traces.privacy import KEY_BYTES, Privacy, load_key
from tokentape.traces.recording import Recorder


@dataclass(frozen=True)
class CaptureSummary:
    """What was captured, and what was not."""

    seen: int
    rows: int
    events: int
    losses: dict[str, int]
    proxy_errors: int
    unsealed: int = 0

    def text(self) -> str:
        """One line for people."""
        lost = ", ".join(f"{n} lost ({reason})" for reason, n in sorted(self.losses.items()))
        tail = f"; {lost}" if lost else "; nothing lost"
        if self.unsealed:
            tail += f"; {self.unsealed} wait in the journal for `tokentape recover`"
        errors = f"; {self.proxy_errors} proxy errors" if self.proxy_errors else ""
        return f"{self.seen} requests seen, {self.rows} rows, {self.events} events{tail}{errors}"


def capture(options: CaptureOptions, on_ready: Callable[[str], None]) -> CaptureSummary:
    """Proxy and record until a signal; `on_ready` gets the URL that clients should use.

    UsageError for an upstream or address that cannot be used, TapeError for the tape.
    """
    upstream = checked_upstream(options.upstream)
    host, port = checked_listen(options.listen)
    refuse_foreign(options.tape)  # before a key is made beside it
    try:
        bound = master.bind(host, port)
    except OSError as error:
        raise UsageError(
            f"--listen {options.listen}: {error.strerror}; choose another port, or 0 for a free one"
        ) from None
    with bound:
        recorder = _start(options, upstream)
        at, number = bound.getsockname()[:2]
        address = f"http://[{at}]:{number}" if ":" in at else f"http://{at}:{number}"
        with asyncio.Runner(loop_factory=RelayLoop) as runner:
            errors = runner.run(_run(options, upstream, bound, recorder, lambda: on_ready(address)))
        done = recorder.finish()
    return CaptureSummary(done.seen, done.rows, done.events, done.losses, errors, done.unsealed)


def _start(options: CaptureOptions, upstream: str) -> Recorder:
    """A recorder on the tape, new or going on, with the tape's key."""
    if options.content == "none":
        key, key_id = secrets.token_bytes(KEY_BYTES), None  # groups callers within this life only
    else:
        key = load_key(options.tape, options.key_file)
        key_id = Privacy(options.content, key).key_id
    return Recorder.start(
        options.tape,
        role="capture",
        command=options.command,
        options={"upstream": upstream, "listen": options.listen, "content": options.content},
        facts={"candidate": {"url": upstream, "given": options.facts}, "key_id": key_id},
        content=options.content,
        key=key,
        force=options.force,
        append=True,
        worker=options.worker,
    )


async def _run(
    options: CaptureOptions,
    upstream: str,
    bound: socket.socket,
    recorder: Recorder,
    on_ready: Callable[[], None],
) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    recorder.flush_every(loop)
    addon = Capture(recorder, options.worker)
    pulse = Pulse(addon, recorder, options.worker, lambda _: None)
    pulse.start(loop)
    errors = await master.serve(options, upstream, bound, addon, stop, on_ready)
    pulse.stop()
    return errors + addon.errors
