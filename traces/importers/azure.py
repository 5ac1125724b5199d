"""Azure LLM inference traces: CSV with TIMESTAMP, ContextTokens, GeneratedTokens, found by name.

2023: CRLF, no newline at the end, naive UTC with 7 fractional digits. 2024: 6 digits and `+00:00`.
2025 (multimodal): one more column, NumImages. Times go from text to integer ns; they must never
pass through a float or through microseconds, which would drop a digit.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from tokentape.traces.errors import TapeError
from tokentape.traces.importers.rows import (
    MAX_TOKENS,
    NO_VALUE,
    Batch,
    Format,
    Ints,
    missing_columns,
    open_trace,
)

TIME, INPUT, OUTPUT, IMAGES = "TIMESTAMP", "ContextTokens", "GeneratedTokens", "NumImages"
REQUIRED = (TIME, INPUT, OUTPUT)
COUNTS = {INPUT: "input_tokens", OUTPUT: "output_tokens", IMAGES: "image_count"}
MOST = {INPUT: MAX_TOKENS, OUTPUT: MAX_TOKENS, IMAGES: 2**15 - 1}
BLOCK_BYTES = 4 << 20  # of text: about 100,000 rows

_UTC = r"(Z|[+-]00:?00)$"
_TIME = r"^\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]00:?00)?$"
_COUNT = r"^\d{1,10}$"


def read_batches(path: Path) -> Iterator[Batch]:
    """The rows of a file, in file order; TapeError names the line that cannot be read."""
    header = _header(path)
    missing_columns(path, REQUIRED, header)
    wanted = [*REQUIRED, *(name for name in (IMAGES,) if name in header)]
    first_row = 0
    for table in _records(path, wanted):
        yield _batch(path, table, first_row)
        first_row += table.num_rows


def _header(path: Path) -> list[str]:
    with open_trace(path) as file:
        line = file.readline(1 << 16).decode("utf-8-sig", errors="replace")
    return next(csv.reader([line.rstrip("\r\n")]), [])


def _records(path: Path, wanted: list[str]) -> Iterator[pa.RecordBatch]:
    """The wanted columns as text. Arrow skips blank lines; `_line_of` knows that."""
    broken: list[Any] = []

    def stop_at(row: Any) -> str:
        broken.append(row)
        return "error"

    as_text = dict.fromkeys(wanted, pa.string())
    with open_trace(path) as file:
        try:
            yield from pa_csv.open_csv(
                file,
                pa_csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
                pa_csv.ParseOptions(invalid_row_handler=stop_at),
                pa_csv.ConvertOptions(column_types=as_text, include_columns=wanted),
            )
        except pa.ArrowInvalid as error:
            if not broken:
                raise TapeError(f"{path}: not a CSV file ({str(error).splitlines()[0]})") from error
            raise TapeError(
                f"{path}, line {_line_of(path, broken[0].number - 2)}: "
                f"{broken[0].actual_columns} fields where the header has "
                f"{broken[0].expected_columns} (cut off?); fetch the file again or remove the line"
            ) from None


def _batch(path: Path, records: pa.RecordBatch, first_row: int) -> Batch:
    texts = {n: pc.utf8_trim_whitespace(records[n]) for n in records.schema.names}
    present = np.all([np.asarray(pc.not_equal(texts[name], "")) for name in texts], axis=0)
    row = first_row + np.flatnonzero(present)
    texts = {name: column.filter(pa.array(present)) for name, column in texts.items()}
    counts = {COUNTS[n]: _counts(path, n, texts[n], row) for n in texts if n != TIME}
    time_ns = _times_ns(path, texts[TIME], row)
    dropped = int(np.count_nonzero(~present))
    silent = int(pc.sum(pc.equal(counts["output_tokens"], 0)).as_py() or 0)
    return Batch(
        time_ns,
        row,
        counts,
        dropped={NO_VALUE: dropped} if dropped else {},
        notes={"rows_without_output": silent},
    )


def _times_ns(path: Path, texts: pa.Array, row: Ints) -> Ints:
    """Text to integer ns since 1970; Arrow reads nine digits without rounding."""
    good = pc.match_substring_regex(texts, _TIME)
    _refuse(path, TIME, texts, good, row, "not a UTC time")
    naive = pc.replace_substring_regex(texts, _UTC, "")
    try:
        times = naive.cast(pa.timestamp("ns"))
    except pa.ArrowInvalid:
        good = pa.array([_is_time(text) for text in naive])
        _refuse(path, TIME, texts, good, row, "no such time")
        raise
    return np.asarray(times.cast(pa.int64()), dtype=np.int64)


def _is_time(text: pa.Scalar) -> bool:
    try:
        text.cast(pa.timestamp("ns"))
    except pa.ArrowInvalid:
        return False
    return True


def _counts(path: Path, name: str, texts: pa.Array, row: Ints) -> pa.Array:
    good = pc.match_substring_regex(texts, _COUNT)
    _refuse(path, name, texts, good, row, "not a whole number")
    numbers = texts.cast(pa.int64())
    _refuse(path, name, texts, pc.less_equal(numbers, MOST[name]), row, "too large")
    return numbers


def _refuse(path: Path, name: str, texts: pa.Array, good: pa.Array, row: Ints, why: str) -> None:
    """TapeError for the first value that is not good."""
    bad = np.flatnonzero(~np.asarray(good, dtype=bool))
    if len(bad):
        line = _line_of(path, int(row[bad[0]]))
        value = texts[int(bad[0])].as_py()
        raise TapeError(
            f"{path}, line {line}: {name} is {value!r}, {why}; correct or remove the line"
        )


def _line_of(path: Path, row: int) -> int:
    """Line number of a data row: the header is the first line that is not blank."""
    with open_trace(path) as file:
        filled = (number for number, line in enumerate(file, 1) if line.strip())
        return next(number for index, number in enumerate(filled) if index == row + 1)


FORMAT = Format(
    origin="Azure/AzurePublicDataset, AzureLLMInferenceTrace",
    licence="CC-BY 4.0: name the origin where results are published",
    wall_clock=True,
    one_file=False,
    read=read_batches,
)
