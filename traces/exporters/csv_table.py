"""CSV: every scalar column of the tape that says anything, one request a line, for spreadsheets.

Lists of names become one cell with semicolons; lists of events stay on the tape, which any Parquet
reader opens. Segment by segment, each in order of arrival, so memory does not grow with the tape.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from tokentape.traces.exporters.rows import Exported, Window
from tokentape.traces.reader import Tape
from tokentape.traces.schema import REQUESTS

WORD_LISTS = {f.name for f in REQUESTS if f.type == pa.list_(pa.string())}
ID_LISTS = {f.name for f in REQUESTS if f.type == pa.list_(pa.uuid())}


def write(tape: Tape, out: Path, window: Window) -> Exported:
    """The header names the columns as FORMAT.md does; an empty cell is not known."""
    names = _telling(tape)
    schema = pa.schema([_flat(REQUESTS.field(name)) for name in names])
    done = Exported()
    first_ns = _first_ns(tape)
    with pa_csv.CSVWriter(out, schema) as writer:
        for segment in tape.segments:
            table = _inside(_read(segment.path, names), first_ns, window)
            done.read += table.num_rows
            done.written += table.num_rows
            table = table.take(pc.sort_indices(table["arrival_ns"]))
            columns = [_cells(table[name]) for name in names]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
    lists = [f.name for f in REQUESTS if pa.types.is_list(f.type) and f.name not in names]
    done.notes.append(f"lists of numbers stay on the tape: {', '.join(lists)}")
    return done


def _telling(tape: Tape) -> list[str]:
    """Columns with a value in some row, by the footers' statistics."""
    found: set[str] = {"request_id", "arrival_ns"}
    for segment in tape.segments:
        parquet = pq.read_metadata(segment.path)
        for group in range(parquet.num_row_groups):
            for column in range(parquet.num_columns):
                chunk = parquet.row_group(group).column(column)
                counted = chunk.statistics is not None and chunk.statistics.has_null_count
                if not counted or chunk.statistics.null_count < chunk.num_values:
                    found.add(chunk.path_in_schema.split(".")[0])
    scalar = {f.name for f in REQUESTS if not pa.types.is_list(f.type)}
    return [n for n in REQUESTS.names if n in found and n in scalar | WORD_LISTS | ID_LISTS]


def _flat(field: pa.Field) -> pa.Field:
    numbers = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
    plain = numbers or field.type == pa.bool_()
    return pa.field(field.name, field.type if plain else pa.string())


def _read(path: Path, names: list[str]) -> pa.Table:
    with pq.ParquetFile(path) as parquet:
        present = [n for n in names if n in parquet.schema_arrow.names]
        table = parquet.read(present)
    for name in names:
        if name not in present:
            table = table.append_column(name, pa.nulls(table.num_rows, REQUESTS.field(name).type))
    return table


def _first_ns(tape: Tape) -> int:
    lowest = [pc.min(_read(s.path, ["arrival_ns"])["arrival_ns"]).as_py() for s in tape.segments]
    return min((one for one in lowest if one is not None), default=0)


def _inside(table: pa.Table, first_ns: int, window: Window) -> pa.Table:
    start, end = window
    if start is not None:
        table = table.filter(pc.greater_equal(table["arrival_ns"], first_ns + start))
    return table if end is None else table.filter(pc.less(table["arrival_ns"], first_ns + end))


def _cells(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if column.type == pa.uuid() or pa.types.is_list(column.type):
        texts = [
            None if v is None else ";".join(map(str, v)) if isinstance(v, list) else str(v)
            for v in column.to_pylist()
        ]
        return pa.chunked_array([pa.array(texts, pa.string())])
    return column
