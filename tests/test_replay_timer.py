"""Kernel timers: absolute, exact, and the same through os and through ctypes."""

import asyncio
import os
import select
from collections.abc import Callable
from time import monotonic_ns

import pytest

from tokentape.replay import timer
from tokentape.replay.timer import AbsoluteTimer

WAYS = [(timer.create, timer.set_time), (timer.create_by_ctypes, timer.set_by_ctypes)]


@pytest.mark.parametrize(("create", "set_time"), WAYS, ids=["os", "ctypes"])
def test_a_timer_is_readable_from_its_instant_on_and_not_before(
    create: Callable[[], int], set_time: Callable[[int, int, int], None]
) -> None:
    fd = create()
    try:
        due = monotonic_ns() + 30_000_000
        set_time(fd, due, 0)
        assert select.select([fd], [], [], 0)[0] == []
        assert select.select([fd], [], [], 10)[0] == [fd]
        assert monotonic_ns() >= due
        assert int.from_bytes(os.read(fd, 8), "little") == 1
        set_time(fd, 1, 0)  # an instant long past fires at once
        assert select.select([fd], [], [], 10)[0] == [fd]
        set_time(fd, monotonic_ns(), 1_000_000)  # and one that repeats goes on
        select.select([fd], [], [], 10)
        os.read(fd, 8)
        assert select.select([fd], [], [], 10)[0] == [fd]
    finally:
        os.close(fd)


def test_a_fault_of_the_kernel_is_raised_by_the_ctypes_way_too() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        timer.set_by_ctypes(-1, 1, 0)


def test_a_timer_of_a_loop_fires_in_order_at_each_instant_that_it_is_armed_for() -> None:
    async def main() -> list[tuple[int, int]]:
        loop = asyncio.get_running_loop()
        done = asyncio.Event()
        start = monotonic_ns()
        due = [start + n * 5_000_000 for n in (-1, 1, 2, 4)]
        fired: list[tuple[int, int]] = []

        def callback() -> None:
            fired.append((due[len(fired)], monotonic_ns()))
            if len(fired) < len(due):
                alarm.at(due[len(fired)])
            else:
                done.set()

        alarm = AbsoluteTimer(loop, callback)
        alarm.at(due[0])
        await asyncio.wait_for(done.wait(), 10)
        alarm.close()
        return fired

    fired = asyncio.run(main())
    assert len(fired) == 4
    assert all(at >= due for due, at in fired)
