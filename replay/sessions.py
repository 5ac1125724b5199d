"""Which requests belong together: numbers for sessions, and their shards. Pure, and alike anywhere.

A session is known by a 64-bit digest of its id: two sessions of one digest, which no tape of this
world holds, would be sent by one worker. Nothing here may depend on the process: never `hash()`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Digests = NDArray[np.uint64]
Numbers = NDArray[np.int32]

_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)


def text_digests(texts: pa.Array) -> Digests:
    """A 64-bit digest of each string, 0 for NULL only; the same on every host and in every version.

    SplitMix64's finalizer over the length and the UTF-8 bytes, eight at a time, little-endian.
    """
    coded = texts.dictionary_encode()
    distinct = pa.concat_arrays([coded.dictionary.cast(pa.string())])  # without an offset
    count = len(distinct)
    digests = np.zeros(count + 1, dtype=np.uint64)  # the last one is for NULL
    if count:
        _, offsets, data = distinct.buffers()
        ends = np.frombuffer(offsets, dtype=np.int32, count=count + 1).astype(np.int64)
        text = np.frombuffer(data or b"", dtype=np.uint8, count=int(ends[-1]))
        words = -(-np.diff(ends) // 8)
        for width in np.unique(words).tolist():
            rows = np.flatnonzero(words == width)
            digests[rows] = _digests(text, ends[rows], ends[rows + 1] - ends[rows], width)
    codes = coded.indices.fill_null(count).to_numpy(zero_copy_only=False)
    return np.asarray(digests[codes], dtype=np.uint64)


def _digests(text: NDArray[np.uint8], starts: Any, lengths: Any, words: int) -> Digests:
    """Digests of strings of that many words; the last word is filled up with zeros."""
    cells = np.zeros((len(starts), 8 * words), dtype=np.uint8)
    for place in range(8 * words):
        rows = np.flatnonzero(lengths > place) if place >= 8 * (words - 1) else slice(None)
        cells[rows, place] = text[starts[rows] + place]
    digests = mixed(lengths.astype(np.uint64) + _BASE)
    for word in cells.view("<u8").T:
        digests = mixed((digests ^ word) + _BASE)
    return np.asarray(np.maximum(digests, np.uint64(1)))


def mixed(x: Digests) -> Digests:
    x = (x ^ (x >> _S30)) * _MIX_1
    x = (x ^ (x >> _S27)) * _MIX_2
    return x ^ (x >> _S31)


def numbered(digests: Digests) -> Numbers:
    """Sessions as 0, 1, 2, ... in the order in which they appear; -1 where there is none."""
    known = pa.array(digests, mask=digests == 0).dictionary_encode().indices
    return np.asarray(known.fill_null(-1).to_numpy(zero_copy_only=False), dtype=np.int32)


def of_copies(sessions: Numbers, copy_index: NDArray[np.int16]) -> Numbers:
    """Numbers of the sessions of copies: each copy of a session is one of its own; -1 stays."""
    if not copy_index.any():
        return sessions
    width = int(sessions.max(initial=0)) + 1
    apart = sessions + copy_index * np.int64(width)
    known = pa.array(apart, mask=sessions < 0).dictionary_encode().indices
    return np.asarray(known.fill_null(-1).to_numpy(zero_copy_only=False), dtype=np.int32)


@dataclass(frozen=True)
class Shard:
    """The part `index` of `count` of a plan."""

    index: int
    count: int

    def __post_init__(self) -> None:
        assert 0 <= self.index < self.count, self

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def shard_of(sessions: Any, count: int) -> Numbers:
    """The shard of each request, 0 to count - 1, of requests in the order of a plan.

    Sessions are dealt out in rounds, in the order of their first requests, and stay whole; a
    request without a session is dealt out by itself. So shards differ by one session at most, not
    by chance. Each round begins elsewhere, lest one shard gets each N-th session of a tape that
    repeats itself.
    """
    sessions = np.asarray(sessions, dtype=np.int32)
    if not len(sessions):
        return np.empty(0, dtype=np.int32)
    alone = sessions < 0
    renumbered = np.full(int(sessions.max()) + 1, -1, dtype=np.int32)
    first = np.full(len(renumbered), len(sessions), dtype=np.int32)
    places = np.arange(len(sessions), dtype=np.int32)
    first[sessions[~alone][::-1]] = places[~alone][::-1]  # of equal places the last one stays
    leads = alone.copy()
    leads[first[first < len(sessions)]] = True
    rank = np.cumsum(leads, dtype=np.int32) - 1
    found = first < len(sessions)
    renumbered[found] = rank[first[found]]
    rank[~alone] = renumbered[sessions[~alone]]
    rounds, place = np.divmod(rank, np.int32(count))
    begin = mixed(rounds.astype(np.uint64) + _BASE) % np.uint64(count)
    return np.asarray((place + begin.astype(np.int32)) % np.int32(count), dtype=np.int32)
