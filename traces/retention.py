"""How long a capture's tape keeps what is sealed: by age, and by the room that the tape may take.

Whole segments go, oldest first, and tape.json says how many rows went: seen = rows + deleted + what
was sampled out + losses. A process of its own, so that who captures needs no Parquet; a pass that
dies half-way is finished by the next one, and nothing is counted twice.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tokentape.traces import content
from tokentape.traces import facts as tape_facts
from tokentape.traces.clock import wall_unix_ns
from tokentape.traces.identity import whose

# A journal may repeat rows that were sealed a moment ago, and asks their segments which those are.
YOUNGEST_S = 180.0


@dataclass(frozen=True)
class Limits:
    """What may stay: sealed at most `retain_s` ago, `max_bytes` in all; None for no limit."""

    retain_s: float | None = None
    max_bytes: int | None = None


@dataclass(frozen=True)
class Sealed:
    """A sealed file; its age is that of its last change."""

    path: Path
    bytes: int
    sealed_unix_s: float


@dataclass(frozen=True)
class Pruned:
    """What a pass deleted."""

    files: int = 0
    rows: int = 0
    bytes: int = 0


def prune(tape: Path, limits: Limits, now_unix_s: float) -> Pruned:
    """Delete what is over the limits; OSError when a file cannot be deleted, TapeError for no tape.

    The tape may be written meanwhile. What is younger than YOUNGEST_S stays in any case.
    """
    _finish(tape)
    doomed = over(_sealed(tape), limits, now_unix_s, _other_bytes(tape))
    if not doomed:
        return Pruned()
    rows: dict[str, int] = {}
    for one in doomed:
        if "requests" in one.path.relative_to(tape).parts:
            name, count = _rows_of(one.path)
            rows[name] = rows.get(name, 0) + count
    with tape_facts.changing(tape) as facts:
        kept = facts.get("deleted", {})
        facts["deleted"] = kept | {name: kept.get(name, 0) + n for name, n in rows.items()}
        facts["deleting"] = [str(one.path.relative_to(tape)) for one in doomed]
    _finish(tape)
    return Pruned(len(doomed), sum(rows.values()), sum(one.bytes for one in doomed))


def over(
    sealed: list[Sealed], limits: Limits, now_unix_s: float, other_bytes: int = 0
) -> list[Sealed]:
    """Those to delete, oldest first; `other_bytes` of the tape are in files that never go."""
    left_bytes = other_bytes + sum(one.bytes for one in sealed)
    doomed = []
    for one in sorted(sealed, key=lambda s: (s.sealed_unix_s, s.path)):
        age_s = now_unix_s - one.sealed_unix_s
        too_old = limits.retain_s is not None and age_s > limits.retain_s
        too_much = limits.max_bytes is not None and left_bytes > limits.max_bytes
        if age_s < YOUNGEST_S or not (too_old or too_much):
            break  # all that follow are younger
        doomed.append(one)
        left_bytes -= one.bytes
    return doomed


def _finish(tape: Path) -> None:
    """Delete what is on the books as deleted."""
    names = tape_facts.read_facts(tape).get("deleting")
    if not names:
        return
    for name in names:
        (tape / name).unlink(missing_ok=True)
    for folder in {(tape / name).parent for name in names}:
        _remove_empty(folder, tape)
    with tape_facts.changing(tape) as facts:
        facts.pop("deleting", None)


def _remove_empty(folder: Path, tape: Path) -> None:
    """Folders of days and hours in which nothing is left; a writer makes its own again."""
    while folder.parent != tape:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


def _sealed(tape: Path) -> list[Sealed]:
    found = []
    for room in ("requests", "telemetry", content.FOLDER):
        for path in (tape / room).glob("**/*.parquet"):
            about = path.stat()
            found.append(Sealed(path, about.st_size, about.st_mtime))
    return found


def _other_bytes(tape: Path) -> int:
    return sum(file.stat().st_size for file in (tape / "journal").glob("*.journal"))


def _rows_of(path: Path) -> tuple[str, int]:
    """(incarnation, rows) of a segment of requests."""
    about = pq.read_metadata(path)
    told: dict[bytes, Any] = about.metadata or {}
    name = told.get(b"tokentape.incarnation", b"unknown").decode()
    return whose(name), int(about.num_rows)


def main() -> None:
    """One pass: tape, seconds and bytes in argv, 0 for no limit."""
    os.nice(10)
    tape, retain_s, max_bytes = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    prune(tape, Limits(retain_s or None, max_bytes or None), wall_unix_ns() / 1e9)


if __name__ == "__main__":
    main()
