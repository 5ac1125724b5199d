"""Mooncake traces: JSON lines of timestamp (ms), input_length, output_length, hash_ids.

A hash id stands for the whole prompt up to the end of its 512-token block, and equal ids mean equal
prefixes anywhere in the trace. There is one for the last block too when it is only partly filled:
len(hash_ids) = ceil(input_length / 512). All ids are kept, so where `prefix_partial` is not 0 the
last hash stands for that many tokens. Ids of two traces must never meet on one tape.
"""

import json
from collections.abc import Iterator
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tokentape.traces.errors import TapeError
from tokentape.traces.importers.rows import (
    MAX_TOKENS,
    NO_VALUE,
    NS_PER_MS,
    Batch,
    Format,
    missing_columns,
    open_trace,
)

BLOCK_TOKENS = 512
TIME, INPUT, OUTPUT, HASHES = "timestamp", "input_length", "output_length", "hash_ids"
REQUIRED = (TIME, INPUT, OUTPUT)
KNOWN = (*REQUIRED, HASHES)
BATCH_ROWS = 20_000
MAX_TEXT = 64  # characters; a longer value may be a prompt, of which only the size is kept
MAX_TIME_MS = (2**63 - 1) // NS_PER_MS

Record = dict[str, Any]


def read_batches(path: Path) -> Iterator[Batch]:
    """The rows of a file, in file order; TapeError names the line that cannot be read."""
    for numbered in batched(enumerate(_records(path)), BATCH_ROWS):
        kept = [(row, r) for row, r in numbered if all(r[name] is not None for name in REQUIRED)]
        yield _batch(kept, dropped=len(numbered) - len(kept))


def _batch(kept: list[tuple[int, Record]], dropped: int) -> Batch:
    records = [record for _, record in kept]
    input_tokens = [record[INPUT] for record in records]
    hashes = [_block_hashes(record) for record in records]
    known = np.array([h is not None for h in hashes], dtype=bool)
    partial = [n % BLOCK_TOKENS for n in input_tokens]
    size = len(records)
    columns = {
        "input_tokens": pa.array(input_tokens, pa.int64()),
        "output_tokens": pa.array([record[OUTPUT] for record in records], pa.int64()),
        "block_hashes": pa.array(hashes, pa.list_(pa.int64())),
        "block_tokens": pa.array(np.full(size, BLOCK_TOKENS), pa.int32(), mask=~known),
        "block_unit": pa.array(np.full(size, "token", dtype=object), pa.string(), mask=~known),
        "block_scope": pa.array(np.full(size, "trace", dtype=object), pa.string(), mask=~known),
        "prefix_partial": pa.array(np.array(partial, dtype=np.int64), pa.int32(), mask=~known),
        "extra": pa.array([_extra(record) for record in records], pa.string()),
    }
    return Batch(
        np.array([record[TIME] for record in records], dtype=np.int64) * NS_PER_MS,
        np.array([row for row, _ in kept], dtype=np.int64),
        columns,
        dropped={NO_VALUE: dropped} if dropped else {},
        notes={
            "rows_without_output": sum(record[OUTPUT] == 0 for record in records),
            "rows_without_prefix": int(np.count_nonzero(~known)),
        },
    )


def _block_hashes(record: Record) -> list[int] | None:
    """The ids as signed 64-bit numbers; None where there are none or they break the ceil rule."""
    ids = record.get(HASHES)
    if ids is None or len(ids) != -(-record[INPUT] // BLOCK_TOKENS):
        return None
    return [i if i < 1 << 63 else i - (1 << 64) for i in ids]


def _extra(record: Record) -> str | None:
    """Keys that this importer does not know: short scalars as they are, of others the size."""
    kept: Record = {}
    for name, value in record.items():
        if name in KNOWN:
            continue
        short_text = isinstance(value, str) and len(value) <= MAX_TEXT
        if short_text or value is None or isinstance(value, (bool, int, float)):
            kept[name] = value
        else:
            kept[f"{name}_json_bytes"] = len(json.dumps(value, ensure_ascii=False).encode())
    return json.dumps(kept) if kept else None


def _records(path: Path) -> Iterator[Record]:
    with open_trace(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _record(path, number, line)


def _record(path: Path, number: int, line: bytes) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise TapeError(
            f"{path}, line {number}: not JSON ({error}; cut off?); "
            "fetch the file again or remove the line"
        ) from None
    if not isinstance(record, dict):
        raise TapeError(f"{path}, line {number}: not a JSON object; correct or remove the line")
    missing_columns(Path(f"{path}, line {number}"), REQUIRED, list(record))
    for name, most in ((TIME, MAX_TIME_MS), (INPUT, MAX_TOKENS), (OUTPUT, MAX_TOKENS)):
        if record[name] is not None and not _is_count(record[name], most):
            _refuse(path, number, name, record[name], f"not a whole number up to {most}")
    ids = record.get(HASHES)
    if ids is not None and not (
        isinstance(ids, list) and all(_is_count(i, (1 << 64) - 1) for i in ids)
    ):
        _refuse(path, number, HASHES, ids, "not a list of block ids")
    return record


def _is_count(value: object, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _refuse(path: Path, number: int, name: str, value: object, why: str) -> None:
    shown = json.dumps(value)[:40]
    raise TapeError(f"{path}, line {number}: {name} is {shown}, {why}; correct or remove the line")


FORMAT = Format(
    origin="kvcache-ai/Mooncake, FAST25-release/traces",
    licence="Apache-2.0",
    wall_clock=False,
    one_file=True,
    read=read_batches,
    facts={"block_rule": "ceil", "block_scope": "trace"},
)
