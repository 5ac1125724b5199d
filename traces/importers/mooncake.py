"""Mooncake traces: JSON lines of timestamp (ms), input_length, output_length, hash_ids.

A hash id stands for the whole prompt up to the end of its 512-token block, and equal ids mean equal
prefixes anywhere in the trace. There is one for the last block too when it is only partly filled:
len(hash_ids) = ceil(input_length / 512). All ids are kept, so where `prefix_partial` is not 0 the
last hash stands for that many tokens. Ids of two traces must never meet on one tape.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokentape.traces.importers.reading import (
    LAST_NS,
    Record,
    line_blocks,
    plain_rows,
    records_of,
)
from tokentape.traces.importers.rows import (
    MAX_TOKENS,
    NO_VALUE,
    NS_PER_MS,
    Batch,
    Format,
    blocks,
    counted,
    where_true,
)

BLOCK_TOKENS = 512
TIME, INPUT, OUTPUT, HASHES = "timestamp", "input_length", "output_length", "hash_ids"
REQUIRED = (TIME, INPUT, OUTPUT)
KNOWN = (*REQUIRED, HASHES)
MAX_TIME_MS = LAST_NS // NS_PER_MS
PLAIN = pa.schema(
    [
        *((name, pa.int64()) for name in REQUIRED),
        pa.field(HASHES, pa.list_(pa.int64())),
    ]
)


def read_batches(path: Path) -> Iterator[Batch]:
    """The rows of a file, in file order; TapeError names the line that cannot be read."""
    row = 0
    for first, block in line_blocks(path):
        table = plain_rows(block, PLAIN)
        batch = None if table is None else _plain_batch(table, row)
        if batch is None:
            numbered = list(enumerate(records_of(path, first, block), row))
            for _, record in numbered:
                record.need(*REQUIRED)
            kept = [(number, r) for number, r in numbered if r.has(*REQUIRED)]
            batch = _batch(kept, dropped=len(numbered) - len(kept))
        row += len(batch.row) + sum(batch.dropped.values())
        yield batch


def _plain_batch(table: pa.Table, row: int) -> Batch | None:
    """A block of rows as the published traces have them; None where some value is out of range."""
    columns = {name: table[name].combine_chunks() for name in KNOWN}
    most = {TIME: MAX_TIME_MS, INPUT: MAX_TOKENS, OUTPUT: MAX_TOKENS}
    for name, limit in most.items():
        values = np.asarray(columns[name])
        if len(values) and (values.min() < 0 or values.max() > limit):
            return None
    ids = np.asarray(pc.list_flatten(columns[HASHES]))
    if len(ids) and ids.min() < 0:
        return None
    size = table.num_rows
    tokens = np.asarray(columns[INPUT])
    fits = np.asarray(pc.list_value_length(columns[HASHES])) == -(-tokens // BLOCK_TOKENS)
    mask = pa.array(fits)
    prefix = {
        "block_hashes": pc.if_else(mask, columns[HASHES], pa.scalar(None, pa.list_(pa.int64()))),
        "block_tokens": pa.array(np.full(size, BLOCK_TOKENS), pa.int32(), mask=~fits),
        "block_unit": where_true(mask, "token"),
        "block_scope": where_true(mask, "trace"),
        "prefix_partial": pa.array(tokens % BLOCK_TOKENS, pa.int32(), mask=~fits),
    }
    return Batch(
        np.asarray(columns[TIME]) * NS_PER_MS,
        row + np.arange(size, dtype=np.int64),
        {"input_tokens": columns[INPUT], "output_tokens": columns[OUTPUT], **prefix},
        notes={
            "rows_without_output": int(np.count_nonzero(np.asarray(columns[OUTPUT]) == 0)),
            "rows_without_prefix": int(np.count_nonzero(~fits)),
        },
    )


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
