"""Baseten traces: Parquet with one completion a row, times in unix ms, as AIPerf reads them.

Only the columns named here are read; prompts and outputs stay in the file. Block hashes are kept
where their number fits the row's block size, for full blocks only or for a last part block too.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokentape.traces.errors import TapeError
from tokentape.traces.importers.reading import missing_columns
from tokentape.traces.importers.rows import (
    MAX_TOKENS,
    NO_VALUE,
    NS_PER_MS,
    Batch,
    Format,
    Ints,
    counted,
    where_true,
)
from tokentape.traces.importers.sessions import Sessions

TIME, INPUT, OUTPUT = "timestamp_start_unix_ms", "input_tokens", "output_tokens"
REQUIRED = (TIME, INPUT, OUTPUT)
HASHES, BLOCK, SESSION = "total_hashes", "block_size", "provided_session_id"
TTFT, E2E, CANCELED = "duration_ttft_ms", "duration_e2e_ms", "request_canceled"
CACHED, MODEL, RATIO = "cached_tokens_reference", "model_name", "speculation_ratio"
OPTIONAL = (HASHES, BLOCK, SESSION, TTFT, E2E, CANCELED, CACHED, MODEL, RATIO)
LAST_MS = (2**63 - 1) // NS_PER_MS // 2
BATCH_ROWS = 50_000


def read_batches(path: Path) -> Iterator[Batch]:
    """The rows of a file, in file order; TapeError names the row that cannot be read."""
    sessions = Sessions()
    first = 0
    try:
        with pq.ParquetFile(path) as file:
            found = file.schema_arrow.names
            missing_columns(path, REQUIRED, found)
            wanted = [*REQUIRED, *(name for name in OPTIONAL if name in found)]
            for records in file.iter_batches(BATCH_ROWS, columns=wanted):
                yield _batch(Columns(path, records, first), sessions)
                first += records.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        why = str(error).splitlines()[0][:160]
        raise TapeError(f"{path}: not a Parquet file that can be read ({why})") from error


class Columns:
    """Columns of a batch by name; those that the file lacks are NULL."""

    def __init__(self, path: Path, records: pa.RecordBatch, first_row: int) -> None:
        self.path = path
        self.records = records
        self.row = first_row + np.arange(records.num_rows, dtype=np.int64)

    def filled(self) -> tuple["Columns", int]:
        """The rows that have all that is required, and how many have not."""
        present = np.all([np.asarray(self.records[n].is_valid()) for n in REQUIRED], axis=0)
        kept = Columns(self.path, self.records.filter(pa.array(present)), 0)
        kept.row = self.row[present]
        return kept, int(np.count_nonzero(~present))

    def whole(self, name: str, most: int = MAX_TOKENS) -> pa.Array:
        """Whole numbers from 0 to `most`, int64."""
        if name not in self.records.schema.names:
            return pa.nulls(self.records.num_rows, pa.int64())
        column = self.records[name]
        kind = column.type
        whole = pa.types.is_integer(kind) or pa.types.is_boolean(kind)
        if not whole and pa.types.is_floating(kind):  # an integer column with holes, from pandas
            whole = bool(pc.all(pc.equal(column, pc.floor(column))).as_py() is not False)
        if not whole:
            raise TapeError(f"{self.path}: {name} is of type {kind}, not whole numbers")
        low = pc.min(column).as_py()
        high = pc.max(column).as_py()
        if low is not None and (low < 0 or high > most):
            odd = pc.or_(pc.less(column, 0), pc.greater(column, most))
            at = int(np.flatnonzero(np.asarray(pc.fill_null(odd, fill_value=False)))[0])
            value = column[at].as_py()
            raise TapeError(
                f"{self.path}, row {self.row[at]}: {name} is {value}, not a whole number up to "
                f"{most}; correct or remove the row"
            )
        return column.cast(pa.int64())

    def text(self, name: str) -> pa.Array:
        """Names, numbers written out."""
        if name not in self.records.schema.names:
            return pa.nulls(self.records.num_rows, pa.string())
        return self.records[name].cast(pa.string())


def _batch(columns: Columns, sessions: Sessions) -> Batch:
    kept, dropped = columns.filled()
    time_ns = np.asarray(kept.whole(TIME, LAST_MS)) * NS_PER_MS
    size = len(time_ns)
    start = pa.array(time_ns)
    end_ns = pc.add(start, pc.multiply(kept.whole(E2E, LAST_MS), NS_PER_MS))
    canceled = pc.fill_null(pc.equal(kept.whole(CANCELED, 1), 1), fill_value=False)
    output_tokens = kept.whole(OUTPUT)
    prefix = _prefix(kept)
    linked = sessions.of_batch(
        kept.text(SESSION), time_ns, np.asarray(pc.fill_null(end_ns, -1)), kept.row
    )
    found: dict[str, Any] = {
        "input_tokens": kept.whole(INPUT),
        "output_tokens": output_tokens,
        "cached_tokens": kept.whole(CACHED),
        "model": kept.text(MODEL),
        "first_content_ns": pc.add(start, pc.multiply(kept.whole(TTFT, LAST_MS), NS_PER_MS)),
        "end_ns": end_ns,
        "outcome": pc.if_else(
            canceled, "client_abort", where_true(pc.greater(output_tokens, 0), "ok")
        ),
        "extra": _ratio(kept),
    }
    notes = {
        "rows_without_output": int(pc.sum(pc.equal(output_tokens, 0)).as_py() or 0),
        "rows_without_prefix": size - int(pc.sum(prefix["block_hashes"].is_valid()).as_py() or 0),
        "canceled": int(pc.sum(canceled).as_py() or 0),
    }
    return Batch(
        time_ns,
        kept.row,
        found | prefix | linked.columns,
        counted(**{NO_VALUE: dropped}),
        notes,
        linked.parents,
    )


def _prefix(kept: Columns) -> dict[str, pa.Array]:
    size = len(kept.row)
    if HASHES not in kept.records.schema.names or BLOCK not in kept.records.schema.names:
        return {"block_hashes": pa.nulls(size, pa.list_(pa.int64()))}
    block = np.asarray(pc.fill_null(kept.whole(BLOCK), 0))
    tokens = np.asarray(kept.whole(INPUT))
    hashes = kept.records[HASHES]
    sizes = np.asarray(pc.fill_null(pc.list_value_length(hashes), -1))
    safe = np.maximum(block, 1)
    fits = (block > 0) & ((sizes == tokens // safe) | (sizes == -(-tokens // safe)))
    mask = pa.array(fits)
    return {
        "block_hashes": pc.if_else(mask, _signed(hashes), pa.scalar(None, pa.list_(pa.int64()))),
        "block_tokens": pa.array(block, mask=~fits),
        "block_unit": where_true(mask, "token"),
        "block_scope": where_true(mask, "trace"),
        "prefix_partial": pa.array(tokens % safe, mask=~fits),
    }


def _signed(hashes: pa.Array) -> pa.Array:
    """Lists of 64-bit ids, unsigned ones by their bits."""
    values = hashes.values
    if values.type == pa.uint64():
        values = values.view(pa.int64())
    return pa.ListArray.from_arrays(
        hashes.offsets.cast(pa.int32()), values.cast(pa.int64()), mask=hashes.is_null()
    )


def _ratio(kept: Columns) -> pa.Array:
    if RATIO not in kept.records.schema.names:
        return pa.nulls(len(kept.row), pa.string())
    said: Ints = kept.records[RATIO].to_pylist()
    return pa.array(
        [None if one is None else f'{{"{RATIO}": {float(one)!r}}}' for one in said], pa.string()
    )


FORMAT = Format(
    origin="Baseten completion traces",
    licence="the user's own capture",
    wall_clock=True,
    one_file=False,
    read=read_batches,
    marks=REQUIRED,
    facts={
        "block_rule": "as the row has it: full blocks, or a last part block too",
        "block_scope": "trace",
        "parents": "by time, within a session",
    },
    pattern="*.parquet",
)
