"""What a tape holds and what it lacks: arrivals, lengths, sessions, prefixes, streams, losses.

Exact where it says nothing else. Reads some thousand rows at a time; of them only arrivals and
token counts stay in memory (24 bytes a row), and block ids up to a bound, past which a share of
them is followed and the figure says so. It never says how fast a server was: `report` does.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tokentape.traces.arrivals import Arrivals, arrivals_of
from tokentape.traces.reader import Tape
from tokentape.traces.schema import REQUESTS

BATCH_ROWS = 50_000
QUANTILES = (0.5, 0.9, 0.99)
MOST_BLOCK_IDS = 4_000_000  # followed one by one: 64 MB
WORDS = ("outcome", "operation", "wire_format", "model", "arrival_clock", "event_clock")
SHOWN_WORDS = 8  # of each, the most frequent
_COLUMNS = (
    *("arrival_ns", "input_tokens", "output_tokens", "session_id", "turn_index", "parents"),
    *("block_hashes", "block_tokens", "block_unit", "block_scope", "stream"),
    *WORDS,
)
# What questions a tape cannot answer when a column is empty in every row.
LACKS = {
    "session_id": "sessions: turns are replayed as single requests",
    "parents": "parents: nothing waits for anything in a replay",
    "block_hashes": "prefixes: a replay shares none",
    "input_tokens": "prompt lengths: a replay guesses them from bytes",
    "output_tokens": "output lengths: nothing can be replayed",
    "end_ns": "ends: no latency, no concurrency",
    "first_content_ns": "first contents: no time to first token",
    "off_us": "times of events: no inter-token latency, no stalls",
    "server_queue_ns": "the server's own times: queueing is an estimate",
    "cached_tokens": "cache hits as the server counts them",
    "model": "models, as replies name them",
}

_COUNTED = frozenset((*_COLUMNS, *LACKS))


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows that know them; None where no row does."""

    known: int
    total: int
    least: int | None
    quantiles: dict[str, int] | None
    most: int | None


@dataclass(frozen=True)
class Prefixes:
    """Blocks of prompts, and how many of them a cache that forgets nothing would have had.

    `ideal_reuse` is 1 - distinct blocks / blocks. `followed` is the share of ids that stand behind
    it: 1 is exact.
    """

    requests: int
    blocks: int
    block_sizes: dict[str, int]
    ideal_reuse: float | None
    followed: float


@dataclass(frozen=True)
class Sessions:
    """`turns` are quantiles over sessions; `waiting` rows have parents."""

    sessions: int
    requests: int
    turns: dict[str, int] | None
    most_turns: int | None
    waiting: int


@dataclass(frozen=True)
class Summary:
    """All of it; `words` are counts of the words in a column, `lacks` what no row tells."""

    requests: int
    arrivals: Arrivals
    input_tokens: Lengths
    output_tokens: Lengths
    sessions: Sessions
    prefixes: Prefixes
    streamed: int  # replies asked for as a stream
    events: int
    words: dict[str, dict[str, int]]
    lacks: list[str]


@dataclass
class _Gathered:
    arrivals: list[NDArray[np.int64]] = field(default_factory=list)
    tokens: dict[str, list[NDArray[np.int64]]] = field(
        default_factory=lambda: {"input_tokens": [], "output_tokens": []}
    )
    sessions: list[pa.Table] = field(default_factory=list)
    words: dict[str, Counter[str]] = field(default_factory=lambda: {n: Counter() for n in WORDS})
    sizes: Counter[str] = field(default_factory=Counter)
    blocks: "BlockIds" = field(default_factory=lambda: BlockIds(MOST_BLOCK_IDS))
    with_blocks: int = 0
    waiting: int = 0
    streamed: int = 0


def summarize(tape: Tape) -> Summary:
    """Reads every sealed row once."""
    found = _Gathered()
    present: Counter[str] = Counter()
    for segment in tape.segments:
        with pq.ParquetFile(segment.path) as file:
            _count_present(file.metadata, present)
            here = set(file.schema_arrow.names)
            names = [n for n in _COLUMNS if n in here and present[n]]
            for batch in file.iter_batches(BATCH_ROWS, columns=names):
                _gather(batch, found)
    return Summary(
        requests=tape.rows,
        arrivals=arrivals_of(_joined(found.arrivals)),
        input_tokens=_lengths(_joined(found.tokens["input_tokens"])),
        output_tokens=_lengths(_joined(found.tokens["output_tokens"])),
        sessions=_sessions(found),
        prefixes=found.blocks.prefixes(found.with_blocks, dict(found.sizes)),
        streamed=found.streamed,
        events=tape.events,
        words={n: dict(c.most_common(SHOWN_WORDS)) for n, c in found.words.items() if c},
        lacks=[why for name, why in LACKS.items() if not present[name]],
    )


def _count_present(metadata: Any, present: Counter[str]) -> None:
    """Values that are not NULL by column, from the footer; a list counts with all its values."""
    paths = [metadata.schema.column(n).path.split(".")[0] for n in range(metadata.num_columns)]
    wanted = [(n, name) for n, name in enumerate(paths) if name in _COUNTED]
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for column, name in wanted:
            chunk = group.column(column)
            counted = chunk.statistics is not None and chunk.statistics.has_null_count
            nulls = chunk.statistics.null_count if counted else 0
            present[name] += chunk.num_values - nulls


def _gather(batch: pa.RecordBatch, found: _Gathered) -> None:
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    if "arrival_ns" in columns:
        found.arrivals.append(np.asarray(columns["arrival_ns"].drop_null()))
    for name in found.tokens.keys() & columns.keys():
        found.tokens[name].append(np.asarray(columns[name].drop_null()).astype(np.int64))
    for name in found.words.keys() & columns.keys():
        for said in pc.value_counts(columns[name].drop_null()).to_pylist():
            found.words[name][said["values"]] += said["counts"]
    if "stream" in columns:
        found.streamed += pc.sum(columns["stream"]).as_py() or 0
    if "session_id" in columns:
        known = pa.table({"session": columns["session_id"].drop_null()})
        found.sessions.append(known.group_by("session").aggregate([([], "count_all")]))
    if "parents" in columns:
        waiting = pc.sum(pc.greater(pc.list_value_length(columns["parents"]), 0)).as_py()
        found.waiting += waiting or 0
    if "block_hashes" in columns:
        _gather_blocks(columns, found)


def _gather_blocks(columns: dict[str, Any], found: _Gathered) -> None:
    hashes = columns["block_hashes"]
    known = pc.fill_null(pc.greater(pc.list_value_length(hashes), 0), fill_value=False)
    found.with_blocks += int(pc.sum(known).as_py() or 0)
    values = pc.list_flatten(hashes).to_numpy(zero_copy_only=False)
    scope = columns.get("block_scope")
    if scope is not None and pc.any(pc.equal(scope, "session")).as_py():
        owner = pc.list_parent_indices(hashes).to_numpy(zero_copy_only=False)
        names = columns["session_id"].to_pylist()
        salt = np.array([hash(name) for name in names], dtype=np.int64)
        values = values ^ salt[owner]
    found.blocks.add(values)
    if "block_tokens" in columns and "block_unit" in columns:
        size, unit = columns["block_tokens"].cast(pa.string()), columns["block_unit"]
        said = pc.binary_join_element_wise(size, unit, " ").drop_null()
        for one in pc.value_counts(said).to_pylist():
            found.sizes[one["values"]] += one["counts"]


class BlockIds:
    """Counts distinct ids; past a bound it follows those whose mixed bits end in zeros.

    Which ids are followed depends on the id alone, so all occurrences of one are, and the ratio of
    distinct to all is unbiased.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._halvings = 0
        self._distinct = np.empty(0, dtype=np.uint64)
        self._counts = np.empty(0, dtype=np.int64)
        self._waiting: list[NDArray[np.uint64]] = []
        self._waiting_size = 0
        self.total = 0

    def add(self, ids: NDArray[np.int64]) -> None:
        """Takes ids of blocks in, in any order."""
        self.total += len(ids)
        mixed = _mixed(ids.astype(np.int64, copy=False).view(np.uint64))
        self._waiting.append(mixed[self._followed(mixed)])
        self._waiting_size += len(self._waiting[-1])
        if self._waiting_size >= self._most // 2:
            self._merge()

    def _followed(self, mixed: NDArray[np.uint64]) -> NDArray[np.bool_]:
        mask = np.uint64((1 << self._halvings) - 1)
        ends_in_zeros: NDArray[np.bool_] = (mixed & mask) == 0
        return ends_in_zeros

    def _merge(self) -> None:
        fresh, fresh_counts = np.unique(np.concatenate(self._waiting), return_counts=True)
        both = np.concatenate([self._distinct, fresh])
        counts = np.concatenate([self._counts, fresh_counts])
        self._distinct, where = np.unique(both, return_inverse=True)
        self._counts = np.bincount(where, weights=counts).astype(np.int64)
        self._waiting, self._waiting_size = [], 0
        while len(self._distinct) > self._most:
            self._halvings += 1
            kept = self._followed(self._distinct)
            self._distinct, self._counts = self._distinct[kept], self._counts[kept]

    def prefixes(self, requests: int, sizes: dict[str, int]) -> Prefixes:
        """What the ids say."""
        if self._waiting:
            self._merge()
        seen = int(self._counts.sum())
        reuse = 1 - len(self._distinct) / seen if seen else None
        return Prefixes(requests, self.total, sizes, reuse, 1 / (1 << self._halvings))


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection on 64 bits (SplitMix64's finisher), since ids of a trace are consecutive."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _joined(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _lengths(tokens: NDArray[np.int64]) -> Lengths:
    if not len(tokens):
        return Lengths(0, 0, None, None, None)
    least, most = int(tokens.min()), int(tokens.max())
    return Lengths(len(tokens), int(tokens.sum()), least, quantiles(tokens), most)


def quantiles(values: NDArray[np.int64]) -> dict[str, int]:
    """Exact quantiles that are values of the set (inverted CDF), by name: p50, p90, p99."""
    found = np.quantile(values, QUANTILES, method="inverted_cdf")
    return {f"p{q * 100:g}": int(v) for q, v in zip(QUANTILES, found, strict=True)}


def _sessions(found: _Gathered) -> Sessions:
    if not found.sessions:
        return Sessions(0, 0, None, None, found.waiting)
    whole = pa.concat_tables(found.sessions).group_by("session").aggregate([("count_all", "sum")])
    turns = np.asarray(whole["count_all_sum"]).astype(np.int64)
    if not len(turns):
        return Sessions(0, 0, None, None, found.waiting)
    return Sessions(len(turns), int(turns.sum()), quantiles(turns), int(turns.max()), found.waiting)


assert set(_COLUMNS) <= set(REQUESTS.names)
