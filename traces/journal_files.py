"""Names of the small files beside a journal; light enough for a hot process."""

from pathlib import Path


def counter_path(tape: Path, incarnation: str) -> Path:
    """Where a hot process counts what it saw, in a page that survives its end (`blocks.py`)."""
    return tape / "journal" / f"{incarnation}.count"


def reserve_path(tape: Path, incarnation: str) -> Path:
    """Bytes that a writer holds back for tape.json on a full disk."""
    return tape / "journal" / f"{incarnation}.reserve"
