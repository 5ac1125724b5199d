"""Timers on absolute CLOCK_MONOTONIC instants, from the kernel: exact, and they add up no error.

asyncio's own timers round to a millisecond and cannot be armed for an absolute kernel instant; they
must not be used where a request is due. Python 3.13 has timerfd in `os`, 3.12 gets it by ctypes.
"""

import asyncio
import ctypes
import os
import sys
import time
from collections.abc import Callable

NS_PER_S = 1_000_000_000
_TFD_NONBLOCK, _TFD_CLOEXEC, _TFD_TIMER_ABSTIME = 0o4000, 0o2000000, 1
_PR_SET_TIMERSLACK = 29
LOOP_CLOCK_S = 0.002  # a loop's own clock is that of its last turn, in uvloop in whole ms


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("ns", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def create_by_ctypes() -> int:
    """A timerfd without `os.timerfd_create`."""
    return _check(_libc().timerfd_create(time.CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC))


def set_by_ctypes(fd: int, at_ns: int, every_ns: int) -> None:
    """Arm a timerfd without `os.timerfd_settime_ns`."""
    first = _Timespec(*divmod(at_ns, NS_PER_S))
    spec = _Itimerspec(_Timespec(*divmod(every_ns, NS_PER_S)), first)
    _check(_libc().timerfd_settime(fd, _TFD_TIMER_ABSTIME, ctypes.byref(spec), None))


if sys.version_info >= (3, 13):

    def create() -> int:
        """A non-blocking timerfd on CLOCK_MONOTONIC."""
        return os.timerfd_create(time.CLOCK_MONOTONIC, flags=os.TFD_NONBLOCK | os.TFD_CLOEXEC)

    def set_time(fd: int, at_ns: int, every_ns: int) -> None:
        """Arm it for an absolute instant, and then again every so often; 0 is once."""
        os.timerfd_settime_ns(fd, flags=os.TFD_TIMER_ABSTIME, initial=at_ns, interval=every_ns)

else:
    create, set_time = create_by_ctypes, set_by_ctypes


class AbsoluteTimer:
    """Calls back in an event loop at absolute instants; one kernel timer, armed again and again."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._fd = create()
        loop.add_reader(self._fd, self._fired)

    def at(self, monotonic_ns: int, every_ns: int = 0) -> None:
        """Fire at an instant (at once if it has passed), and then every `every_ns` if not 0."""
        set_time(self._fd, max(monotonic_ns, 1), every_ns)  # 0 would disarm it

    def close(self) -> None:
        """Disarm and let go."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _fired(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # armed anew between the wake-up and this read
            return
        self._callback()


def precise_wakeups() -> None:
    """Take the 50 us away that Linux may add to this thread's sleeps."""
    _libc().prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0)


def never_early_s(span_ns: int | None) -> float | None:
    """What a timer of the event loop must be given to ring no sooner than a span from now.

    For deadlines of requests, where a little late is harmless and early is a lie.
    """
    return None if span_ns is None else span_ns / NS_PER_S + LOOP_CLOCK_S
