"""Sends one share of a plan from this process: rows read ahead, connections opened, then the clock.

A run of one worker calls it in its own process, a worker of several in its; it is the same code.
It judges nothing.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

try:
    import uvloop
except ImportError:  # it is for Linux only
    uvloop = None  # type: ignore[assignment]

from tokentape.replay.ahead import Outgoing
from tokentape.replay.progress import Progress
from tokentape.replay.self_check import self_check
from tokentape.replay.sender import Sender, Sent
from tokentape.replay.share import Share
from tokentape.replay.start import Start
from tokentape.replay.transport import NO_REPLY, allow_files, open_client
from tokentape.replay.trust import why_untrusted
from tokentape.traces.errors import TokentapeError
from tokentape.traces.recording import Recorder

WARM_FACTOR = 4  # connections per request in flight as planned: a candidate may be that much slower
MOST_WARM = 2_000  # more streams than one worker should carry

Tell = Callable[[Progress], None]
Stops = Callable[[Callable[[], None]], AbstractContextManager[None]]


def run_loop[T](work: Coroutine[Any, Any, T]) -> T:
    """Run it to its end on uvloop, where that exists; asyncio's own loop does it as well."""
    return asyncio.run(work, loop_factory=uvloop.new_event_loop if uvloop else None)


async def send_share(
    share: Share,
    recorder: Recorder,
    stops: Stops,
    *,
    worker: str = "w0",
    start: Start | None = None,
    prepare: Callable[[int], Outgoing] | None = None,
    progress: Tell | None = None,
) -> Sent:
    """Send it all and wait for the replies; what became of it.

    Args: stops: calls the function that it is given when the run is to end early. start: tells
    when the run starts; else at once. prepare: builds the i-th request, if not the share itself.
    TokentapeError when no connection is to be had.
    """
    await self_check()
    warm = allow_files(min(WARM_FACTOR * share.peak_in_flight, len(share), MOST_WARM))
    with _read_ahead(share, prepare or share.outgoing) as build:
        async with open_client(share.target.address.ca) as client:
            sender = Sender(
                client,
                recorder,
                share.due_ns,
                build,
                waits=share.waits,
                warm=max(1, warm),
                timeout_ns=share.timeout_ns,
                first_byte_timeout_ns=share.first_byte_timeout_ns,
                precise=share.precise,
                worker=worker,
                start=start,
                progress=_with_served(progress, recorder) if progress else None,
            )
            with stops(sender.stop):
                try:
                    return await sender.run()
                except NO_REPLY as error:
                    gone = f"takes no connection any more ({type(error).__name__})"
                    why = why_untrusted(error) or gone
                    raise TokentapeError(f"{share.target.address.base}: {why}") from None


@contextmanager
def _read_ahead(
    share: Share, prepare: Callable[[int], Outgoing]
) -> Iterator[Callable[[int], Outgoing]]:
    """A way to build requests while their rows are read in a thread."""
    reader = share.read_ahead()
    reader.start()

    def build(number: int) -> Outgoing:
        outgoing = prepare(number)
        reader.built(number)
        return outgoing

    try:
        yield build
    finally:
        reader.stop()


def _with_served(tell: Tell, recorder: Recorder) -> Tell:
    """Tell also what the writer process has read of the replies so far."""
    return lambda state: tell(replace(state, served=recorder.served))
