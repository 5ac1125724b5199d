"""Recorded bodies, sent again as they came: found by request, read by row group.

A tape that was captured with `--content full` has them. Only the value of the top-level "model" is
exchanged; every other byte stays, fields that nobody knows included. What cannot be sent so (cut
short, or under a coding that is not undone here) has no body for a replay. A key stays in memory.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
from numpy.typing import NDArray

from tokentape.traces.content import content_files, is_encrypted, read_content
from tokentape.traces.errors import TapeError
from tokentape.traces.reader import Tape

CODINGS = (None, "", "identity", "gzip")  # of a request that can be sent again
_GZIP_BITS = 47  # zlib's own number for either of its headers
_split = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Bodies:
    """The bodies of a tape by row: `place[i]` numbers a body among all, -1: row i has none."""

    def __init__(
        self, files: Sequence[Path], starts: Sequence[int], place: NDArray[np.int32], key: bytes
    ) -> None:
        """Args: starts: the number of the first body of each file, and after the last one."""
        self.files, self.starts = list(files), np.asarray(starts, dtype=np.int64)
        self.place = place
        self._key = key

    def __repr__(self) -> str:
        return f"Bodies({len(self.files)} files)"

    def of(self, first: int, count: int) -> dict[int, bytes]:
        """The bodies of rows [first, first + count), decoded; TapeError for a file that is gone."""
        rows = np.arange(first, first + count)[self.place[first : first + count] >= 0]
        numbers = self.place[rows]
        found: dict[int, bytes] = {}
        for at in np.unique(np.searchsorted(self.starts, numbers, side="right") - 1).tolist():
            inside = (numbers >= self.starts[at]) & (numbers < self.starts[at + 1])
            found |= self._read(at, rows[inside], numbers[inside] - self.starts[at])
        return found

    def _read(
        self, at: int, rows: NDArray[np.int64], inside: NDArray[np.int64]
    ) -> dict[int, bytes]:
        """Bodies of one file, of its row groups that hold any."""
        path, found = self.files[at], dict[int, bytes]()
        decryption = pe.create_decryption_properties(self._key) if is_encrypted(path) else None
        try:
            with pq.ParquetFile(path, decryption_properties=decryption) as file:
                begin = 0
                for group in range(file.num_row_groups):
                    end = begin + file.metadata.row_group(group).num_rows
                    here = (inside >= begin) & (inside < end)
                    if here.any():
                        columns = ["request_body", "request_coding"]
                        table = file.read_row_group(group, columns, use_threads=False)
                        table = table.take(pa.array(inside[here] - begin))
                        for row, cells in zip(rows[here].tolist(), table.to_pylist(), strict=True):
                            found[row] = _decoded(cells["request_body"], cells["request_coding"])
                    begin = end
        except (OSError, pa.ArrowException, zlib.error) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0][:160]
            raise TapeError(f"{path}: a recorded body cannot be read ({why})") from None
        return found


def read_bodies(tape: Tape, key: bytes) -> Bodies:
    """Which row of a tape has which body; TapeError where none is kept or the key is another one.

    16 bytes of memory for each request and each body while it looks.
    """
    files = content_files(tape.path)
    if not files:
        raise TapeError(f"{tape.path}: keeps no bodies; capture with --content full")
    names = ["request_id", "request_whole", "request_coding"]
    tables = list(read_content(tape.path, key, names))
    starts = np.cumsum([0, *(len(table) for table in tables)])
    known = pa.concat_tables(tables).combine_chunks()
    sound = pc.and_(known["request_whole"], pc.is_in(known["request_coding"], _codings()))
    sound = pc.fill_null(sound, fill_value=False).to_numpy(zero_copy_only=False)
    ids = known["request_id"].combine_chunks()
    bare = pa.chunked_array([ids]).combine_chunks().storage
    places = [np.empty(0, dtype=np.int32)]
    for segment in tape.segments:
        with pq.ParquetFile(segment.path) as file:
            asked = file.read(["request_id"])["request_id"].combine_chunks()
        found = pc.fill_null(pc.index_in(asked.storage, bare), -1).to_numpy()
        places.append(np.where((found >= 0) & sound[found], found, -1).astype(np.int32))
    return Bodies(files, starts.tolist(), np.concatenate(places), key)


def _codings() -> pa.Array:
    return pa.array(CODINGS, pa.string())


def _decoded(body: bytes, coding: str | None) -> bytes:
    return zlib.decompress(body, _GZIP_BITS) if coding == "gzip" else body


def with_model(body: bytes, model: str) -> bytes:
    """The body with another model; as it is where it names none, or is no JSON object."""
    try:
        named = _split(body).get("model")
    except (msgspec.DecodeError, ValueError):
        return body
    if named is None:
        return body
    whole, value = np.frombuffer(body, np.uint8), np.frombuffer(named, np.uint8)
    begin = value.ctypes.data - whole.ctypes.data  # a Raw lies in what it was split from
    assert 0 <= begin <= len(body) - len(value)
    return body[:begin] + msgspec.json.encode(model) + body[begin + len(value) :]
