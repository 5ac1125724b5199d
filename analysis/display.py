"""Numbers and tables for people: three significant digits with a unit, aligned columns.

Only for showing. Nothing may be computed from what this file returns.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

NOTHING = "-"
TOO_FEW = "too few"

_TIME_UNITS = ((1e9, "s"), (1e6, "ms"), (1e3, "us"), (1.0, "ns"))
_SHRUNK_TO = 12  # characters that a long name keeps at least


def figure(value: float | None) -> str:
    """Three significant digits; whole above 100, so no digit that was measured becomes a zero."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    text = f"{value:#.3g}"
    return text if "e" not in text else f"{value:.2e}"


def duration(value_ns: float | None) -> str:
    """A duration in the unit that gives it one to three digits before the point."""
    if value_ns is None:
        return NOTHING
    if value_ns == 0:
        return "0 ms"
    for size, unit in _TIME_UNITS:
        if abs(value_ns) / size >= 0.9995:
            return f"{figure(value_ns / size)} {unit}"
    return f"{figure(value_ns)} ns"


def quantity(value: float | None, unit: str) -> str:
    """A value of metrics_long; its unit is shown for times only."""
    return duration(value) if unit == "ns" else figure(value)


def ratio(value: float | None, base: float | None) -> str:
    """How many times the base a value is."""
    if value is None or not base:
        return NOTHING
    return f"{figure(value / base)}x"


def share(part: float | None) -> str:
    """A part of a whole in per cent, rounded down: 100 % is all of it."""
    if part is None:
        return NOTHING
    return "100 %" if part >= 1 else f"{math.floor(part * 10_000) / 100:.2f} %"


def count(n: int | None) -> str:
    """A whole number, exact."""
    return NOTHING if n is None else f"{n:,}"


def instant(unix_ns: int | None) -> str:
    """A point in time, UTC, to the second."""
    if unix_ns is None:
        return NOTHING
    return f"{datetime.fromtimestamp(unix_ns // 1_000_000_000, tz=UTC):%Y-%m-%d %H:%M:%SZ}"


@dataclass(frozen=True)
class Table:
    """A table to show: `texts` columns of words on the left, figures right of them."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1


Block = list[Table | str]  # what is shown together: tables, and lines of text


def lines(block: Block, width: int) -> Iterator[str]:
    """A block for a terminal."""
    for part in block:
        if isinstance(part, str):
            yield part
        else:
            yield from table(part.head, part.rows, width, part.texts)


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], width: int, texts: int = 1
) -> list[str]:
    """Lines of an aligned table: `texts` columns of words on the left, figures right of them.

    Words are cut in the middle until a line fits the width; figures never are.
    """
    cells = [list(head), *(list(row) for row in rows)]
    sizes = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for i in sorted(range(texts), key=lambda i: -sizes[i]):
        excess = sum(sizes) + 2 * (len(sizes) - 1) - width
        if excess > 0:
            sizes[i] = min(sizes[i], max(_SHRUNK_TO, sizes[i] - excess))
    lines = []
    for row in cells:
        words = [cut(row[i], sizes[i]).ljust(sizes[i]) for i in range(texts)]
        figures = [row[i].rjust(sizes[i]) for i in range(texts, len(row))]
        lines.append("  ".join([*words, *figures]).rstrip())
    return lines


def cut(text: str, size: int) -> str:
    """Text of so many characters at most; what is too long loses its middle."""
    if len(text) <= size:
        return text
    tail = (size - 1) // 2
    return f"{text[: size - 1 - tail]}…{text[-tail:]}"
