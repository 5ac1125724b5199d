"""When the kernel got what a socket was read of, on this process's own clock. Light; never waits.

A read with SO_TIMESTAMPNS carries the stamp of its last segment on CLOCK_REALTIME. It is converted
to CLOCK_MONOTONIC at once; the difference to the read itself is how late this process was.
Source: Linux, Documentation/networking/timestamping.rst.
"""

import socket
import struct

from tokentape.traces.blocks import NO_STAMP
from tokentape.traces.clock import take_anchor

SO_TIMESTAMPNS = 35  # SO_TIMESTAMPNS_OLD, whose message holds two native longs: s, ns
ANCILLARY_BYTES = 64
STEP_NS = 1_000_000  # the wall clock moved against the monotonic one by more than drift explains
LATE_NS = 1_000_000_000  # an older stamp is believed only when the wall clock has not stepped
ANCHOR_JITTER_NS = 20_000  # a stamp this little after its read is the anchor's own error
STAMP = struct.Struct("@ll")


class KernelClock:
    """Converts kernel stamps to CLOCK_MONOTONIC; `steps` counts steps of the wall clock."""

    def __init__(self) -> None:
        self.steps = 0
        self.offset_ns = 0  # wall minus monotonic
        self.refresh()
        self.steps = 0

    def refresh(self) -> bool:
        """Follow the wall clock's drift; True when it has stepped. Call it a few times a second."""
        anchor = take_anchor(tries=5)
        offset_ns = anchor.wall_unix_ns - anchor.monotonic_ns
        stepped = abs(offset_ns - self.offset_ns) > STEP_NS
        self.steps += stepped
        self.offset_ns = offset_ns
        return stepped

    def place(self, kernel_unix_ns: int, user_ns: int) -> tuple[int, int]:
        """(monotonic ns, lateness in us) of a read; (`user_ns`, NO_STAMP) without a kernel stamp.

        A stamp after the read means that the wall clock was set: it is not believed. One from long
        before is, unless the clock was set meanwhile: a reader that was paused does read late.
        """
        if not kernel_unix_ns:
            return user_ns, NO_STAMP
        at_ns = kernel_unix_ns - self.offset_ns
        late_ns = user_ns - at_ns
        if 0 <= late_ns < LATE_NS:
            return at_ns, late_ns // 1000
        if -ANCHOR_JITTER_NS < late_ns < 0:
            return user_ns, 0
        if self.refresh() or late_ns < 0:
            return user_ns, NO_STAMP
        return at_ns, min(late_ns // 1000, NO_STAMP - 1)


def stamp_of(ancillary: list[tuple[int, int, bytes]]) -> int:
    """The kernel's stamp among control messages, CLOCK_REALTIME ns; 0 when there is none."""
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS and len(data) == STAMP.size:
            seconds, ns = STAMP.unpack(data)
            return int(seconds) * 1_000_000_000 + int(ns)
    return 0
