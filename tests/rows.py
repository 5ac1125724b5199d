"""Hand-made rows and tapes for tests."""

from array import array
from pathlib import Path
from typing import Any

from tokentape.traces.identity import request_id
from tokentape.traces.writer import TapeWriter

MS = 1_000_000


def streamed_row(n: int = 0, events: int = 3, **columns: Any) -> dict[str, Any]:
    """A finished streamed request that arrived n ms after the epoch, one event per ms."""
    arrival = n * MS
    send = arrival + MS
    off_us = array("I", range(1000, 1000 + 1000 * events, 1000))
    row: dict[str, Any] = {
        "request_id": request_id(arrival),
        "arrival_ns": arrival,
        "send_ns": send,
        "send_end_ns": send,
        "response_headers_ns": send + MS,
        "first_byte_ns": send + MS,
        "first_content_ns": send + MS if events else None,
        "last_content_ns": send + events * MS if events else None,
        "end_ns": send + (events + 1) * MS,
        "stream": True,
        "operation": "chat",
        "off_us": off_us,
        "ntok": array("H", [1] * events),
        "cls": bytes(events),
        "input_tokens": 10,
        "output_tokens": events,
        "ntok_source": "usage_spread",
        "outcome": "ok",
        "event_clock": "callback",
        "arrival_clock": "callback",
    }
    return row | columns


def make_tape(path: Path, rows: list[dict[str, Any]], role: str = "capture", **facts: Any) -> Path:
    """A sealed tape of these rows."""
    writer = TapeWriter.create(path, role=role, command=["test"], options={}, facts=facts)
    for row in rows:
        writer.append(row)
    writer.close()
    return path
