"""LiteLLM logs: one `StandardLoggingPayload` a line, as its file, bucket and queue loggers write.

`startTime`, `endTime` and `completionStartTime` are unix seconds, or ISO texts. In a stream
`completionStartTime` is the first chunk as the gateway's callback saw it, so `event_clock` says
coroutine; in a whole reply it is the end, so it is no first content. Keys, users, addresses,
messages and replies are never kept. Attempts of one request share `trace_id` and are rows of their
own. A line answered from LiteLLM's own cache never reached an engine: it is counted and left out.
"""

from collections.abc import Iterator
from itertools import batched
from pathlib import Path
from typing import Any

from tokentape.traces.importers.reading import Record, json_lines
from tokentape.traces.importers.rows import (
    DUPLICATE,
    NO_VALUE,
    NS_PER_S,
    Batch,
    Format,
    add_counts,
    batch_of,
)
from tokentape.traces.importers.sessions import Sessions

CACHE_HIT = "answered_by_cache"
OPERATIONS = {
    "completion": "chat",
    "text_completion": "text_completion",
    "embedding": "embeddings",
    "responses": "chat",
    "anthropic_messages": "chat",
}
LIMITS = {"max_tokens": 2**31 - 1, "seed": 2**63 - 1, "n": 2**15 - 1, "top_k": 2**31 - 1}
BATCH_ROWS = 10_000


def read_batches(path: Path) -> Iterator[Batch]:
    """The requests of a log, in file order; TapeError names the line that cannot be read."""
    sessions = Sessions()
    seen: set[str] = set()
    for numbered in batched(enumerate(json_lines(path)), BATCH_ROWS):
        dropped: dict[str, int] = {}
        rows = []
        for number, record in numbered:
            found = _row(number, record)
            if isinstance(found, dict) and found["id"] in seen:
                found = DUPLICATE
            if isinstance(found, str):
                add_counts(dropped, {found: 1})
            else:
                seen.add(found.pop("id"))
                rows.append(found)
        linked = sessions.of_rows(rows)
        notes = {"rows_without_output": sum(row["output_tokens"] == 0 for row in rows)}
        for row in rows:
            row.pop("session_id")
        yield batch_of(rows, dropped, notes, linked.parents, **linked.columns)


def _row(number: int, record: Record) -> dict[str, Any] | str:
    """A row of the tape, or the reason why the line is none."""
    record.need("startTime")
    time_ns = _instant(record, "startTime")
    usage = _usage(record)
    input_tokens, output_tokens = usage.count("prompt_tokens"), usage.count("completion_tokens")
    failed = record.data.get("status") == "failure"
    if time_ns is None or (output_tokens is None and not failed):
        return NO_VALUE
    if record.data.get("cache_hit") is True:
        return CACHE_HIT
    stream = record.data.get("stream")
    end_ns = _instant(record, "endTime")
    first_ns = _instant(record, "completionStartTime") if stream is True else None
    error = record.inner("error_information")
    code = error.word("error_code") or ""
    call = (record.word("call_type") or "").removeprefix("a")
    return {
        "time_ns": time_ns,
        "row": number,
        "id": record.word("id") or f"row {number}",
        "operation": OPERATIONS.get(call if call in OPERATIONS else f"a{call}", call or None),
        "session_id": record.word("session_id"),
        "trace_id": record.word("trace_id"),
        "stream": stream if isinstance(stream, bool) else None,
        "model_requested": record.word("model_group"),
        "model": record.word("model"),
        "response_id": record.word("id"),
        "first_content_ns": first_ns if not failed and _inside(time_ns, first_ns, end_ns) else None,
        "end_ns": end_ns if end_ns is not None and end_ns >= time_ns else None,
        "event_clock": "coroutine" if first_ns is not None else None,
        "outcome": "http_error" if failed else "ok",
        "http_status": int(code) if code.isdigit() and len(code) == 3 else None,
        "error_type": (error.word("error_class") or "unspecified") if failed else None,
        "input_tokens": None if failed and not input_tokens else input_tokens,
        "output_tokens": output_tokens,
        **_details(usage),
        **_parameters(record.inner("model_parameters")),
    }


def _instant(record: Record, name: str) -> int | None:
    isoformat = isinstance(record.data.get(name), str)
    return record.instant_ns(name) if isoformat else record.ns(name, NS_PER_S)


def _inside(start_ns: int, first_ns: int | None, end_ns: int | None) -> bool:
    return first_ns is not None and start_ns <= first_ns and (end_ns is None or first_ns <= end_ns)


def _usage(record: Record) -> Record:
    """Token counts: of the payload itself, else of the usage object that it carries."""
    if record.has("prompt_tokens", "completion_tokens"):
        details = record.inner("metadata").inner("usage_object").data
        counts = {n: record.data[n] for n in ("prompt_tokens", "completion_tokens")}
        return Record(record.path, record.what, details | counts)
    response = record.data.get("response")
    usage = response.get("usage") if isinstance(response, dict) else None
    return Record(record.path, record.what, usage if isinstance(usage, dict) else {})


def _details(usage: Record) -> dict[str, int | None]:
    return {
        "cached_tokens": usage.inner("prompt_tokens_details").count("cached_tokens"),
        "reasoning_tokens": usage.inner("completion_tokens_details").count("reasoning_tokens"),
    }


def _parameters(asked: Record) -> dict[str, Any]:
    """Scalars that alter the load; what does not fit its column is left out, as it is a wish."""
    whole = {
        name: value if type(value) is int and 0 <= value <= most else None
        for name, most in LIMITS.items()
        for value in [asked.data.get(name)]
    }
    floats = {
        name: float(value) if isinstance(value, int | float) else None
        for name in ("temperature", "top_p")
        for value in [asked.data.get(name)]
    }
    return floats | {
        "max_tokens": whole["max_tokens"],
        "sampling_seed": whole["seed"],
        "n_choices": whole["n"],
        "top_k": whole["top_k"],
    }


FORMAT = Format(
    origin="LiteLLM StandardLoggingPayload",
    licence="the user's own log",
    wall_clock=True,
    one_file=False,
    read=read_batches,
    marks=("startTime", "endTime", "call_type", "prompt_tokens"),
    facts={"parents": "by time, within a session"},
    pattern="*.jsonl*",
)
