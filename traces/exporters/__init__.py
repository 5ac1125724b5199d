"""Tapes to the formats of other tools: `export_tape` is the way out, one file per family.

What a format cannot hold is said, what a tape lacks is not invented: a row that the format needs
more of than the tape knows is counted by reason. Start reading at rows.py.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokentape.traces.errors import TapeError, UsageError
from tokentape.traces.exporters import csv_table, mooncake, otlp, perfetto, weka
from tokentape.traces.exporters.rows import Exported, Window
from tokentape.traces.reader import Tape


@dataclass(frozen=True)
class OutFormat:
    """`write` puts a tape at a path, which is a folder where `folder` says so."""

    write: Callable[[Tape, Path, Window], Exported]
    folder: bool = False


FORMATS: dict[str, OutFormat] = {
    "agentic-mooncake": OutFormat(mooncake.write_agentic),
    "aiperf": OutFormat(mooncake.write_aiperf),
    "csv": OutFormat(csv_table.write),
    "dynamo": OutFormat(mooncake.write_agentic),  # the name that Dynamo's own users look for
    "guidellm": OutFormat(mooncake.write_guidellm),
    "mooncake": OutFormat(mooncake.write_mooncake),
    "otlp": OutFormat(otlp.write),
    "perfetto": OutFormat(perfetto.write),
    "weka": OutFormat(weka.write, folder=True),
}
EVERYTHING: Window = (None, None)


def export_tape(
    tape: Tape, form: str, out: Path, *, window: Window = EVERYTHING, force: bool = False
) -> Exported:
    """Writes a tape in another format; `window` is (from, to) in ns after the first arrival.

    The file, or folder, appears whole or not at all. Raises UsageError for an unknown format,
    TapeError where `out` exists and `force` is not given, or the tape has nothing to export.
    """
    known = FORMATS.get(form)
    if known is None:
        raise UsageError(f"{form}: unknown export format; known are {', '.join(sorted(FORMATS))}")
    if os.path.lexists(out) and not force:
        raise TapeError(f"{out}: exists; --force replaces it, or choose another --out")
    if out.is_dir() and (not known.folder or any(p.suffix != ".json" for p in out.iterdir())):
        raise TapeError(f"{out}: a folder with other things in it; choose another --out")
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        if known.folder:
            temporary.mkdir()
        done = known.write(tape, temporary, window)
        if done.written:
            _remove(out)
            temporary.rename(out)
    finally:
        with contextlib.suppress(OSError):
            _remove(temporary)
    if not done.written:
        why = ", ".join(f"{n} rows: {reason}" for reason, n in done.dropped.items())
        raise TapeError(f"{tape.path}: nothing to export ({why or 'no rows in this window'})")
    return done


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
