"""Dynamo request traces (`dynamo.request.trace.v1`): JSON lines, bare or in a sink's envelope.

One `request_end` is one request; tool events, payloads and an uploader's markers are counted and
left out, payloads unread. Times are unix ms; `ttft_ms`, `total_time_ms`, `prefill_wait_time_ms` and
`prefill_time_ms` are what Dynamo itself measured. Block hashes are raw 64-bit sequence hashes; a
row may have them for full blocks only or for a last part block too, and each is kept as it is.
"""

from collections.abc import Iterator
from itertools import batched
from pathlib import Path
from typing import Any

from tokentape.traces.importers.reading import LAST_NS, Record, json_lines
from tokentape.traces.importers.rows import (
    DUPLICATE,
    NO_VALUE,
    NS_PER_MS,
    Batch,
    Format,
    add_counts,
    batch_of,
)
from tokentape.traces.importers.sessions import Sessions

SCHEMA = "dynamo.request.trace.v1"
TOOL_EVENT, PAYLOAD, NO_RECORD = "tool_event", "payload", "no_record"
KINDS = {
    "tool_start": TOOL_EVENT,
    "tool_end": TOOL_EVENT,
    "tool_error": TOOL_EVENT,
    "request_payload": PAYLOAD,
}
KEPT = ("avg_itl_ms", "kv_hit_rate", "kv_transfer_estimated_latency_ms", "queue_depth")
BATCH_ROWS = 20_000


def read_batches(path: Path) -> Iterator[Batch]:
    """The requests of a file, in the order in which they ended; TapeError names a bad line."""
    sessions = Sessions()
    seen: set[str] = set()
    for numbered in batched(enumerate(json_lines(path)), BATCH_ROWS):
        dropped: dict[str, int] = {}
        rows = []
        for number, record in numbered:
            found = _row(number, record)
            if isinstance(found, dict) and found["request"] in seen:
                found = DUPLICATE
            if isinstance(found, str):
                add_counts(dropped, {found: 1})
            else:
                seen.add(found.pop("request"))
                rows.append(found)
        linked = sessions.of_rows(rows)
        notes = {
            "rows_without_output": sum(row["output_tokens"] == 0 for row in rows),
            "rows_without_prefix": sum(row["hashes"] is None for row in rows),
        }
        for row in rows:
            row.pop("session_id")
        yield batch_of(rows, dropped, notes, linked.parents, **linked.columns)


def _row(number: int, line: Record) -> dict[str, Any] | str:
    """A row of the tape, or the reason why the line is none."""
    event = line if "schema" in line.data else line.inner("event")
    if event.data.get("schema") is None:
        return NO_RECORD
    if event.data["schema"] != SCHEMA:
        raise event.refusal("schema", f"not {SCHEMA}")
    kind = event.data.get("event_type")
    if kind != "request_end":
        if kind not in KINDS:
            raise event.refusal("event_type", "not a kind of event of this schema")
        return KINDS[kind]
    request, context = event.inner("request"), event.inner("agent_context")
    replay = request.inner("replay")
    time_ns = request.ns("request_received_ms", NS_PER_MS)
    input_tokens = request.count("input_tokens")
    if input_tokens is None:
        input_tokens = replay.count("input_length")
    output_tokens = request.count("output_tokens")
    if time_ns is None or input_tokens is None or output_tokens is None:
        return NO_VALUE
    name = request.word("request_id")
    return {
        "time_ns": time_ns,
        "row": number,
        "request": name or f"row {number}",
        "operation": "chat",
        "session_id": context.word("session_id"),
        "parent_session": context.word("parent_trajectory_id") or context.word("parent_session_id"),
        "model": request.word("model"),
        "response_id": name,
        "server_id": _worker(request.inner("worker")),
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "cached_tokens": request.count("cached_tokens"),
        "first_content_ns": _after(time_ns, request, "ttft_ms"),
        "end_ns": _after(time_ns, request, "total_time_ms"),
        "server_queue_ns": request.ns("prefill_wait_time_ms", NS_PER_MS),
        "server_prefill_ns": request.ns("prefill_time_ms", NS_PER_MS),
        "server_timing_source": "dynamo" if request.has("prefill_time_ms") else None,
        "finish_reason": _finish(request.inner("finish_reason_metadata")),
        "extra": _extra(request),
        **_prefix(replay, input_tokens),
    }


def _after(time_ns: int, request: Record, name: str) -> int | None:
    duration_ns = request.ns(name, NS_PER_MS)
    if duration_ns is not None and time_ns + duration_ns > LAST_NS:
        raise request.refusal(name, "not a duration")
    return None if duration_ns is None else time_ns + duration_ns


def _worker(worker: Record) -> str | None:
    ids = [worker.count(f"{kind}_worker_id", LAST_NS) for kind in ("prefill", "decode")]
    known = [str(one) for one in dict.fromkeys(ids) if one is not None]
    return "/".join(known) or None


def _finish(metadata: Record) -> list[str] | None:
    reason = metadata.word("finish_reason")
    return [reason] if reason else None


def _extra(request: Record) -> str | None:
    return Record(
        request.path, request.what, {n: request.data[n] for n in KEPT if request.has(n)}
    ).extra()


def _prefix(replay: Record, input_tokens: int) -> dict[str, Any]:
    size, ids = replay.count("trace_block_size"), replay.ids("input_sequence_hashes")
    rules = (input_tokens // size, -(-input_tokens // size)) if size else ()
    known = ids is not None and len(ids) in rules
    return {"hashes": ids if known else None, "block_tokens": size if known else None}


FORMAT = Format(
    origin="ai-dynamo/dynamo, request trace v1",
    licence="the user's own capture",
    wall_clock=True,
    one_file=False,
    read=read_batches,
    marks=("schema", "event_type", "event_time_unix_ms"),
    facts={
        "block_rule": "as the row has it: full blocks, or a last part block too",
        "block_scope": "trace",
        "parents": "by time, within a session and from the session that started it",
    },
    pattern="*.jsonl*",
)
