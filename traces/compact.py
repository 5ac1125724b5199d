"""Compacts a tape in place, and merges captures into one: few sorted files, each row once.

Each incarnation keeps its clock and its books. The new files are complete and counted before the
old ones go. A tape that is being written is left alone.
"""

import contextlib
import ctypes
import errno
import os
import shutil
from pathlib import Path
from typing import Any

from tokentape.traces import facts as tape_facts
from tokentape.traces.errors import TapeError
from tokentape.traces.identity import incarnation
from tokentape.traces.reader import Tape, open_tape
from tokentape.traces.rewrite import (
    Part,
    Rewriter,
    Rewritten,
    without_same_ids,
    without_same_samples,
)
from tokentape.traces.schema import INSTANTS, REQUESTS, TELEMETRY

OWN = {tape_facts.FACTS_NAME, "requests", "telemetry", "journal"}  # of a tape, rewritten or left
BOOKS = ("seen", "losses", "sampled_out", "deleted", "lost_reads")  # by incarnation
_TELEMETRY_INSTANTS = frozenset({"ts_ns", "end_ns"})
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def compact(tape: Path) -> Rewritten:
    """Rewrite a tape's segments, a day to a file or few; the tape appears changed in one instant.

    TapeError for a tape that is written, damaged, or has rows that are not sealed.
    """
    opened = open_tape(tape)
    with contextlib.closing(_Lock(tape)):
        _refuse_unsealed(opened)
        made = tape.with_name(f".{tape.absolute().name}.compact-{os.getpid()}")
        shutil.rmtree(made, ignore_errors=True)
        try:
            done, facts = _rewrite([opened], made, dict(opened.facts))
            for entry in tape.iterdir():
                if entry.name not in OWN:
                    _link(entry, made / entry.name)
            tape_facts.replace_facts(made, facts)
            _exchange(made, tape)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return done


def merge(tapes: list[Path], into: Path, *, command: list[str], force: bool = False) -> Rewritten:
    """Make one tape of several captures; a request that several of them have is there once.

    Times are moved to the earliest tape's epoch. TapeError for what is no capture, captures of
    different content, or with rows that are not sealed.
    """
    opened = [open_tape(tape) for tape in tapes]
    for one in opened:
        _refuse_unsealed(one)
        if one.role != "capture":
            raise TapeError(f"{one.path}: is a {one.role}; merge joins captures")
        if one.facts.get("content") != opened[0].facts.get("content"):
            raise TapeError(f"{one.path}: has other content than {opened[0].path}")
        if any(entry.name not in OWN for entry in one.path.iterdir()):
            raise TapeError(f"{one.path}: holds more than requests and telemetry")
        if into.exists() and one.path.samefile(into):
            raise TapeError(f"{into}: is one of the tapes to merge; choose another --tape")
    facts = _merged_facts(opened, command)
    tape_facts.create_tape(into, facts, force=force)
    with contextlib.closing(_Lock(into)):
        try:
            done, facts = _rewrite(opened, into, facts)
        except BaseException:
            shutil.rmtree(into, ignore_errors=True)  # half of them must not pass for all
            raise
        tape_facts.replace_facts(into, facts)
    return done


class _Lock:
    def __init__(self, tape: Path) -> None:
        self._fd = tape_facts.lock(tape)

    def close(self) -> None:
        os.close(self._fd)


def _refuse_unsealed(tape: Tape) -> None:
    if tape.unsealed_rows or tape.open_rows:
        rows = tape.unsealed_rows + tape.open_rows
        raise TapeError(f"{tape.path}: {rows} rows are not sealed; end its capture, or `recover`")


def _rewrite(
    tapes: list[Tape], made: Path, facts: dict[str, Any]
) -> tuple[Rewritten, dict[str, Any]]:
    """Write the files of all tapes into `made`; (what was written, the facts with its books)."""
    for name in ("requests", "telemetry", "journal"):
        (made / name).mkdir(parents=True, exist_ok=True)
    epoch_unix_ns = facts["wall_epoch_unix_ns"]
    name = incarnation("compact")
    footer = {
        **{n: facts[n] for n in ("format_version", "tape_id", "role", "wall_epoch_unix_ns")},
        "content": facts.get("content", "structure"),
        "incarnation": name,
        "clock_id": "several",  # by incarnation, in tape.json
        "anchors": [],
    }
    shifts = [t.facts["wall_epoch_unix_ns"] - epoch_unix_ns for t in tapes]
    segments = [Part(s.path, d) for t, d in zip(tapes, shifts, strict=True) for s in t.segments]
    samples = [Part(f, d) for t, d in zip(tapes, shifts, strict=True) for f in t.telemetry_files]
    done = Rewriter(REQUESTS, "arrival_ns", INSTANTS, without_same_ids).write(
        segments,
        epoch_unix_ns,
        lambda day, n: made / "requests" / f"date={day}" / f"{name}-{n:05d}.parquet",
        footer,
    )
    Rewriter(TELEMETRY, "ts_ns", _TELEMETRY_INSTANTS, without_same_samples).write(
        samples, epoch_unix_ns, lambda _, n: made / "telemetry" / f"{name}-{n:05d}.parquet", footer
    )
    read = sum(t.rows for t in tapes)
    if done.rows + done.duplicates != read:
        raise TapeError(f"{made}: {done.rows} rows of {read} were written; nothing is replaced")
    facts["clocks"] = _clocks(tapes)
    if facts.get("seen"):
        facts["seen"] = facts["seen"] | {
            name: 0
        }  # it has seen nothing itself, and is no dead writer
    return done, facts


def _clocks(tapes: list[Tape]) -> dict[str, dict[str, Any]]:
    """Each incarnation's clock, with its first and its latest anchor."""
    clocks: dict[str, dict[str, Any]] = {}
    for tape in tapes:
        clocks |= tape.facts.get("clocks", {})
        for segment in tape.segments:
            name, anchors = segment.metadata.get("incarnation"), segment.anchors
            if name is None or not anchors:
                continue
            first = clocks[name]["anchors"][:1] if name in clocks else anchors[:1]
            clock_id = segment.metadata.get("clock_id")
            clocks[name] = {"clock_id": clock_id, "anchors": first + anchors[1:][-1:]}
    return clocks


def _merged_facts(tapes: list[Tape], command: list[str]) -> dict[str, Any]:
    candidates = [t.facts.get("candidate", {}) for t in tapes]
    same = {k: v for k, v in candidates[0].items() if all(c.get(k) == v for c in candidates)}
    keys = {t.facts.get("key_id") for t in tapes}
    origins = ("tape_id", "command", "options", "created_unix_ns", "wall_epoch_unix_ns", "key_id")
    facts = tape_facts.new_facts(
        "capture",
        command=command,
        options={},
        facts={
            "content": tapes[0].facts.get("content", "structure"),
            "candidate": same,
            # With several keys, sessions and prefixes match within one tape's rows only.
            "key_id": keys.pop() if len(keys) == 1 else None,
            "merged_from": [{n: t.facts.get(n) for n in origins} for t in tapes],
        },
        wall_epoch_unix_ns=min(t.facts["wall_epoch_unix_ns"] for t in tapes),
    )
    for name in BOOKS:
        merged: dict[str, Any] = {}
        for tape in tapes:
            for who, mine in tape.facts.get(name, {}).items():
                merged[who] = _later(merged.get(who), mine)
        if merged:
            facts[name] = merged
    return facts


def _later(one: Any, other: Any) -> Any:
    """Of two states of one incarnation's books the later: counts only grow."""
    if one is None:
        return other
    if isinstance(other, dict):
        return {k: max(one.get(k, 0), other.get(k, 0)) for k in one | other}
    return max(one, other)


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or all files of a folder."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=os.link)
    else:
        os.link(source, target)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders in one step, so that no instant has no tape. Source: renameat2(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = (os.fsencode(one), os.fsencode(other))
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        if code in (errno.EINVAL, errno.ENOSYS):
            raise TapeError(f"{other}: this file system cannot swap folders; use merge --tape")
        raise OSError(code, os.strerror(code), str(other))
    tape_facts.sync_folder(other.absolute().parent)
