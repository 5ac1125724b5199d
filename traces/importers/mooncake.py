"""Mooncake traces: JSON lines of timestamp (ms), input_length, output_length, hash_ids.

A hash id stands for the whole prompt up to the end of its 512-token block, and equal ids mean equal
prefixes anywhere in the trace. There is one for the last block too when it is only partly filled:
len(hash_ids) = ceil(input_length / 512). All ids are kept, so where `prefix_partial` is not 0 the
last hash stands for that many tokens. Ids of two traces must never meet on one tape.
"""

from collections.abc import Iterator
from itertools import batched
from pathlib import Path

import numpy as np
import pyarrow as pa

from tokentape.traces.importers.reading import LAST_NS, Record, json_lines
from tokentape.traces.importers.rows import NO_VALUE, NS_PER_MS, Batch, Format, blocks, counted

BLOCK_TOKENS = 512
TIME, INPUT, OUTPUT, HASHES = "timestamp", "input_length", "output_length", "hash_ids"
REQUIRED = (TIME, INPUT, OUTPUT)
KNOWN = (*REQUIRED, HASHES)
BATCH_ROWS = 20_000
MAX_TIME_MS = LAST_NS // NS_PER_MS


def read_batches(path: Path) -> Iterator[Batch]:
    """The rows of a file, in file order; TapeError names the line that cannot be read."""
    for numbered in batched(enumerate(json_lines(path)), BATCH_ROWS):
        for _, record in numbered:
            record.need(*REQUIRED)
        kept = [(row, r) for row, r in numbered if r.has(*REQUIRED)]
        yield _batch(kept, dropped=len(numbered) - len(kept))


def _batch(kept: list[tuple[int, Record]], dropped: int) -> Batch:
    records = [record for _, record in kept]
    time_ms = [record.count(TIME, MAX_TIME_MS) for record in records]
    input_tokens = [record.count(INPUT) for record in records]
    output_tokens = [record.count(OUTPUT) for record in records]
    hashes = [_hashes(r, n or 0) for r, n in zip(records, input_tokens, strict=True)]
    columns = {
        "input_tokens": pa.array(input_tokens, pa.int64()),
        "output_tokens": pa.array(output_tokens, pa.int64()),
        **blocks(hashes, input_tokens, BLOCK_TOKENS),
        "extra": pa.array([record.extra(*KNOWN) for record in records], pa.string()),
    }
    return Batch(
        np.array(time_ms, dtype=np.int64) * NS_PER_MS,
        np.array([row for row, _ in kept], dtype=np.int64),
        columns,
        dropped=counted(**{NO_VALUE: dropped}),
        notes={
            "rows_without_output": output_tokens.count(0),
            "rows_without_prefix": hashes.count(None),
        },
    )


def _hashes(record: Record, input_tokens: int) -> list[int] | None:
    """None where there are none or they break the ceil rule."""
    ids = record.ids(HASHES)
    return ids if ids is not None and len(ids) == -(-input_tokens // BLOCK_TOKENS) else None


FORMAT = Format(
    origin="kvcache-ai/Mooncake, FAST25-release/traces",
    licence="Apache-2.0",
    wall_clock=False,
    one_file=True,
    read=read_batches,
    marks=KNOWN,
    facts={"block_rule": "ceil", "block_scope": "trace"},
    pattern="*.jsonl*",
)
