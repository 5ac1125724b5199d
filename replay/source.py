"""Reads a tape as the source of a replay: what was asked, how long it was, what it shared.

It keeps columns, not rows, and invents nothing silently: every count that the tape does not hold is
guessed by one stated rule and counted in `guessed`. It never decides when a request is sent.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tokentape.replay.prompts import NO_BLOCKS, Blocks
from tokentape.replay.schedule import NS_PER_S, Ints, Offered
from tokentape.traces.errors import TapeError
from tokentape.traces.reader import Tape

# Only to size the connection pool where a tape holds no durations: 50 tokens/s after 0.5 s.
GUESSED_START_NS, GUESSED_NS_PER_TOKEN = NS_PER_S // 2, NS_PER_S // 50
GUESSED_BYTES_PER_TOKEN = 4.0  # English text in common vocabularies, where a tape cannot tell

GENERATING = ("chat", "text_completion")
NO_ENGINE = "never reached an engine ({})"
NO_TOKENS = "has no output token count"
_COPIED = ("session_id", "session_source", "turn_index")
_BLOCK = ("block_tokens", "block_unit", "block_scope", "prefix_partial")
_COLUMNS = [
    *("request_id", "arrival_ns", "scheduled_ns", "end_ns", "outcome", "http_status"),
    *("operation", "stream", "n_choices", "max_tokens", "prompt_bytes", "parents"),
    *("input_tokens", "planned_input_tokens", "output_tokens", "planned_output_tokens"),
    *_COPIED,
    *_BLOCK,
    "block_hashes",
]


@dataclass(frozen=True)
class Source:
    """The requests of a tape; every array has one entry per row."""

    tape_id: str
    table: pa.Table
    request_ids: list[bytes]
    input_tokens: Ints
    output_tokens: Ints
    offered: Offered
    chat: NDArray[np.bool_]
    stream: NDArray[np.bool_]
    sessions: Ints
    guessed: dict[str, int]
    bytes_per_token: float

    def __len__(self) -> int:
        return len(self.request_ids)

    @property
    def approximate_blocks(self) -> bool:
        """True when blocks are counted in bytes, so that shared prefixes are about right only."""
        units = self.table["block_unit"]
        return bool(pc.any(pc.equal(units, "byte")).as_py())

    @property
    def dependent(self) -> int:
        """Requests that had to wait for others when they were recorded."""
        return int(pc.sum(pc.greater(pc.list_value_length(self.table["parents"]), 0)).as_py() or 0)

    def blocks(self, index: int) -> Blocks:
        """The prefix blocks of a request, in tokens."""
        if "block_hashes" not in self._taken:
            return NO_BLOCKS
        hashes = self._taken["block_hashes"][index]
        if not hashes.is_valid or not len(hashes.values):
            return NO_BLOCKS
        size = int(self.table["block_tokens"][index].as_py() or 0)
        if self.table["block_unit"][index].as_py() == "byte":
            size = round(size / self.bytes_per_token)
        scope = self.table["block_scope"][index].as_py()
        session = str(self.table["session_id"][index].as_py()) if scope == "session" else ""
        return Blocks(hashes.values.to_numpy(), max(1, size), session)

    def columns(self, index: int) -> dict[str, Any]:
        """Columns that a replayed request takes over from its source."""
        cells = {name: column[index] for name, column in self._taken.items()}
        return {name: cell.as_py() for name, cell in cells.items() if cell.is_valid}

    @cached_property
    def _taken(self) -> dict[str, pa.Array]:
        """The columns taken over that say anything at all."""
        taken = {n: self.table[n].combine_chunks() for n in (*_COPIED, *_BLOCK, "block_hashes")}
        return {name: column for name, column in taken.items() if column.null_count < len(self)}


def read_source(tape: Tape, *, include_failed: bool = False) -> Source:
    """Read what a replay needs; TapeError when the tape holds no request at all."""
    if not tape.rows:
        rest = f" ({tape.unsealed_rows} rows unsealed: run recover)" if tape.unsealed_rows else ""
        raise TapeError(f"{tape.path}: holds no request{rest}")
    table = tape.read(_COLUMNS).combine_chunks()
    reason, reasons = _reasons(table, include_failed=include_failed)
    bytes_per_token = _bytes_per_token(table)
    guessed: dict[str, int] = {}
    input_tokens = _input_tokens(table, guessed)
    output_tokens = _output_tokens(table, guessed)
    arrival = _ints(pc.coalesce(table["arrival_ns"], table["scheduled_ns"]))
    duration = GUESSED_START_NS + GUESSED_NS_PER_TOKEN * output_tokens
    recorded = _ints(pc.subtract(table["end_ns"], table["arrival_ns"]), -1)
    offered = Offered(
        arrival_ns=arrival,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        duration_ns=np.where(recorded > 0, recorded, duration),
        reason=reason,
        reasons=reasons,
    )
    return Source(
        tape_id=str(tape.facts["tape_id"]),
        table=table,
        request_ids=_ids(table["request_id"]),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        offered=offered,
        chat=_flags(pc.equal(table["operation"], "chat")),
        stream=_flags(pc.fill_null(table["stream"], fill_value=True)),
        sessions=_ints(table["session_id"].combine_chunks().dictionary_encode().indices, -1),
        guessed={name: n for name, n in guessed.items() if n},
        bytes_per_token=bytes_per_token,
    )


def _reasons(table: pa.Table, *, include_failed: bool) -> tuple[NDArray[np.int8], tuple[str, ...]]:
    """Why a row is not replayed, as numbers of a list whose first entry means that it is."""
    operation = pc.fill_null(table["operation"], "text_completion")
    outcome = pc.fill_null(table["outcome"], "")
    status = _ints(table["http_status"])
    tokens = _ints(pc.coalesce(table["output_tokens"], table["planned_output_tokens"]), -1)
    delivered = _ints(table["output_tokens"], -1)  # what was planned says nothing of a refusal
    failed = _flags(pc.equal(outcome, "http_error")) & (delivered <= 0)
    rules: list[tuple[str, NDArray[np.bool_]]] = [
        (f"operation {name}", _flags(pc.equal(operation, name)))
        for name in sorted(set(pc.unique(operation).to_pylist()) - set(GENERATING))
    ]
    if not include_failed:
        refused = _flags(pc.equal(outcome, "connect_error"))
        rules += [(NO_ENGINE.format("connect_error"), refused)]
        rules += [
            (NO_ENGINE.format(f"http_error {code}"), failed & (status == code))
            for code in np.unique(status[failed]).tolist()
        ]
        unknown = (tokens < 0) & _flags(pc.is_in(outcome, pa.array(["ok", ""])))
        rules += [(NO_TOKENS, unknown)]
    reason = np.zeros(table.num_rows, dtype=np.int8)
    kept = [("", np.zeros(0, dtype=np.bool_)), *((n, m) for n, m in rules if m.any())]
    for number, (_, mask) in enumerate(kept[1:], 1):
        reason[mask & (reason == 0)] = number
    return reason, tuple(name for name, _ in kept)


def _input_tokens(table: pa.Table, guessed: dict[str, int]) -> Ints:
    known = pc.coalesce(table["input_tokens"], table["planned_input_tokens"])
    missing = ~_flags(pc.is_valid(known))
    ratio = _prompt_bytes_per_token(table)
    guess = np.maximum(1, _ints(table["prompt_bytes"]) / ratio).astype(np.int64)
    guessed[f"prompt tokens guessed from bytes ({ratio:.1f} per token)"] = int(missing.sum())
    return np.where(missing, guess, _ints(known))


def _output_tokens(table: pa.Table, guessed: dict[str, int]) -> Ints:
    """Aborted requests keep what they had; a failed one gets its limit, or the tape's median."""
    known = pc.coalesce(table["output_tokens"], table["planned_output_tokens"])
    tokens = _ints(known)
    outcome = pc.fill_null(table["outcome"], "")
    failed = _flags(pc.is_in(outcome, pa.array(["http_error", "connect_error"])))
    failed &= ~_flags(pc.is_valid(known)) | (tokens == 0)
    answered = tokens[tokens > 0]
    median = int(np.median(answered)) if len(answered) else 1
    guessed["output tokens of failed requests guessed"] = int(failed.sum())
    return np.where(failed, _ints(table["max_tokens"], median), tokens)


def _prompt_bytes_per_token(table: pa.Table) -> float:
    both = pc.and_(pc.is_valid(table["prompt_bytes"]), pc.greater(table["input_tokens"], 0))
    known = table.select(["prompt_bytes", "input_tokens"]).filter(both)
    tokens = int(pc.sum(known["input_tokens"]).as_py() or 0)
    return (
        int(pc.sum(known["prompt_bytes"]).as_py()) / tokens if tokens else GUESSED_BYTES_PER_TOKEN
    )


def _bytes_per_token(table: pa.Table) -> float:
    """Bytes of prompt text per token, by the rows whose blocks are counted in bytes.

    One ratio for the whole tape: equal blocks must get equal lengths, or they would not be shared.
    """
    rows = table.filter(
        pc.and_(pc.equal(table["block_unit"], "byte"), pc.greater(table["input_tokens"], 0))
    )
    full = pc.multiply(pc.list_value_length(rows["block_hashes"]), rows["block_tokens"])
    units = int(pc.sum(full).as_py() or 0) + int(pc.sum(rows["prefix_partial"]).as_py() or 0)
    tokens = int(pc.sum(rows["input_tokens"]).as_py() or 0)
    return units / tokens if units and tokens else GUESSED_BYTES_PER_TOKEN


def _ints(column: Any, missing: int = 0) -> Ints:
    filled = pc.fill_null(column.cast(pa.int64()), missing)
    return np.asarray(
        filled.to_numpy(zero_copy_only=False)
        if isinstance(filled, pa.Array)
        else filled.to_numpy(),
        dtype=np.int64,
    )


def _flags(column: Any) -> NDArray[np.bool_]:
    return np.asarray(pc.fill_null(column, fill_value=False), dtype=np.bool_)


def _ids(column: Any) -> list[bytes]:
    return list(column.combine_chunks().storage.to_pylist())
