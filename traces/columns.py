"""Rows to Arrow: dictionaries of column values in, one table with the tape's schema out.

Event lists stay flat buffers (`array`, `bytes`) on the way; no Python object is made per event.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tokentape.traces.content import CONTENT
from tokentape.traces.schema import REQUESTS, TELEMETRY, row_problem

_FLAT = {pa.int64(): np.int64, pa.uint32(): np.uint32, pa.uint16(): np.uint16, pa.uint8(): np.uint8}


def _flat_lists(values: Sequence[Any], type_: pa.ListType, dtype: Any) -> pa.Array:
    """A list column from buffers of one dtype; None stays NULL."""
    chunks = [None if v is None else np.asarray(_view(v), dtype=dtype) for v in values]
    sizes = np.array([0 if c is None else len(c) for c in chunks], dtype=np.int64)
    offsets = np.zeros(len(chunks) + 1, dtype=np.int32)
    np.cumsum(sizes, out=offsets[1:])
    kept = [c for c in chunks if c is not None]
    flat = np.concatenate(kept) if kept else np.empty(0, dtype=dtype)
    mask = pa.array([c is None for c in chunks]) if len(kept) < len(chunks) else None
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(flat, type_.value_type), type=type_, mask=mask
    )


def _view(value: Any) -> Any:
    return np.frombuffer(value, dtype=np.uint8) if isinstance(value, (bytes, bytearray)) else value


def _column(field: pa.Field, values: list[Any]) -> pa.Array:
    type_ = field.type
    if pa.types.is_list(type_) and type_.value_type in _FLAT:
        return _flat_lists(values, type_, _FLAT[type_.value_type])
    if type_ == pa.uuid():
        return pa.ExtensionArray.from_storage(type_, pa.array(values, pa.binary(16)))
    if pa.types.is_list(type_) and type_.value_type == pa.uuid():
        storage = pa.array(values, pa.list_(pa.binary(16)))
        ids = pa.ExtensionArray.from_storage(pa.uuid(), storage.values)
        return pa.ListArray.from_arrays(storage.offsets, ids, type=type_, mask=storage.is_null())
    return pa.array(values, type_)


def requests_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as a table, every column of the schema present, in order of arrival."""
    for row in rows:
        if (unknown := row_problem(row)) is not None:
            raise KeyError(f"{unknown} is no column of a tape")
    ordered = sorted(rows, key=lambda r: (r.get("arrival_ns") or 0, r["request_id"]))
    return pa.Table.from_arrays(
        [_column(field, [row.get(field.name) for row in ordered]) for field in REQUESTS],
        schema=REQUESTS,
    )


def content_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of bodies as a table."""
    return pa.Table.from_arrays(
        [_column(field, [row.get(field.name) for row in rows]) for field in CONTENT],
        schema=CONTENT,
    )


def telemetry_table(rows: list[tuple[int, int, str, str, str, float]]) -> pa.Table:
    """Telemetry samples as a table, one tuple per sample in the order of the schema."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(TELEMETRY)
    return pa.Table.from_arrays(
        [pa.array(list(c), f.type) for c, f in zip(columns, TELEMETRY, strict=True)],
        schema=TELEMETRY,
    )
