"""OpenTelemetry GenAI spans: OTLP JSON (one object, or one a line), and inference-perf's form.

OTLP: `resourceSpans`, unix nanoseconds as texts, attributes as lists. inference-perf: `spans` with
ISO times and plain attributes. A span of an inference is a request; others (tools, agents, HTTP)
are counted and left out. Texts of prompts and replies are never kept, only their sizes. A span
without token counts is kept, and what is not known stays NULL: a replay then says so.
`time_to_first_chunk` is the first piece of a reply, not its first content: `first_byte_ns`.
"""

import json
from collections.abc import Iterator
from itertools import batched
from pathlib import Path
from typing import Any

from tokentape.traces.errors import TapeError
from tokentape.traces.importers.reading import LAST_NS, Record, json_document, json_lines
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
from tokentape.traces.schema import BY_NAME

NO_INFERENCE = "no_inference"
OPERATIONS = {  # gen_ai.operation.name, and what a tape calls it
    "chat": "chat",
    "generate_content": "chat",
    "text_completion": "text_completion",
    "embeddings": "embeddings",
}
COUNTS = (
    *("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens"),
    *("max_tokens", "n_choices", "top_k", "sampling_seed"),
)
OLD_NAMES = {  # before semantic conventions 1.27
    "gen_ai.usage.input_tokens": "gen_ai.usage.prompt_tokens",
    "gen_ai.usage.output_tokens": "gen_ai.usage.completion_tokens",
    "gen_ai.provider.name": "gen_ai.system",
}
PROMPTS = ("gen_ai.input.messages", "gen_ai.prompt", "gen_ai.system_instructions")
REPLIES = ("gen_ai.output.messages", "gen_ai.output.text", "gen_ai.completion")
FAILED = (2, "2", "STATUS_CODE_ERROR", "ERROR")
BATCH_ROWS = 20_000

Spans = Iterator[tuple[Record, dict[str, Any]]]  # a span and its attributes


def read_batches(path: Path) -> Iterator[Batch]:
    """The inference spans of a file, in file order; TapeError names what cannot be read."""
    sessions = Sessions()
    seen: set[tuple[str | None, str]] = set()
    for numbered in batched(enumerate(_spans(path)), BATCH_ROWS):
        dropped: dict[str, int] = {}
        rows = []
        for number, (span, attributes) in numbered:
            found = _row(number, span, attributes)
            if isinstance(found, dict) and found["span"] in seen:
                found = DUPLICATE
            if isinstance(found, str):
                add_counts(dropped, {found: 1})
            else:
                seen.add(found.pop("span"))
                rows.append(found)
        linked = sessions.of_rows(rows)
        notes = {"rows_without_tokens": sum(row["output_tokens"] is None for row in rows)}
        for row in rows:
            row.pop("session_id")
        yield batch_of(rows, dropped, notes, linked.parents, **linked.columns)


def _spans(path: Path) -> Spans:
    for top in _objects(path):
        for span in top.items("spans"):
            yield span, dict(span.inner("attributes").data)
        for resource in top.items("resourceSpans"):
            for scope in resource.items("scopeSpans"):
                for span in scope.items("spans"):
                    yield span, _attributes(span)


def _objects(path: Path) -> Iterator[Record]:
    """A file is one object over many lines, or an object a line."""
    try:
        first = next(json_lines(path), None)
    except TapeError:
        first = None
    if first is not None and ("spans" in first.data or "resourceSpans" in first.data):
        yield from json_lines(path)
        return
    document = json_document(path)
    if "spans" not in document.data:
        document.need("resourceSpans")
    yield document


def _attributes(span: Record) -> dict[str, Any]:
    """OTLP's list of keys and typed values as a plain dictionary."""
    found = {}
    for pair in span.items("attributes"):
        key, value = pair.word("key"), pair.inner("value").data
        if key is not None:
            found[key] = _value(pair, value)
    return found


def _value(pair: Record, value: dict[str, Any]) -> Any:
    if "intValue" in value:  # JSON of protobuf writes 64-bit numbers as texts
        try:
            return int(value["intValue"])
        except (TypeError, ValueError):
            raise pair.refusal("value", "not a whole number") from None
    if "arrayValue" in value:
        items = pair.inner("value").inner("arrayValue").items("values")
        return [_value(item, item.data) for item in items]
    return next((value[n] for n in ("stringValue", "boolValue", "doubleValue") if n in value), None)


def _row(number: int, span: Record, attributes: dict[str, Any]) -> dict[str, Any] | str:
    """A row of the tape, or the reason why the span is none."""
    said = Record(span.path, span.what, attributes)
    operation = OPERATIONS.get(str(attributes.get("gen_ai.operation.name")))
    if operation is None:
        return NO_INFERENCE
    time_ns = _instant(span, "startTimeUnixNano", "start_time")
    end_ns = _instant(span, "endTimeUnixNano", "end_time")
    if time_ns is None or time_ns == 0:
        return NO_VALUE
    counts = {name: _count(said, BY_NAME[name].otel) for name in COUNTS}
    trace = span.word("traceId") or span.word("trace_id")
    first_ns = said.ns("gen_ai.response.time_to_first_chunk", NS_PER_S)
    status = span.inner("status").data.get("code")
    error = said.word("error.type")
    failed = error is not None or status in FAILED
    return counts | {
        "time_ns": time_ns,
        "row": number,
        "span": (trace, span.word("spanId") or span.word("span_id") or f"row {number}"),
        "operation": operation,
        "session_id": _session(said) or trace,
        "trace_id": trace,
        "model_requested": said.word("gen_ai.request.model"),
        "model": said.word("gen_ai.response.model"),
        "response_id": said.word("gen_ai.response.id"),
        "stream": _flag(said, "gen_ai.request.stream"),
        "temperature": said.data.get("gen_ai.request.temperature"),
        "top_p": said.data.get("gen_ai.request.top_p"),
        "prompt_bytes": _size(said, PROMPTS),
        "response_bytes": _size(said, REPLIES),
        "first_byte_ns": None if first_ns is None else min(time_ns + first_ns, LAST_NS),
        "end_ns": end_ns or None,
        "finish_reason": _words(said, "gen_ai.response.finish_reasons"),
        "outcome": "http_error" if failed else "ok",
        "http_status": int(error) if error and error.isdigit() and len(error) == 3 else None,
        "error_type": error or ("unspecified" if failed else None),
        "extra": _provider(said),
    }


def _instant(span: Record, otlp: str, plain: str) -> int | None:
    value = span.data.get(otlp)
    if value is None:
        return span.instant_ns(plain)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if type(value) is not int or not 0 <= value <= LAST_NS:
        raise span.refusal(otlp, "not unix nanoseconds")
    return value


def _count(said: Record, name: str) -> int | None:
    return said.count(name) if said.has(name) else said.count(OLD_NAMES.get(name, name))


def _session(said: Record) -> str | None:
    if said.has("gen_ai.conversation.id"):
        return said.word("gen_ai.conversation.id")
    named = [key for key in said.data if key == "session.id" or key.endswith(".session.id")]
    return said.word(named[0]) if named else None


def _flag(said: Record, name: str) -> bool | None:
    value = said.data.get(name)
    return value if isinstance(value, bool) else None


def _words(said: Record, name: str) -> list[str] | None:
    value = said.data.get(name)
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return [one[:64] for one in value] or None
    return None


def _size(said: Record, names: tuple[str, ...]) -> int | None:
    """Bytes of what was written, as the span holds it; None where it holds nothing."""
    found = [said.data[name] for name in names if said.has(name)]
    texts = [one if isinstance(one, str) else json.dumps(one) for one in found]
    return sum(len(text.encode()) for text in texts) if found else None


def _provider(said: Record) -> str | None:
    name = said.word("gen_ai.provider.name") or said.word(OLD_NAMES["gen_ai.provider.name"])
    return json.dumps({"provider": name}) if name else None


FORMAT = Format(
    origin="OpenTelemetry GenAI spans",
    licence="the user's own",
    wall_clock=True,
    one_file=False,
    read=read_batches,
    marks=("gen_ai.operation.name",),
    facts={"parents": "by time, within a conversation, or else a trace"},
    pattern="*.json*",
)
