"""RAGPulse traces: JSON lines whose prompts are lists of parts, and tables of the parts' lengths.

`timestamp` is a text of whole seconds. `hash_ids` names parts (system prompt, passages, history,
web search, user input), not blocks. Where the five tables of part lengths lie beside the trace,
blocks of 64 tokens are derived: the parts laid end to end in the trace's own order, which is how
the trace's own replayer joins them; the 6 to 12 tokens that `input_length` has beyond the parts
come last and belong to no block. Without the tables no prefix is known.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import batched
from pathlib import Path
from typing import Any

import pyarrow as pa

from tokentape.traces.importers.reading import Record, json_lines
from tokentape.traces.importers.rows import NO_VALUE, NS_PER_S, Batch, Format, batch_of, counted

BLOCK_TOKENS = 64
TABLES = {
    "1_sys_prompt": "sys_prompt_id",
    "2_passages": "passage_id",
    "3_history": "history_id",
    "4_user_input": "user_input_id",
    "5_web_search": "web_search_id",
}
LENGTH = "token_length"
TIME, INPUT, OUTPUT, PARTS = "timestamp", "input_length", "output_length", "hash_ids"
SESSION = "session_id"
REQUIRED = (TIME, INPUT, OUTPUT)
KNOWN = (*REQUIRED, PARTS, SESSION)
BATCH_ROWS = 10_000


def tables(path: Path) -> Sequence[Path]:
    """The five tables of lengths where all of them lie beside the trace, else none."""
    found = [path.with_name(f"{name}.jsonl") for name in TABLES]
    return found if all(table.is_file() for table in found) else ()


@dataclass
class Parts:
    """Lengths of parts, and the blocks that a row of parts makes."""

    tokens: dict[int, int]

    @classmethod
    def read(cls, files: Sequence[Path]) -> "Parts":
        """Part id to tokens; the ids of all tables are distinct."""
        tokens: dict[int, int] = {}
        for file in files:
            key = TABLES[file.stem]
            for record in json_lines(file):
                record.need(key, LENGTH)
                part, length = record.count(key), record.count(LENGTH)
                if part is None or length is None or tokens.setdefault(part, length) != length:
                    raise record.refusal(key, "no part id, or one with two lengths")
        return cls(tokens)

    def blocks(self, ids: list[int], input_tokens: int) -> list[int] | None:
        """Chained hashes of the full blocks; None when a part has no length or they do not fit."""
        sizes = [self.tokens.get(part, -1) for part in ids]
        if not ids or min(sizes) < 0 or sum(sizes) > input_tokens:
            return None
        key, hashes = b"", []
        inside: list[str] = []  # parts of the block that is being filled
        filled = 0
        for part, size in zip(map(str, ids), sizes, strict=True):
            inside.append(part)
            filled += size
            while filled >= BLOCK_TOKENS:
                filled -= BLOCK_TOKENS
                what = f"{','.join(inside)}:{size - filled}"  # and where in the last one it ends
                key = blake2b(what.encode(), digest_size=8, key=key).digest()
                hashes.append(int.from_bytes(key, "big"))
                inside = [part] if filled else []
        return hashes


def read_batches(path: Path) -> Iterator[Batch]:
    """The rows of a file, in file order; TapeError names the line that cannot be read."""
    parts = Parts.read(tables(path))
    turns: dict[str, int] = {}
    for numbered in batched(enumerate(json_lines(path)), BATCH_ROWS):
        rows = [_row(row, record, parts) for row, record in numbered]
        kept = [row for row in rows if row is not None]
        for row in kept:
            name = row["session_id"]
            if name is not None:
                row["turn_index"] = turns.get(name, 0)
                turns[name] = row["turn_index"] + 1
        yield _batch(kept, len(rows) - len(kept))


def _row(row: int, record: Record, parts: Parts) -> dict[str, Any] | None:
    record.need(*REQUIRED)
    if not record.has(*REQUIRED):
        return None
    input_tokens = record.count(INPUT) or 0
    kinds = record.inner(PARTS)
    ids = [part for kind in kinds.data for part in kinds.ids(kind) or []]
    return {
        "time_ns": _time_ns(record),
        "row": row,
        "input_tokens": input_tokens,
        "output_tokens": record.count(OUTPUT),
        "operation": "chat",
        "session_id": record.word(SESSION),
        "session_source": "trace" if record.word(SESSION) else None,
        "turn_index": None,
        "hashes": parts.blocks(ids, input_tokens),
        "block_tokens": BLOCK_TOKENS,
        "extra": record.extra(*KNOWN),
    }


def _time_ns(record: Record) -> int:
    value = record.data[TIME]
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        if len(value.strip()) <= 9:  # 31 years; more is a unix time, or another unit
            return int(value) * NS_PER_S
    elif type(value) is int and 0 <= value < 10**9:
        return value * NS_PER_S
    raise record.refusal(TIME, "not whole seconds since the trace's start")


def _batch(kept: list[dict[str, Any]], dropped: int) -> Batch:
    left = [
        None if row["hashes"] is None else row["input_tokens"] - BLOCK_TOKENS * len(row["hashes"])
        for row in kept
    ]
    notes = {
        "rows_without_output": sum(row["output_tokens"] == 0 for row in kept),
        "rows_without_prefix": sum(row["hashes"] is None for row in kept),
    }
    partial = pa.array(left, pa.int32())
    return batch_of(kept, counted(**{NO_VALUE: dropped}), notes, prefix_partial=partial)


FORMAT = Format(
    origin="flashserve/RAGPulse",
    licence="MIT",
    wall_clock=False,
    one_file=True,
    read=read_batches,
    marks=("sys_prompt", "passages_ids", "user_input", TIME, INPUT),
    facts={
        "block_rule": "floor; derived from parts laid end to end in the trace's order",
        "block_scope": "trace",
    },
    pattern="0_trace*.jsonl*",
    companions=tables,
)
