"""The live view of a replay, drawn by a process of its own: drawing takes milliseconds of CPU.

The process that sends only writes a message about once a second, and drops it when nobody reads.
The view ends with its socket, however the sender ended, and leaves the terminal as it was.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from rich.panel import Panel

    from tokentape.replay.progress import Progress

NICER = 5  # than the sender
MESSAGE_BYTES = 1 << 16
END_TIMEOUT_S = 5.0
BAR_CELLS = 40
_encode = msgspec.msgpack.Encoder().encode


@contextlib.contextmanager
def live_panel() -> Iterator["Callable[[Progress], None]"]:
    """Gives a function that shows how a run stands: 0.4 ms with cold caches, and it never waits."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours:
        with theirs:
            view = subprocess.Popen(
                [sys.executable, "-m", "tokentape.cli.panel"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the sender
            )

        def show(now: "Progress") -> None:
            with contextlib.suppress(OSError):  # it is slow, or gone: the next one says more
                ours.send(_encode(vars(now)))

        try:
            yield show
        finally:
            ours.close()
            try:
                view.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                view.kill()
                view.wait()


def drawn(now: "Progress") -> "Panel":
    """How a run stands, as a panel."""
    from rich.panel import Panel
    from rich.table import Table

    from tokentape.replay.progress import WATCHED

    share = now.done / now.total if now.total else 0.0
    full = round(BAR_CELLS * share)
    rows = [
        ("done", f"{'█' * full}{'░' * (BAR_CELLS - full)} {now.done:,} of {now.total:,}"),
        ("to send", f"{_clock(now.left_s)} of {_clock(now.span_s)}" if now.left_s else "all sent"),
        ("in flight", f"{now.in_flight:,}"),
        *((name, _latency(now, name)) for name in WATCHED),
        ("late", _late(now)),
        *([("turns", _moved(now))] if now.moved else []),
        ("so far", "; ".join(now.doubts()) or "nothing speaks against this run"),
    ]
    table = Table.grid(padding=(0, 2))
    for name, text in rows:
        table.add_row(name, text)
    return Panel(table, title="replay", title_align="left", expand=False)


def _latency(now: "Progress", what: str) -> str:
    mean_s = now.mean_s(what)
    if mean_s is None:
        return "no request has ended"
    words = [f"mean {1000 * mean_s:.1f} ms"]
    for q in (0.5, 0.99):
        bound_s = now.at_most_s(what, q)
        said = "beyond the scale" if bound_s is None else f"at most {1000 * bound_s:,.0f} ms"
        words.append(f"p{100 * q:.0f} {said}")
    return ", ".join(words)


def _late(now: "Progress") -> str:
    causes = ", ".join(f"{n} by {name}" for name, n in now.late_causes.items())
    worst = f"worst {now.worst_late_ms:.1f} ms"
    return f"{now.late:,} by over 1 ms{f' ({causes})' if causes else ''}, {worst}"


def _moved(now: "Progress") -> str:
    return f"{now.moved:,} moved by a predecessor, by {now.most_moved_s:.1f} s at most"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def main() -> None:
    """Draw what the socket on stdin says, until it is closed."""
    from rich.console import Console
    from rich.live import Live

    from tokentape.replay.progress import Progress

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICER)
    heard = socket.socket(fileno=0)
    console = Console(stderr=True)
    with contextlib.suppress(OSError), Live(console=console, auto_refresh=False) as live:
        while data := heard.recv(MESSAGE_BYTES):
            live.update(drawn(Progress(**msgspec.msgpack.decode(data))), refresh=True)


if __name__ == "__main__":
    main()
