"""Qwen-Bailian traces: JSON lines of chats with their parents, seconds, and 16-token block ids.

A row's input is the whole input of its turn, history included. There is an id for the last block
too when it is only partly filled: len(hash_ids) = ceil(input_length / 16); that last block is
padded, so it differs from the full block at the same place in the next turn. An id stands for the
whole prompt up to its block. The session is the root chat; when a chat ended is not known, so no
think time is. Cost: about 200 bytes for each chat of the file, to find parents.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import batched
from pathlib import Path

import numpy as np
import pyarrow as pa

from tokentape.traces.importers.reading import Record, json_lines
from tokentape.traces.importers.rows import (
    DUPLICATE,
    NO_VALUE,
    NS_PER_S,
    Batch,
    Format,
    Parents,
    blocks,
    counted,
)

BLOCK_TOKENS = 16
CHAT, PARENT, TIME = "chat_id", "parent_chat_id", "timestamp"
INPUT, OUTPUT, HASHES, TURN = "input_length", "output_length", "hash_ids", "turn"
REQUIRED = (CHAT, TIME, INPUT, OUTPUT)
KNOWN = (*REQUIRED, PARENT, HASHES, TURN)
ROOT = -1
BATCH_ROWS = 20_000

Chat = tuple[int, int, int]  # time_ns, row, root chat


@dataclass
class Chats:
    """The chats of the file so far: where they are, and the root each descends from."""

    by_id: dict[int, Chat] = field(default_factory=dict)

    def add(
        self, record: Record, time_ns: int, row: int
    ) -> tuple[list[tuple[int, int]], int, bool]:
        """(parents, root chat, whether a parent was named and not found before this row)."""
        chat = record.data[CHAT]
        parent_id = record.data.get(PARENT)
        parent = None if parent_id in {None, ROOT} else self.by_id.get(parent_id)
        if parent is None:
            self.by_id[chat] = (time_ns, row, chat)
            return [], chat, parent_id not in {None, ROOT}
        self.by_id[chat] = (time_ns, row, parent[2])
        return [parent[:2]], parent[2], False


def read_batches(path: Path) -> Iterator[Batch]:
    """The rows of a file, in file order; TapeError names the line that cannot be read."""
    chats = Chats()
    for numbered in batched(enumerate(json_lines(path)), BATCH_ROWS):
        yield _batch(numbered, chats)


def _batch(numbered: tuple[tuple[int, Record], ...], chats: Chats) -> Batch:
    kept: list[tuple[int, int, Record]] = []
    linked = []
    without_value = twice = 0
    for row, record in numbered:
        record.need(*REQUIRED)
        time_ns = record.ns(TIME, NS_PER_S)
        if time_ns is None or not record.has(*REQUIRED):
            without_value += 1
        elif _chat_id(record, CHAT) in chats.by_id:
            twice += 1
        else:
            _chat_id(record, PARENT)
            kept.append((time_ns, row, record))
            linked.append(chats.add(record, time_ns, row))
    input_tokens = [record.count(INPUT) for *_, record in kept]
    output_tokens = [record.count(OUTPUT) for *_, record in kept]
    hashes = [_hashes(k[2], n or 0) for k, n in zip(kept, input_tokens, strict=True)]
    columns = {
        "operation": pa.repeat(pa.scalar("chat"), len(kept)),
        "session_id": pa.array([str(root) for _, root, _ in linked], pa.string()),
        "session_source": pa.repeat(pa.scalar("trace"), len(kept)),
        "turn_index": pa.array([_turn(record) for *_, record in kept], pa.int32()),
        "input_tokens": pa.array(input_tokens, pa.int64()),
        "output_tokens": pa.array(output_tokens, pa.int64()),
        **blocks(hashes, input_tokens, BLOCK_TOKENS),
        "extra": pa.array([record.extra(*KNOWN) for *_, record in kept], pa.string()),
    }
    return Batch(
        np.array([time_ns for time_ns, *_ in kept], dtype=np.int64),
        np.array([row for _, row, _ in kept], dtype=np.int64),
        columns,
        counted(**{NO_VALUE: without_value, DUPLICATE: twice}),
        {
            "rows_without_output": output_tokens.count(0),
            "rows_without_prefix": hashes.count(None),
            "parents_not_found": sum(lost for *_, lost in linked),
        },
        Parents.of([parents for parents, *_ in linked]),
    )


def _chat_id(record: Record, name: str) -> int | None:
    value = record.data.get(name)
    if value is None or type(value) is int:
        return value
    raise record.refusal(name, "not the number of a chat")


def _turn(record: Record) -> int | None:
    """The trace counts turns from 1."""
    turn = record.count(TURN)
    return turn - 1 if turn else None


def _hashes(record: Record, input_tokens: int) -> list[int] | None:
    """None where there are none or they break the ceil rule."""
    ids = record.ids(HASHES)
    return ids if ids is not None and len(ids) == -(-input_tokens // BLOCK_TOKENS) else None


FORMAT = Format(
    origin="alibaba-edu/qwen-bailian-usagetraces-anon",
    licence="Apache-2.0",
    wall_clock=False,
    one_file=True,
    read=read_batches,
    marks=(CHAT, PARENT, TIME, INPUT, OUTPUT),
    facts={
        "block_rule": "ceil; a last part block is padded",
        "block_scope": "trace",
        "parents": "parent_chat_id",
    },
    pattern="*.jsonl*",
)
