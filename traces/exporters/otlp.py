"""OTLP JSON: a span for each request, with the GenAI names that the schema states.

One batch of spans a line. Columns with an OpenTelemetry name become attributes, nothing else does.
Times are the tape's dates; the tape of a trace without dates counts from one second after 1970,
since 0 means unset there. Trace ids are the client's own where it sent one, else they follow from
the session; parents that another request waited for are links.
"""

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tokentape.traces.exporters.rows import Exported, Requests, Row, Window, open_out
from tokentape.traces.reader import Tape
from tokentape.traces.schema import COLUMNS

NAMED = {c.name: c.otel for c in COLUMNS if c.otel}
OTHERS = ("request_id", "parents", "trace_id", "end_ns", "first_byte_ns", "outcome", "http_status")
UNDATED_START_NS = 1_000_000_000
NS_PER_S = 1_000_000_000
BATCH_SPANS = 500
SPAN_KIND_CLIENT = 3
STATUS_OK, STATUS_ERROR = 1, 2


def write(tape: Tape, out: Path, window: Window) -> Exported:
    """One ExportTraceServiceRequest a line, as the file exporter of a collector writes them."""
    requests = Requests(tape, [*NAMED, *OTHERS], window)
    epoch_ns = int(tape.facts["wall_epoch_unix_ns"])
    base_ns = epoch_ns if requests.dated else epoch_ns + UNDATED_START_NS
    done = Exported()
    spans: list[dict[str, Any]] = []
    with open_out(out) as file:
        for row in requests.rows():
            done.read += 1
            done.written += 1
            spans.append(_span(row, base_ns, str(tape.facts["tape_id"])))
            if len(spans) == BATCH_SPANS:
                file.write(_line(spans))
                spans = []
        if spans:
            file.write(_line(spans))
    if not requests.dated:
        done.notes.append("the trace has no dates: its times count from 1970-01-01T00:00:01")
    return done


def _line(spans: list[dict[str, Any]]) -> str:
    resource = {"attributes": [_attribute("service.name", "tokentape")]}
    scope = {"scope": {"name": "tokentape"}, "spans": spans}
    whole = {"resourceSpans": [{"resource": resource, "scopeSpans": [scope]}]}
    return json.dumps(whole, ensure_ascii=False) + "\n"


def _span(row: Row, base_ns: int, tape_id: str) -> dict[str, Any]:
    known = {otel: row[name] for name, otel in NAMED.items() if row[name] is not None}
    if row["error_type"] is None and row["http_status"] is not None and row["http_status"] >= 400:
        known["error.type"] = str(row["http_status"])
    if row["first_byte_ns"] is not None:
        waited_ns = row["first_byte_ns"] - row["arrival_ns"]
        known["gen_ai.response.time_to_first_chunk"] = waited_ns / NS_PER_S
    failed = row["outcome"] not in {"ok", None}
    if failed and "error.type" not in known:
        known["error.type"] = row["outcome"]
    trace = _trace_id(row, tape_id)
    span: dict[str, Any] = {
        "traceId": trace,
        "spanId": _span_id(row["request_id"]),
        "name": " ".join(filter(None, (row["operation"], row["model_requested"]))) or "request",
        "kind": SPAN_KIND_CLIENT,
        "startTimeUnixNano": str(base_ns + row["arrival_ns"]),
        "attributes": [_attribute(name, value) for name, value in known.items()],
        "status": {"code": STATUS_ERROR if failed else STATUS_OK},
    }
    if row["end_ns"] is not None:
        span["endTimeUnixNano"] = str(base_ns + row["end_ns"])
    if row["parents"]:
        span["links"] = [{"traceId": trace, "spanId": _span_id(p)} for p in row["parents"]]
    return span


def _attribute(name: str, value: Any) -> dict[str, Any]:
    return {"key": name, "value": _value(value)}


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, list):
        return {"arrayValue": {"values": [_value(one) for one in value]}}
    return {"stringValue": str(value)}


def _trace_id(row: Row, tape_id: str) -> str:
    own = row["trace_id"] or ""
    if len(own) == 32 and set(own) <= set("0123456789abcdef"):
        return str(own)
    of = row["session_id"] or row["request_id"]
    return blake2b(f"{tape_id}\0{of}".encode(), digest_size=16).hexdigest()


def _span_id(request_id: Any) -> str:
    return blake2b(request_id.bytes, digest_size=8).hexdigest()
