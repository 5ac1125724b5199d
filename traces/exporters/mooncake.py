"""Mooncake and its relatives: JSON lines of lengths, times and block ids.

mooncake: `timestamp` in whole ms (what SGLang, Dynamo and AIPerf read); finer arrivals are cut
down to them and that is said. aiperf: the same with fractions of a ms, which AIPerf takes.
guidellm: seconds and `duration`, for its `trace_synthetic` and `mooncake` kinds, ids small enough
for its 32 bits. agentic: `wait_for`, `delay` (ms) and sessions, as Dynamo's replay reads them; a
row that waits has no timestamp, because the format takes either. Ids follow the ceil rule: one for
a part block too.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokentape.traces.exporters.rows import (
    PREFIX,
    Exported,
    Prefixes,
    Requests,
    Row,
    Window,
    open_out,
)
from tokentape.traces.reader import Tape

NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000
LENGTHS = ("input_tokens", "output_tokens", "prefix_partial", *PREFIX)
Line = Callable[[Row, int], dict[str, Any]]


def write_mooncake(tape: Tape, out: Path, window: Window) -> Exported:
    """As the traces of the Mooncake repository."""
    requests = Requests(tape, LENGTHS, window)
    rounded = 0

    def line(_: Row, since_ns: int) -> dict[str, Any]:
        nonlocal rounded
        rounded += since_ns % NS_PER_MS > 0
        return {"timestamp": since_ns // NS_PER_MS}

    done = _write(requests, Prefixes(requests), out, line)
    if rounded:
        done.notes.append(f"{rounded} arrivals cut down to whole ms; --format aiperf keeps them")
    return done


def write_aiperf(tape: Tape, out: Path, window: Window) -> Exported:
    """For `aiperf profile --custom-dataset-type mooncake_trace --fixed-schedule`."""
    requests = Requests(tape, LENGTHS, window)
    done = _write(
        requests, Prefixes(requests), out, lambda _, since_ns: {"timestamp": _ms(since_ns)}
    )
    done.notes += ["sessions go out as single requests: AIPerf would add turns to one prompt"]
    return done


def write_guidellm(tape: Tape, out: Path, window: Window) -> Exported:
    """For GuideLLM's `--data '{"kind": "mooncake", ...}'`, or `trace_synthetic`."""
    requests = Requests(tape, (*LENGTHS, "end_ns"), window)

    def line(row: Row, since_ns: int) -> dict[str, Any]:
        end_ns = row["end_ns"]
        known = {} if end_ns is None else {"duration": (end_ns - row["arrival_ns"]) / NS_PER_S}
        return {"timestamp": since_ns / NS_PER_S} | known

    return _write(requests, Prefixes(requests, keep=False), out, line)


def write_agentic(tape: Tape, out: Path, window: Window) -> Exported:
    """For `python -m dynamo.replay --trace-format agentic_mooncake`."""
    requests = Requests(tape, (*LENGTHS, "request_id", "parents", "think_ns"), window)
    here: set[Any] = set()

    def line(row: Row, since_ns: int) -> dict[str, Any]:
        name, think_ns = row["request_id"], row["think_ns"] or 0
        waits = [str(p) for p in row["parents"] or [] if p in here] if think_ns >= 0 else []
        here.add(name)
        said: dict[str, Any] = {"request_id": str(name), "wait_for": waits}
        if row["session_id"] is not None:
            said["session_id"] = row["session_id"]
        return said | ({"delay": _ms(think_ns)} if waits else {"timestamp": _ms(since_ns)})

    done = _write(requests, Prefixes(requests), out, line)
    done.notes.append("rows that wait for others have a delay and no arrival")
    return done


def _write(requests: Requests, prefixes: Prefixes, out: Path, line: Line) -> Exported:
    done = Exported()
    with open_out(out) as file:
        for row in requests.generations(done):
            said = line(row, row["arrival_ns"] - requests.zero_ns)
            said["input_length"], said["output_length"] = row["input_tokens"], row["output_tokens"]
            ids = prefixes.of(row, part_block=True)
            if ids is not None:
                said["hash_ids"] = ids
            file.write(f"{json.dumps(said)}\n")
    done.notes += prefixes.notes()
    return done


def _ms(ns: int) -> int | float:
    return ns // NS_PER_MS if ns % NS_PER_MS == 0 else ns / NS_PER_MS
