"""BurstGPT traces 1, 2 and 3: CSV, columns found by name, for 3 has two more of them in the middle.

Times are seconds from a local midnight, so the tape's epoch is no date. `Response tokens` of 0 is a
request that failed, says its README; how is not said. `Elapsed time` is the whole request, never
the time to the first token. Only rows of a conversation have a `Session ID`; a turn waits for the
turns of its session that had ended when it came.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokentape.traces.importers import csv_text
from tokentape.traces.importers.csv_text import Cells
from tokentape.traces.importers.reading import missing_columns
from tokentape.traces.importers.rows import NO_VALUE, Batch, Format, counted
from tokentape.traces.importers.sessions import Sessions

TIME, MODEL, INPUT, OUTPUT = "Timestamp", "Model", "Request tokens", "Response tokens"
TOTAL, KIND, SESSION, ELAPSED = "Total tokens", "Log Type", "Session ID", "Elapsed time"
REQUIRED = (TIME, INPUT, OUTPUT)
OPTIONAL = (MODEL, TOTAL, KIND, SESSION, ELAPSED)


def read_batches(path: Path) -> Iterator[Batch]:
    """The rows of a file, in file order; TapeError names the line that cannot be read."""
    header = csv_text.header(path)
    missing_columns(path, REQUIRED, header)
    wanted = [*REQUIRED, *(name for name in OPTIONAL if name in header)]
    sessions = Sessions()
    for cells in csv_text.cells(path, wanted):
        yield _batch(cells, sessions)


def _batch(cells: Cells, sessions: Sessions) -> Batch:
    kept, dropped = cells.filled(REQUIRED)
    time_ns = kept.seconds_ns(TIME)
    input_tokens, output_tokens = kept.counts(INPUT), kept.counts(OUTPUT)
    failed = pc.equal(output_tokens, 0)
    none = pa.scalar(None, pa.string())
    columns = {
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "operation": pa.repeat(pa.scalar("chat"), len(time_ns)),
        "outcome": pc.if_else(failed, "http_error", "ok"),
        "error_type": pc.if_else(failed, "unspecified", none),
    }
    notes = {"rows_without_output": int(pc.sum(failed).as_py() or 0)}
    if MODEL in kept.text:
        columns["model_requested"] = kept.text[MODEL]
    if KIND in kept.text:
        columns["extra"] = _kinds(kept.text[KIND])
    if TOTAL in kept.text:
        differs = pc.not_equal(kept.counts(TOTAL), pc.add(input_tokens, output_tokens))
        notes["rows_with_another_total"] = int(pc.sum(differs).as_py() or 0)
    end_ns = None
    if ELAPSED in kept.text:
        elapsed_ns = kept.seconds_ns(ELAPSED)
        end_ns = np.where(elapsed_ns < 0, -1, time_ns + elapsed_ns)
        columns["end_ns"] = pa.array(end_ns, mask=elapsed_ns < 0)
    parents = None
    if SESSION in kept.text:
        found = sessions.of_batch(kept.text[SESSION], time_ns, end_ns, kept.row)
        columns |= found.columns
        parents = found.parents
    return Batch(time_ns, kept.row, columns, counted(**{NO_VALUE: dropped}), notes, parents)


def _kinds(kinds: pa.Array) -> pa.Array:
    coded = kinds.dictionary_encode()
    said = [json.dumps({"log_type": kind}) for kind in coded.dictionary.to_pylist()]
    return pa.array(said, pa.string()).take(coded.indices)


FORMAT = Format(
    origin="HPMLL/BurstGPT",
    licence="CC-BY 4.0: name the origin where results are published",
    wall_clock=False,
    one_file=True,
    read=read_batches,
    marks=(TIME, INPUT, OUTPUT, TOTAL),
    facts={"parents": "turns of the session that had ended, by Elapsed time"},
    pattern="BurstGPT*.csv*",
)
