"""The watch over the replay's own process: what disturbs it is counted while it runs."""

import asyncio
import gc
from time import monotonic_ns

from tokentape.replay.health import TICK_NS, Health, Watch


def watched(disturb: object = None) -> Health:
    """Watch a loop for some ticks; `disturb` is called in the middle of them."""

    async def main() -> Health:
        watch = Watch(asyncio.get_running_loop())
        watch.start()
        for number in range(10):
            await asyncio.sleep(2 * TICK_NS / 1e9)
            if number == 5 and callable(disturb):
                disturb()
        return watch.stop()

    return asyncio.run(main())


def stall() -> None:
    until = monotonic_ns() + 60_000_000
    while monotonic_ns() < until:
        pass


def test_a_stall_of_the_loop_is_seen_with_its_length() -> None:
    health = watched(stall)
    assert health.stalls >= 1 and health.missed_ticks >= 4
    assert health.late_max_ns > 40_000_000


def test_collections_count_only_while_the_watch_runs() -> None:
    callbacks = len(gc.callbacks)
    health = watched(gc.collect)
    assert health.gc_runs >= 1 and health.gc_ns > 0
    assert len(gc.callbacks) == callbacks


def test_full_receive_buffers_are_counted_where_the_kernel_does() -> None:
    windows = watched().windows_closed
    assert windows is None or windows >= 0
