"""How much of the prompts of a plan an endless prefix cache would have seen before.

Blocks are told apart as the prompts are: by hash, by session where hashes hold within one only, and
by copy. It reads the tape and nothing else; what a candidate's cache does is for `/metrics` to say.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
    while source.with_blocks and counted < len(index) and blocks < MOST_BLOCKS:
        part = index[counted : counted + BLOCK_ROWS]
        copy = copies[counted : counted + BLOCK_ROWS]
        groups = source.rows.group_of(part)
        for group in np.unique(groups).tolist():
            here = groups == group
            keys = _block_keys(source, group, part[here], copy[here])
            found.append(keys)
            blocks += len(keys)
        counted += len(part)
    keys = np.sort(np.concatenate(found)) if found else np.empty(0, dtype=np.uint64)
    return int(np.count_nonzero(keys[1:] == keys[:-1])), blocks, counted


def _block_keys(source: Source, group: int, positions: Any, copies: Any) -> Any:
    """The blocks of some rows of a row group, told apart as a cache would."""
    table = source.rows.read(group, ("block_hashes", "block_scope"))
    if "block_hashes" not in table.column_names:
        return np.empty(0, dtype=np.uint64)
    table = table.take(pa.array(positions - source.rows.groups[group].first))
    lists = table["block_hashes"].combine_chunks()
    hashes = pc.list_flatten(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    parents = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
    if copies.any():
        hashes = hashes_of_copy(hashes, copies[parents])
    local = pc.fill_null(pc.equal(table["block_scope"], "session"), fill_value=False)
    spaces = np.where(np.asarray(local), source.sessions[positions] + 1, 0).astype(np.uint64)
    return hashes.view(np.uint64) ^ (spaces[parents] * np.uint64(_STEP))
