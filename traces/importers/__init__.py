"""Public traces to tapes: `import_trace` is the way in, one file per format reads that format.

Each file is read twice: first whole, to find every error and the first arrival before a tape is
made, then to write it; memory stays bounded. An importer must never guess a unit, drop a row
without counting it, or invent what the trace does not say. Start reading at rows.py.
"""

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokentape.traces.errors import TapeError, UsageError
from tokentape.traces.importers import azure, mooncake
from tokentape.traces.importers.rows import Format, Survey, add_counts, rows_table, survey
from tokentape.traces.writer import TapeWriter

FORMATS: dict[str, Format] = {"azure": azure.FORMAT, "mooncake": mooncake.FORMAT}


@dataclass(frozen=True)
class ImportSummary:
    """read = written + the sum of dropped, which is by reason."""

    read: int
    written: int
    dropped: dict[str, int]
    tape: Path


def import_trace(
    format: str,  # noqa: A002 - the word of the command line
    files: Sequence[Path],
    tape: Path,
    *,
    force: bool = False,
    command: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> ImportSummary:
    """Makes a tape of trace files; `progress` is told the number of rows written so far.

    The tape's epoch is the first arrival in the trace: its date, or the trace's own zero.
    Raises UsageError for an unknown format, TapeError for a file that cannot be read whole (it
    names the line) or a tape that exists; there is no new tape then.
    """
    known = FORMATS.get(format)
    if known is None:
        raise UsageError(f"{format}: unknown trace format; known are {', '.join(sorted(FORMATS))}")
    if not files or (known.one_file and len(files) > 1):
        few = "one file" if known.one_file else "at least one file"
        raise UsageError(f"{format}: give {few}, not {len(files)}; each makes a tape of its own")
    surveys = [survey(path, known.read) for path in files]
    facts = _facts(format, known, surveys)
    epoch_ns = min(s.first_ns for s in surveys if s.first_ns is not None)
    writer = TapeWriter.create(
        tape,
        role="import",
        command=list(command),
        options={"format": format, "files": [str(path) for path in files]},
        facts=facts,
        wall_epoch_unix_ns=epoch_ns,
        force=force,
    )
    try:
        written = _write(writer, known, surveys, epoch_ns, progress)
    except BaseException as error:
        with contextlib.suppress(OSError):
            writer.close()
        shutil.rmtree(tape, ignore_errors=True)  # half a trace must not pass for the whole
        if isinstance(error, OSError):
            raise TapeError(
                f"{tape}: cannot be written ({error.strerror}); no tape made"
            ) from error
        raise
    writer.close()
    source = facts["source"]
    return ImportSummary(source["read"], written, source["dropped"], tape)


def _write(
    writer: TapeWriter,
    known: Format,
    surveys: list[Survey],
    epoch_ns: int,
    progress: Callable[[int], None] | None,
) -> int:
    written = 0
    for found in surveys:
        for batch in known.read(found.path):
            table = rows_table(batch, found.sha256, epoch_ns)
            if table.num_rows:
                writer.append_table(table)
            written += table.num_rows
            if progress:
                progress(written)
    expected = sum(found.rows for found in surveys)
    if written != expected:
        raise TapeError(f"{written} rows, {expected} a moment ago: a file changed; import it again")
    return written


def _facts(name: str, known: Format, surveys: list[Survey]) -> dict[str, Any]:
    dropped: dict[str, int] = {}
    for found in surveys:
        add_counts(dropped, found.dropped)
    resolutions = [s.resolution_ns for s in surveys if s.resolution_ns is not None]
    return {
        "arrival_resolution_ns": min(resolutions, default=None),
        "source": {
            "format": name,
            "origin": known.origin,
            "licence": known.licence,
            "wall_epoch_known": known.wall_clock,
            "read": sum(found.read for found in surveys),
            "written": sum(found.rows for found in surveys),
            "dropped": dropped,
            "files": [found.facts() for found in surveys],
            **known.facts,
        },
    }
