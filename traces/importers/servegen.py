"""ServeGen client data: rates and length distributions, from which requests are drawn with a seed.

`chunk-N-trace.csv` has no header: window start (s), rate, CV, pattern (Gamma, Weibull or empty),
two shape arguments. `chunk-N-dataset.json` beside it maps a window's start to distributions, each a
text that holds a Python dict. What comes out is a draw, not a record, and the tape says so.
In a window of rate r, gaps have mean 1 / r and the pattern's first argument as shape; lengths are
drawn independently. numpy's RandomState is frozen for good (NEP 19), so a seed means the same
requests everywhere.
"""

import ast
import csv
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import gamma, isfinite
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tokentape.traces.errors import TapeError
from tokentape.traces.importers.reading import UNREADABLE, Record, json_document, lines
from tokentape.traces.importers.rows import MAX_TOKENS, NS_PER_S, Batch, Format, Ints, counted

WINDOW_S = 600
MAX_RATE_PER_S = 100_000.0
LAST_START_S = 10**9
LEAST_SHAPE, MOST_SHAPE = 0.006, 1e6  # of the real clients the least is 0.01
MOST_PER_WINDOW = 20_000_000
NO_LENGTHS = "no_lengths"  # drawn, but the data has no lengths for its window
FIELDS = ("input_tokens", "output_tokens")
BATCH_ROWS = 100_000


@dataclass(frozen=True)
class Window:
    """One line of a trace: how requests of this client arrive."""

    start_s: int
    rate_per_s: float
    pattern: str
    shape: float
    place: str


@dataclass(frozen=True)
class Lengths:
    """A distribution of token counts: values, and the sums of their probabilities so far."""

    values: Ints
    cumulative: NDArray[np.float64]

    def draw(self, random: np.random.RandomState, size: int) -> Ints:
        """int64[size]."""
        where = np.searchsorted(self.cumulative, random.random_sample(size), side="right")
        return self.values[np.minimum(where, len(self.values) - 1)]


def dataset_of(path: Path) -> Sequence[Path]:
    """The length distributions of a client, where they lie beside its trace."""
    beside = path.with_name(path.name.split("-trace.csv")[0] + "-dataset.json")
    return [beside] if beside.is_file() and beside != path else []


def read_batches(path: Path, seed: int = 0) -> Iterator[Batch]:
    """The requests of one client, in order of arrival; they follow from file name and seed."""
    random = np.random.RandomState(_stream(path.name, seed))
    lengths = [_lengths(json_document(file)) for file in dataset_of(path)]
    client = path.name.split("-trace.csv")[0]
    row = 0
    waiting: list[Batch] = []
    for window in _windows(path):
        batch = _draw(window, lengths[0] if lengths else {}, random, row, client)
        row += len(batch.time_ns)
        waiting.append(batch)
        if sum(len(one.time_ns) for one in waiting) >= BATCH_ROWS:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _stream(name: str, seed: int) -> int:
    return int.from_bytes(blake2b(f"{name}\0{seed}".encode(), digest_size=4).digest(), "big")


def _windows(path: Path) -> Iterator[Window]:
    for number, line in lines(path):
        fields = next(csv.reader([line.decode(errors="replace")]))
        try:
            start, rate, _cv, pattern, shape, _scale = fields
            window = Window(
                int(start), float(rate), pattern.strip(), float(shape), f"{path}, line {number}"
            )
        except ValueError:
            raise TapeError(
                f"{path}, line {number}: not six fields of a client's window; {UNREADABLE}"
            ) from None
        fits = 0 <= window.rate_per_s <= MAX_RATE_PER_S and 0 <= window.start_s <= LAST_START_S
        if not fits or (window.rate_per_s and not _known(window)):
            raise TapeError(
                f"{path}, line {number}: rate {rate}, pattern {pattern!r} cannot be drawn from; "
                f"{UNREADABLE}"
            )
        yield window


def _known(window: Window) -> bool:
    return window.pattern in {"Gamma", "Weibull"} and LEAST_SHAPE <= window.shape <= MOST_SHAPE


def _lengths(document: Record) -> dict[int, dict[str, Lengths | None]]:
    found = {}
    for start in document.data:
        if not start.isascii() or not start.isdigit():
            raise document.refusal(start, "not a window's start in seconds")
        inside = document.inner(start)
        found[int(start)] = {name: _distribution(inside, name) for name in FIELDS}
    return found


def _distribution(window: Record, name: str) -> Lengths | None:
    """literal_eval, because the text holds Python's keys, which are no JSON."""
    text = window.data.get(name, "{}")
    try:
        weights = ast.literal_eval(text) if isinstance(text, str) else text
        values = np.array(list(weights.keys()), dtype=np.int64)
        probability = np.array(list(weights.values()), dtype=np.float64)
    except (ValueError, SyntaxError, AttributeError, MemoryError, RecursionError, TypeError):
        raise window.refusal(name, "not a distribution of token counts") from None
    if not len(values):
        return None
    total = probability.sum()
    in_range = values.min() >= 0 and values.max() <= MAX_TOKENS and probability.min() >= 0
    if not in_range or not isfinite(total) or total <= 0:
        raise window.refusal(name, "not a distribution of token counts")
    return Lengths(values, np.cumsum(probability / total))


def _draw(
    window: Window,
    lengths: dict[int, dict[str, Lengths | None]],
    random: np.random.RandomState,
    row: int,
    client: str,
) -> Batch:
    """The requests of one window; the draw of arrivals comes first, whatever lengths there are."""
    time_ns = _arrivals_ns(window, random) if window.rate_per_s else np.empty(0, dtype=np.int64)
    starts = sorted(lengths)
    at = bisect_right(starts, window.start_s) - 1
    known = lengths[starts[at]] if at >= 0 else dict.fromkeys(FIELDS)
    drawn = {n: d.draw(random, len(time_ns)) for n, d in known.items() if d is not None}
    dropped = 0
    if len(drawn) < len(FIELDS):
        dropped = len(time_ns)
        time_ns = time_ns[:0]
        drawn = dict.fromkeys(FIELDS, time_ns)
    columns = {name: pa.array(drawn[name]) for name in FIELDS}
    columns["extra"] = pa.repeat(pa.scalar(f'{{"client": "{client}"}}'), len(time_ns))
    numbers = row + np.arange(len(time_ns), dtype=np.int64)
    return Batch(time_ns, numbers, columns, counted(**{NO_LENGTHS: dropped}))


def _arrivals_ns(window: Window, random: np.random.RandomState) -> Ints:
    mean_s = 1 / window.rate_per_s
    expected = window.rate_per_s * WINDOW_S
    size = int(expected + 6 * expected**0.5) + 16
    times_s = np.empty(0)
    last_s = 0.0
    while last_s < WINDOW_S:
        if window.pattern == "Gamma":
            gaps_s = random.gamma(window.shape, mean_s / window.shape, size)
        else:
            gaps_s = random.weibull(window.shape, size) * (mean_s / gamma(1 + 1 / window.shape))
        more_s = last_s + np.cumsum(gaps_s)
        times_s = np.concatenate([times_s, more_s])
        last_s = float(times_s[-1])
        if len(times_s) > MOST_PER_WINDOW:
            raise TapeError(f"{window.place}: draws more than {MOST_PER_WINDOW} requests")
    inside = times_s[times_s < WINDOW_S]
    return window.start_s * NS_PER_S + np.floor(inside * NS_PER_S).astype(np.int64)


def _joined(batches: list[Batch]) -> Batch:
    names = [*FIELDS, "extra"]
    dropped = sum(batch.dropped.get(NO_LENGTHS, 0) for batch in batches)
    return Batch(
        np.concatenate([batch.time_ns for batch in batches]),
        np.concatenate([batch.row for batch in batches]),
        {name: pa.concat_arrays([batch.columns[name] for batch in batches]) for name in names},
        counted(**{NO_LENGTHS: dropped}),
    )


FORMAT = Format(
    origin="alibaba/ServeGen, data",
    licence="Apache-2.0",
    wall_clock=False,
    one_file=False,
    read=read_batches,
    marks=(),
    facts={
        "drawn": "requests are drawn from rates and distributions; none was recorded",
    },
    pattern="*-trace.csv",
    companions=dataset_of,
    seeded=True,
)
