"""The journal: parsed, mode-filtered records that are not sealed yet; survives kill -9.

`journal/<incarnation>-<n>.journal` holds every row finished since the last seal and every request
open now; LEFT_OUT ends one that gets no row. After a seal the next file takes over. A record is
length, CRC-32 and a msgpack array; a torn tail is dropped. COUNTS ends what belongs together: the
blocks that it names are in the records before it, with all their consequences, and no other is.
A row whose request id is in a segment of the same incarnation is sealed already.
Only what has passed the privacy mode may be written here.
"""

import contextlib
import fcntl
import os
import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

OPEN, COLUMNS, EVENTS, ROW, TELEMETRY, CLOCK, COUNTS, STATE, LEFT_OUT = range(9)
RACES = 10  # a reader that loses this often against a writer's rotation sees an empty journal
_HEAD = struct.Struct("<II")
_MAGIC = b"tokentape journal 1\n"
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode

# Event lists of a row and of an EVENTS record, as array type codes; each is written as raw bytes.
LISTS = {"off_us": "I", "ntok": "H", "cls": "B", "choice": "B", "aux_off_us": "I", "aux_cls": "B"}
EVENT_LISTS = ("t_ns", "ntok", "cls", "choice", "aux_t_ns", "aux_cls")
_EVENT_CODES = "qHBBqB"
_DTYPES = {"I": np.uint32, "H": np.uint16}


class Journal:
    """Appends records; `flush` hands them to the kernel, `rotate` starts the next file."""

    def __init__(
        self,
        tape: Path,
        incarnation: str,
        clock: dict[str, Any],
        *,
        fsync: bool = False,
        snapshot: Iterable[tuple[Any, ...]] = (),
        replacing: Path | None = None,
    ) -> None:
        """Begin with `snapshot` (add's arguments), whole or not at all; OSError when refused.

        `replacing` is a dead writer's file, all of which is in the snapshot: it goes in the same
        instant in which this one appears.
        """
        self._folder = tape / "journal"
        self._fsync = fsync
        self._incarnation = incarnation
        self._clock = clock
        self._number = 0
        self._buffer = bytearray()
        self._fd = -1
        self._begin_file(0, snapshot, replacing)

    def add(self, kind: int, stream: int, *fields: Any) -> None:
        """Append one record to the buffer."""
        payload = _encode([kind, stream, *fields])
        self._buffer += _HEAD.pack(len(payload), zlib.crc32(payload))
        self._buffer += payload

    def flush(self) -> None:
        """Hand the buffer to the kernel, from where it survives this process; OSError when full.

        With `fsync` it is on the disk after this, and survives a power cut.
        """
        some = bool(self._buffer)
        while self._buffer:
            written = os.write(self._fd, self._buffer)
            del self._buffer[:written]
        if some and self._fsync:
            os.fdatasync(self._fd)

    @property
    def buffered_bytes(self) -> int:
        """What a kill -9 would lose now."""
        return len(self._buffer)

    def rotate(self, snapshot: Iterable[tuple[Any, ...]]) -> None:
        """Start the next file with `snapshot` (add's arguments for what is still open).

        Call it only when everything finished is sealed. The next file appears complete or not at
        all, and only then is this one deleted; on OSError this one goes on.
        """
        old_fd = self._fd
        self._begin_file(self._number + 1, snapshot)
        os.close(old_fd)
        self._path(self._number).unlink(missing_ok=True)
        self._number += 1

    def _begin_file(
        self, number: int, snapshot: Iterable[tuple[Any, ...]], replacing: Path | None = None
    ) -> None:
        """Write to a new file from now on; on OSError to the old one, with what was buffered."""
        old_fd, kept = self._fd, self._buffer
        final = self._path(number)
        temporary = final.with_suffix(".tmp")
        self._buffer = bytearray(_MAGIC)
        try:
            self.add(CLOCK, 0, self._clock)
            for record in snapshot:
                self.add(*record)
            self._fd = self._create(temporary)
            self.flush()
            if replacing is not None:  # two steps, and after each there is one journal of it all
                temporary.rename(replacing)
                temporary = replacing
            temporary.rename(final)
        except OSError:
            if self._fd != old_fd:
                os.close(self._fd)
            self._fd, self._buffer = old_fd, kept
            final.with_suffix(".tmp").unlink(missing_ok=True)
            raise

    def close(self) -> None:
        """Delete the file: everything in it is sealed or counted."""
        self.leave()
        self._path(self._number).unlink(missing_ok=True)

    def leave(self) -> None:
        """Close the file and keep it, for `recover`."""
        os.close(self._fd)

    def finished_rows(self) -> int:
        """Finished rows that have reached the file."""
        return sum(kind == ROW for kind, *_ in read_records(self._path(self._number)))

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._incarnation}-{number:05d}.journal"

    def _create(self, path: Path) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        fd = os.open(path, flags, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)  # whoever gets it knows that the writer is dead
        return fd


def pack_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its event lists as raw bytes."""
    packed = dict(row)
    for name, code in LISTS.items():
        value = packed.get(name)
        if value is not None:
            packed[name] = (
                bytes(value) if code == "B" else np.asarray(value, _DTYPES[code]).tobytes()
            )
    return packed


def unpack_row(packed: dict[str, Any]) -> dict[str, Any]:
    """The inverse of pack_row."""
    row = dict(packed)
    for name, code in LISTS.items():
        if row.get(name) is not None:
            row[name] = array(code, row[name])
    return row


def read_records(path: Path) -> Iterator[list[Any]]:
    """The whole records of a journal file, up to a torn or damaged one."""
    data = path.read_bytes()
    if not data.startswith(_MAGIC):
        return
    at = len(_MAGIC)
    while at + _HEAD.size <= len(data):
        size, crc = _HEAD.unpack_from(data, at)
        payload = data[at + _HEAD.size : at + _HEAD.size + size]
        if len(payload) < size or zlib.crc32(payload) != crc:
            return
        yield _decode(payload)
        at += _HEAD.size + size


def unpack_events(fields: list[bytes]) -> list[array]:  # type: ignore[type-arg]
    """The arrays of an EVENTS record, in the order of EVENT_LISTS."""
    return [array(code, raw) for code, raw in zip(_EVENT_CODES, fields, strict=True)]


def leftovers(tape: Path) -> Iterator[tuple[str, Path]]:
    """(incarnation, file) of each journal that may hold something, oldest first.

    A file whose successor exists holds nothing: the successor repeats what was still open.
    """
    files = sorted((tape / "journal").glob("*.journal"))
    stems = {f.stem for f in files}
    for file in files:
        incarnation, _, number = file.stem.rpartition("-")
        if f"{incarnation}-{int(number) + 1:05d}" not in stems:
            yield incarnation, file


def is_alive(file: Path) -> bool:
    """Whether the writer of a journal lives; a file that is gone has none."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def sealed_counts(tape: Path, incarnation: str) -> tuple[int, int]:
    """(rows, events) in the segments of one incarnation, by their footers."""
    rows = events = 0
    for file in _segments(tape, incarnation):
        with contextlib.suppress(pa.ArrowException, OSError):  # damaged: `check` names it
            footer = pq.read_metadata(file).metadata
            rows += int(footer[b"tokentape.rows"])
            events += int(footer[b"tokentape.events"])
    return rows, events


def without_sealed(
    tape: Path, incarnation: str, rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Those rows of a journal that no segment of its incarnation has.

    A journal begins behind a segment, so the first older one that has none of them ends the search.
    """
    wanted = {row["request_id"] for row in rows}
    found: set[bytes] = set()
    for file in reversed(_segments(tape, incarnation)):
        with contextlib.suppress(pa.ArrowException, OSError):
            ids = pq.read_table(file, columns=["request_id"])["request_id"].combine_chunks()
            known = wanted.intersection(ids.storage.to_pylist())
            if not known:
                break
            found |= known
    return [row for row in rows if row["request_id"] not in found]


def samples_without_sealed(tape: Path, incarnation: str, samples: list[Any]) -> list[Any]:
    """Those telemetry samples of a journal that the newest segment of its incarnation has not."""
    known: set[tuple[Any, ...]] = set()
    files = sorted((tape / "telemetry").glob(f"{incarnation}-*.parquet"))
    names = ("ts_ns", "end_ns", "source", "name", "labels")
    for file in files[-1:]:
        with contextlib.suppress(pa.ArrowException, OSError):
            found = pq.read_table(file, columns=list(names)).to_pydict()
            known = set(zip(*(found[n] for n in names), strict=True))
    return [sample for sample in samples if tuple(sample[:5]) not in known]


def _segments(tape: Path, incarnation: str) -> list[Path]:
    """Oldest first: folders are by the hour, names by number."""
    return sorted((tape / "requests").glob(f"**/{incarnation}-*.parquet"))


def count_unsealed(tape: Path) -> tuple[int, int]:
    """(finished rows, open requests) that the journals hold and no segment does."""
    for _ in range(RACES):
        with contextlib.suppress(FileNotFoundError):  # a writer went on to its next file
            return _count_unsealed(tape)
    return 0, 0


def _count_unsealed(tape: Path) -> tuple[int, int]:
    finished = unfinished = 0
    for incarnation, file in leftovers(tape):
        rows, opened = [], set()
        for kind, stream, *fields in read_records(file):
            if kind == OPEN:
                opened.add(stream)
            elif kind == LEFT_OUT:
                opened.discard(stream)
            elif kind == ROW:
                opened.discard(stream)
                rows.append(fields[0])
        finished += len(without_sealed(tape, incarnation, rows))
        unfinished += len(opened)
    return finished, unfinished
