"""Azure LLM inference traces: CSV with TIMESTAMP, ContextTokens, GeneratedTokens, found by name.

2023: CRLF, no newline at the end, naive UTC with 7 fractional digits. 2024: 6 digits and `+00:00`.
2025 (multimodal): one more column, NumImages. Times go from text to integer ns; they must never
pass through a float or through microseconds, which would drop a digit.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokentape.traces.importers import csv_text
from tokentape.traces.importers.csv_text import Cells
from tokentape.traces.importers.reading import missing_columns
from tokentape.traces.importers.rows import MAX_TOKENS, NO_VALUE, Batch, Format, Ints, counted

TIME, INPUT, OUTPUT, IMAGES = "TIMESTAMP", "ContextTokens", "GeneratedTokens", "NumImages"
REQUIRED = (TIME, INPUT, OUTPUT)
COUNTS = {INPUT: "input_tokens", OUTPUT: "output_tokens", IMAGES: "image_count"}
MOST = {INPUT: MAX_TOKENS, OUTPUT: MAX_TOKENS, IMAGES: 2**15 - 1}

_UTC = r"(Z|[+-]00:?00)$"
_TIME = r"^\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]00:?00)?$"


def read_batches(path: Path) -> Iterator[Batch]:
    """The rows of a file, in file order; TapeError names the line that cannot be read."""
    header = csv_text.header(path)
    missing_columns(path, REQUIRED, header)
    wanted = [*REQUIRED, *(name for name in (IMAGES,) if name in header)]
    for cells in csv_text.cells(path, wanted):
        yield _batch(cells, wanted)


def _batch(cells: Cells, wanted: list[str]) -> Batch:
    kept, dropped = cells.filled(wanted)
    counts = {COUNTS[n]: kept.counts(n, MOST[n]) for n in wanted if n != TIME}
    silent = int(pc.sum(pc.equal(counts["output_tokens"], 0)).as_py() or 0)
    return Batch(
        _times_ns(kept),
        kept.row,
        counts,
        dropped=counted(**{NO_VALUE: dropped}),
        notes={"rows_without_output": silent},
    )


def _times_ns(cells: Cells) -> Ints:
    """Text to integer ns since 1970; Arrow reads nine digits without rounding."""
    texts = cells.text[TIME]
    cells.refuse(TIME, pc.match_substring_regex(texts, _TIME), "not a UTC time")
    naive = pc.replace_substring_regex(texts, _UTC, "")
    try:
        times = naive.cast(pa.timestamp("ns"))
    except pa.ArrowInvalid:
        cells.refuse(TIME, pa.array([_is_time(text) for text in naive]), "no such time")
        raise
    return np.asarray(times.cast(pa.int64()), dtype=np.int64)


def _is_time(text: pa.Scalar) -> bool:
    try:
        text.cast(pa.timestamp("ns"))
    except pa.ArrowInvalid:
        return False
    return True


FORMAT = Format(
    origin="Azure/AzurePublicDataset, AzureLLMInferenceTrace",
    licence="CC-BY 4.0: name the origin where results are published",
    wall_clock=True,
    one_file=False,
    read=read_batches,
    marks=REQUIRED,
    pattern="*.csv*",
)
