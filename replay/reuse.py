"""How much of the prompts of a plan an endless prefix cache would have seen before.

Blocks are told apart as the prompts are: by hash, by session where hashes hold within one only, and
by copy. It reads the tape and nothing else; what a candidate's cache does is for `/metrics` to say.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokentape.replay.operators import Selected
from tokentape.replay.prompts import hashes_of_copy
from tokentape.replay.source import Source

MOST_BLOCKS = 4_000_000  # looked at for the share that repeats: 64 MB
BLOCK_ROWS = 8_000  # requests whose blocks are read at a time
_STEP = 0x9E3779B97F4A7C15


def repeated_blocks(source: Source, index: Any, copies: Any) -> tuple[int, int, int]:
    """(blocks that an endless prefix cache would have seen before, all blocks, their requests).

    Of the first requests of a plan only, as many as have MOST_BLOCKS: each is kept meanwhile.
    """
    found: list[Any] = []
    blocks = counted = 0
    for sizes, keys in block_names(source, index, copies) if source.with_blocks else ():
        found.append(keys)
        blocks += len(keys)
        counted += len(sizes)
        if blocks >= MOST_BLOCKS:
            break
    keys = np.sort(np.concatenate(found)) if found else np.empty(0, dtype=np.uint64)
    return int(np.count_nonzero(keys[1:] == keys[:-1])), blocks, counted


def names_of(source: Source, chosen: Selected) -> Iterator[tuple[Any, Any]]:
    """`block_names` of a load, as operators ask for them."""
    return block_names(source, chosen.row, chosen.copy)


def block_names(source: Source, index: Any, copies: Any) -> Iterator[tuple[Any, Any]]:
    """(blocks of each request, their names one after the other), some requests at a time."""
    for at in range(0, len(index), BLOCK_ROWS):
        part, copy = index[at : at + BLOCK_ROWS], copies[at : at + BLOCK_ROWS]
        groups = source.rows.group_of(part)
        sizes, pieces = np.zeros(len(part), dtype=np.int64), []
        for group in np.unique(groups).tolist():
            here = np.flatnonzero(groups == group)
            keys, sizes[here] = _block_keys(source, group, part[here], copy[here])
            pieces.append((here, keys))
        starts = np.cumsum(sizes) - sizes
        names = np.empty(int(sizes.sum()), dtype=np.uint64)
        for here, keys in pieces:
            own = np.cumsum(sizes[here]) - sizes[here]
            names[np.arange(len(keys)) + np.repeat(starts[here] - own, sizes[here])] = keys
        yield sizes, names


def _block_keys(source: Source, group: int, positions: Any, copies: Any) -> tuple[Any, Any]:
    """(names, blocks of each row) of some rows of a row group, told apart as a cache would."""
    table = source.rows.read(group, ("block_hashes", "block_scope"))
    if "block_hashes" not in table.column_names:
        return np.empty(0, dtype=np.uint64), np.zeros(len(positions), dtype=np.int64)
    table = table.take(pa.array(positions - source.rows.groups[group].first))
    lists = table["block_hashes"].combine_chunks()
    hashes = pc.list_flatten(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    parents = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
    if copies.any():
        hashes = hashes_of_copy(hashes, copies[parents])
    local = pc.fill_null(pc.equal(table["block_scope"], "session"), fill_value=False)
    spaces = np.where(np.asarray(local), source.sessions[positions] + 1, 0).astype(np.uint64)
    sizes = np.bincount(parents, minlength=len(positions))
    return hashes.view(np.uint64) ^ (spaces[parents] * np.uint64(_STEP)), sizes
