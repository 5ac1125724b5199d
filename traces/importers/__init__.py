"""Public traces to tapes: `import_trace` is the way in, one file per format reads that format.

Each file is read twice: first whole, to find every error and the first arrival before a tape is
made, then to write it; memory stays bounded. An importer must never guess a unit, drop a row
without counting it, or invent what the trace does not say. Start reading at rows.py.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tokentape.traces.errors import TapeError, UsageError
from tokentape.traces.importers import (
    agentic,
    azure,
    bailian,
    baseten,
    benches,
    burstgpt,
    dynamo,
    litellm,
    mooncake,
    otel,
    pcap,
    ragpulse,
    servegen,
    weka,
)
from tokentape.traces.importers.rows import Batch, Format, Survey, add_counts, rows_table, survey
from tokentape.traces.importers.sniffing import looks_like
from tokentape.traces.writer import TapeWriter

FORMATS: dict[str, Format] = {
    "agentic-mooncake": agentic.FORMAT,
    "aiperf": benches.AIPERF,
    "azure": azure.FORMAT,
    "bailian": bailian.FORMAT,
    "baseten": baseten.FORMAT,
    "burstgpt": burstgpt.FORMAT,
    "dynamo": dynamo.FORMAT,
    "litellm": litellm.FORMAT,
    "mooncake": mooncake.FORMAT,
    "otel": otel.FORMAT,
    "ragpulse": ragpulse.FORMAT,
    "servegen": servegen.FORMAT,
    "vllm-bench": benches.VLLM,
    "weka": weka.FORMAT,
}
PCAP = "pcap"  # no format of rows: traffic, which the wire code reads
NAMES = sorted([*FORMATS, PCAP])
SEGMENT_ROWS = 50_000  # at least, where the trace has as many; sorted by arrival within
SEGMENT_BYTES = 64 << 20


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
    seed: int | None = None,
    force: bool = False,
    command: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> ImportSummary:
    """Makes a tape of trace files, or of those in folders; `progress` is told the rows written.

    The tape's epoch is the first arrival in the trace: its date, or the trace's own zero.
    Raises UsageError for an unknown format or a seed where nothing is drawn, TapeError for a file
    that cannot be read whole (it names the line) or a tape that exists; there is no new tape then.
    """
    known = FORMATS.get(format)
    if known is None and format != PCAP:
        raise UsageError(f"{_unknown(format, files)}known are {', '.join(NAMES)}")
    if known is None:
        written, _ = pcap.import_packets(
            files, tape, force=force, command=command, progress=progress
        )
        return ImportSummary(written, written, {}, tape)
    if seed is not None and not known.seeded:
        raise UsageError(f"--seed {seed}: {format} is a record, nothing is drawn from it")
    read = partial(known.read, seed=seed or 0) if known.seeded else known.read
    surveys = _surveys(format, known, read, _files(known, files))
    facts = _facts(format, known, surveys) | ({"seed": seed or 0} if known.seeded else {})
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
        written = _write(writer, read, surveys, epoch_ns, progress)
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


def _unknown(name: str, files: Sequence[Path]) -> str:
    likely = next((found for path in files if (found := looks_like(path, FORMATS))), None)
    hint = f"{files[0]} looks like {likely}; " if likely else ""
    return f"{name}: unknown trace format; {hint}"


def _files(known: Format, given: Sequence[Path]) -> list[Path]:
    """The trace files among those given: folders are searched, companions are read beside."""
    found: list[Path] = []
    for path in given:
        inside = sorted(path.glob(known.pattern)) if path.is_dir() else [path]
        if not inside:
            raise TapeError(f"{path}: no {known.pattern} in this folder")
        found += inside
    beside = {other for path in found for other in known.companions(path)}
    found = [path for path in found if path not in beside]
    if not found or (known.one_file and len(found) > 1):
        few = "one file" if known.one_file else "at least one file"
        raise UsageError(f"give {few}, not {len(found)}; each makes a tape of its own")
    if len(set(found)) < len(found):
        raise UsageError("a file is given twice")
    return found


def _surveys(
    name: str, known: Format, read: Callable[[Path], Iterator[Batch]], files: list[Path]
) -> list[Survey]:
    found: list[Survey] = []
    for path in files:
        try:
            found.append(survey(path, known, read))
        except TapeError as error:
            likely = looks_like(path, FORMATS)
            if likely in {None, name}:
                raise
            raise TapeError(f"{error}; the file looks like {likely}") from error
    if not any(one.rows for one in found):
        read_rows = sum(one.read for one in found)
        raise TapeError(f"{files[0]}: no request in it ({read_rows} rows read)")
    return found


def _write(
    writer: TapeWriter,
    read: Callable[[Path], Iterator[Batch]],
    surveys: list[Survey],
    epoch_ns: int,
    progress: Callable[[int], None] | None,
) -> int:
    written = 0
    waiting: list[pa.Table] = []

    def seal() -> None:
        if waiting:
            table = pa.concat_tables(waiting)
            arrival_ns = np.asarray(table["arrival_ns"])
            if (arrival_ns[1:] < arrival_ns[:-1]).any():
                table = table.take(pa.array(np.argsort(arrival_ns, kind="stable")))
            waiting.clear()
            writer.append_table(table)

    for found in surveys:
        for batch in read(found.path):
            table = rows_table(batch, found.sha256, epoch_ns)
            if table.num_rows:
                waiting.append(table)
            written += table.num_rows
            if sum(t.num_rows for t in waiting) >= SEGMENT_ROWS or (
                sum(t.nbytes for t in waiting) >= SEGMENT_BYTES
            ):
                seal()
            if progress:
                progress(written)
    seal()
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
