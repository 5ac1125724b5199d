"""Agentic Mooncake traces, as Dynamo's converter writes them: Mooncake rows in a graph.

A row without `wait_for` comes at its `timestamp` (ms). A row with it comes `delay` + `tool_wait_ms`
after all that it waits for have ended, and the trace does not say when that was: its arrival here
is the earliest there can be, as if no request took any time, and its think time is exact. So replay
it with `--turns think` or `after`. Rows come after those that they wait for; a circle is refused.
"""

from collections.abc import Iterator
from itertools import batched
from pathlib import Path
from typing import Any

from tokentape.traces.errors import TapeError
from tokentape.traces.importers.reading import LAST_NS, UNREADABLE, Record, json_lines
from tokentape.traces.importers.rows import (
    DUPLICATE,
    NO_VALUE,
    NS_PER_MS,
    Batch,
    Format,
    Parents,
    batch_of,
    counted,
)

BLOCK_TOKENS = 512
REQUEST, WAIT_FOR = "request_id", "wait_for"
TIME, INPUT, OUTPUT, HASHES = "timestamp", "input_length", "output_length", "hash_ids"
DELAYS = ("delay", "tool_wait_ms")
KNOWN = (REQUEST, WAIT_FOR, TIME, INPUT, OUTPUT, HASHES, "session_id", *DELAYS)
BATCH_ROWS = 20_000

Known = tuple[int, int]  # time_ns, row


def read_batches(path: Path) -> Iterator[Batch]:
    """The rows of a file, in file order; TapeError names the line that cannot be read."""
    known: dict[str, Known] = {}
    turns: dict[str, int] = {}
    size = block_size(path)
    for numbered in batched(enumerate(json_lines(path)), BATCH_ROWS):
        rows: list[dict[str, Any]] = []
        parents: list[list[Known]] = []
        without_value = twice = 0
        for number, record in numbered:
            record.need(REQUEST, INPUT, OUTPUT)
            name = record.word(REQUEST)
            waits = [_known(record, one, known) for one in _names(record)]
            think_ns = sum(record.ns(delay, NS_PER_MS) or 0 for delay in DELAYS)
            time_ns = max(w[0] for w in waits) + think_ns if waits else record.ns(TIME, NS_PER_MS)
            if name in known:
                twice += 1
            elif name is None or time_ns is None or not record.has(INPUT, OUTPUT):
                without_value += 1
            elif time_ns > LAST_NS:
                raise record.refusal("delay", "too long")
            else:
                known[name] = (time_ns, number)
                rows.append(_row(record, number, time_ns, turns, size))
                rows[-1]["think_ns"] = think_ns if waits else None
                parents.append(waits)
        dropped = counted(**{NO_VALUE: without_value, DUPLICATE: twice})
        notes = {"rows_without_prefix": sum(row["hashes"] is None for row in rows)}
        yield batch_of(rows, dropped, notes, Parents.of(parents))


def block_size(path: Path) -> int:
    """Tokens of a block: the size that every row of the file agrees with, 512 where none is.

    The format does not name it. Sizes that fit all rows lie in one range; a power of two is taken.
    """
    low, high = 1, LAST_NS
    for record in json_lines(path):
        tokens, ids = record.count(INPUT), record.ids(HASHES)
        if tokens and ids:
            low = max(low, -(-tokens // len(ids)))  # ceil(tokens / size) = ids
            high = min(high, (tokens - 1) // (len(ids) - 1) if len(ids) > 1 else LAST_NS)
    fits = [1 << n for n in range(4, 14) if low <= 1 << n <= high]
    return fits[0] if len(fits) == 1 else BLOCK_TOKENS


def _names(record: Record) -> list[str]:
    names = record.data.get(WAIT_FOR) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise record.refusal(WAIT_FOR, "not a list of request ids")
    return names


def _known(record: Record, name: str, known: dict[str, Known]) -> Known:
    if name not in known:
        raise TapeError(
            f"{record.path}, {record.place}: waits for {name[:60]!r}, which is not before it "
            f"(a circle, or a row that is missing); {UNREADABLE}"
        )
    return known[name]


def _row(
    record: Record, number: int, time_ns: int, turns: dict[str, int], block_tokens: int
) -> dict[str, Any]:
    session = record.word("session_id")
    if session:
        turns[session] = turns.get(session, -1) + 1
    input_tokens, ids = record.count(INPUT) or 0, record.ids(HASHES)
    fits = ids is not None and len(ids) == -(-input_tokens // block_tokens)
    return {
        "time_ns": time_ns,
        "row": number,
        "operation": "chat",
        "session_id": session,
        "session_source": "trace" if session else None,
        "turn_index": turns[session] if session else None,
        "input_tokens": input_tokens,
        "output_tokens": record.count(OUTPUT),
        "hashes": ids if fits else None,
        "block_tokens": block_tokens if fits else None,
        "extra": record.extra(*KNOWN),
    }


FORMAT = Format(
    origin="ai-dynamo/dynamo, agentic Mooncake",
    licence="the user's own",
    wall_clock=False,
    one_file=True,
    read=read_batches,
    marks=(REQUEST, WAIT_FOR, INPUT, OUTPUT),
    facts={
        "block_rule": "ceil",
        "block_scope": "trace",
        "parents": "wait_for",
        "arrivals": "of rows that wait: the earliest, as if no request took any time",
    },
    pattern="*.jsonl*",
)
