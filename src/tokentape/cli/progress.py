"""What a person sees while a command works: stderr only, so that stdout stays the result.

A live bar on a terminal, plain lines elsewhere, seldom enough for a log. It must never raise into
the work that it tells of.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

LINE_EVERY_S = 5.0  # without a terminal


def say(text: str) -> None:
    """One line for people; silent where stderr is closed."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


@contextlib.contextmanager
def counting(what: str, total: int | None = None) -> Iterator[Callable[[int, str], None]]:
    """Gives a function that is told how many are done, and a note; `total` if it is known."""
    if sys.stderr.isatty():
        with _bar(what, total) as tell:
            yield tell
    else:
        yield in_lines(what, total)


@contextlib.contextmanager
def live_line() -> Iterator[Callable[[str], None]]:
    """Gives a function that replaces the last line of a terminal; elsewhere it says nothing."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(Text(""), console=Console(stderr=True), transient=True, auto_refresh=False) as live:
        yield lambda text: live.update(Text(text, no_wrap=True), refresh=True)


@contextlib.contextmanager
def _bar(what: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note)


def in_lines(what: str, total: int | None) -> Callable[[int, str], None]:
    """A function as that of `counting`, which writes a line every LINE_EVERY_S."""
    next_s = time.monotonic() + LINE_EVERY_S

    def tell(done: int, note: str) -> None:
        nonlocal next_s
        if time.monotonic() >= next_s:
            next_s = time.monotonic() + LINE_EVERY_S
            of = f" of {total:,}" if total else ""
            say(f"{done:,}{of} {what}{f', {note}' if note else ''}")

    return tell
