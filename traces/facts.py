"""tape.json and the tape's lock: what a tape says about itself, and who may write it.

`tape.json` is replaced atomically, so a reader never sees half of it. The lock is an flock on
`journal/lock`: the kernel drops it when its last holder dies, however it dies.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokentape.traces.clock import wall_unix_ns
from tokentape.traces.errors import TapeError
from tokentape.traces.identity import tape_id
from tokentape.traces.words import FORMAT_VERSION, ROLES

FACTS_NAME = "tape.json"
LOCK_NAME = "journal/lock"


def versions() -> dict[str, str]:
    """Versions of what makes a difference to a tape."""
    found = {"python": platform.python_version(), "kernel": platform.release()}
    for name in ("tokentape", "mitmproxy", "aiohttp", "pyarrow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def new_facts(
    role: str,
    *,
    command: list[str],
    options: dict[str, Any],
    facts: dict[str, Any],
    wall_epoch_unix_ns: int | None,
) -> dict[str, Any]:
    """The first contents of tape.json; the epoch is now unless an import's trace has its own."""
    assert role in ROLES, role
    now = wall_unix_ns()
    return {
        "format_version": FORMAT_VERSION,
        "tape_id": tape_id(),
        "role": role,
        "command": command,
        "versions": versions(),
        "options": options,
        "created_unix_ns": now,
        "wall_epoch_unix_ns": now if wall_epoch_unix_ns is None else wall_epoch_unix_ns,
        "losses": {},
        **facts,
    }


def read_facts(tape: Path) -> dict[str, Any]:
    """tape.json of a tape; TapeError where there is none, it is broken, or its format is newer."""
    path = tape / FACTS_NAME
    if not tape.exists():
        raise TapeError(f"{tape}: no such tape")
    if not path.is_file():
        raise TapeError(f"{tape}: not a tape (it has no {FACTS_NAME})")
    try:
        facts = json.loads(path.read_text())
        major = int(str(facts["format_version"]).split(".")[0])
    except (ValueError, KeyError, TypeError) as error:
        raise TapeError(f"{path}: damaged ({error}); restore it from a copy") from None
    if major > int(FORMAT_VERSION.split(".")[0]):
        raise TapeError(f"{path}: format {facts['format_version']} is newer than this tokentape")
    return dict(facts)


def replace_facts(tape: Path, facts: dict[str, Any]) -> None:
    """Write tape.json whole or not at all, also across a power cut."""
    path = tape / FACTS_NAME
    temporary = tape / f".{FACTS_NAME}.{os.getpid()}"
    try:
        with temporary.open("w") as out:
            json.dump(facts, out, indent=1, sort_keys=False)
            out.write("\n")
            out.flush()
            os.fsync(out.fileno())
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(tape)


@contextlib.contextmanager
def changing(tape: Path) -> Iterator[dict[str, Any]]:
    """tape.json to change in place, written when the block ends; one process at a time.

    Several writers may have a tape; each adds what it knows.
    """
    fd = os.open(tape, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        facts = read_facts(tape)
        yield facts
        replace_facts(tape, facts)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Make a rename in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def refuse_foreign(tape: Path) -> None:
    """TapeError when something that is no tape, and no empty folder, is in a tape's place."""
    if (tape / FACTS_NAME).is_file() or not os.path.lexists(tape):
        return
    if not tape.is_dir() or any(tape.iterdir()):
        raise TapeError(f"{tape}: exists and is not a tape; choose another --tape")


def create_tape(tape: Path, facts: dict[str, Any], *, force: bool) -> None:
    """Make the folders and tape.json of a new tape; an old one goes only with `force`."""
    refuse_foreign(tape)
    if (tape / FACTS_NAME).is_file():
        if not force:
            raise TapeError(f"{tape}: exists; --force replaces it, or choose another --tape")
        os.close(lock(tape))  # refuses while somebody writes it
        shutil.rmtree(tape)
    for name in ("requests", "telemetry", "journal"):
        (tape / name).mkdir(parents=True, exist_ok=True)
    replace_facts(tape, facts)


def lock(tape: Path) -> int:
    """Take the tape's lock; the descriptor holds it, here and in every child that inherits it."""
    path = tape / LOCK_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise TapeError(f"{tape}: process {owner} is writing it; stop that one first") from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd
