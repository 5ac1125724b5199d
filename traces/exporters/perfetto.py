"""Perfetto: requests of a window as slices on a timeline, in the JSON that ui.perfetto.dev opens.

A session is a track of its own; requests without one share lanes, each the first that is free. In a
request lie what it waited for and what it streamed, as far as the tape knows their times; the
server's own phases are arguments, not slices, for they come without a start. Counters say how many
requests were open. Times are microseconds since the tape's first arrival, with three decimals.
"""

import heapq
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokentape.traces.exporters.rows import Exported, Requests, Row, Window, open_out
from tokentape.traces.reader import Tape

COLUMNS = (
    *("request_id", "session_id", "parents", "send_ns", "response_headers_ns", "first_content_ns"),
    *("last_content_ns", "end_ns", "outcome", "http_status", "model", "model_requested"),
    *("input_tokens", "cached_tokens", "output_tokens", "server_queue_ns", "server_prefill_ns"),
    *("server_decode_ns", "backpressure_ns", "late_cause", "server_id"),
)
ARGUMENTS = (
    *("outcome", "http_status", "input_tokens", "cached_tokens", "output_tokens", "server_id"),
    *("server_queue_ns", "server_prefill_ns", "server_decode_ns", "backpressure_ns", "late_cause"),
)
PHASES = (  # name, where it begins, where it ends
    ("before send", "arrival_ns", "send_ns"),
    ("until first content", "send_ns", "first_content_ns"),
    ("stream", "first_content_ns", "last_content_ns"),
    ("after last content", "last_content_ns", "end_ns"),
)
PROCESS = 1
NO_END = "no_end"


def write(tape: Tape, out: Path, window: Window) -> Exported:
    """One JSON object with `traceEvents`."""
    requests = Requests(tape, COLUMNS, window)
    done = Exported()
    with open_out(out) as file:
        file.write('{"displayTimeUnit": "ns", "traceEvents": [\n')
        head = {"name": "process_name", "ph": "M", "pid": PROCESS, "args": {"name": tape.path.name}}
        file.write(json.dumps(head))
        for event in _events(requests, done):
            file.write(f",\n{json.dumps(event)}")
        file.write("\n]}\n")
    return done


def _events(requests: Requests, done: Exported) -> Iterator[dict[str, Any]]:
    tracks = Tracks()
    open_ends: list[int] = []
    placed: dict[Any, tuple[int, int]] = {}
    for row in requests.rows():
        done.read += 1
        if row["end_ns"] is None:
            done.drop(NO_END)
            continue
        done.written += 1
        start, end = row["arrival_ns"], row["end_ns"]
        while open_ends and open_ends[0] <= start:
            yield _count(heapq.heappop(open_ends), len(open_ends), requests)
        heapq.heappush(open_ends, end)
        yield _count(start, len(open_ends), requests)
        track, fresh = tracks.of(row["session_id"], start, end)
        if fresh:
            name = {"name": row["session_id"] or f"lane {track}"}
            yield {"name": "thread_name", "ph": "M", "pid": PROCESS, "tid": track, "args": name}
        placed[row["request_id"]] = (track, end)
        yield from _slices(row, track, requests)
        for parent in row["parents"] or []:
            if parent in placed:
                yield from _arrow(row, parent, placed, track, requests)
    while open_ends:
        yield _count(heapq.heappop(open_ends), len(open_ends), requests)


class Tracks:
    """Tracks on which no two slices overlap: one for a session while it is free, else lanes."""

    def __init__(self) -> None:
        self._sessions: dict[str, int] = {}
        self._busy_until: list[int] = []
        self._lanes: list[int] = []

    def of(self, session: str | None, start: int, end: int) -> tuple[int, bool]:
        """(track, whether it is new)."""
        own = self._sessions.get(session) if session is not None else None
        if own is not None and self._busy_until[own] <= start:
            self._busy_until[own] = end
            return own, False
        if session is None:
            free = next((lane for lane in self._lanes if self._busy_until[lane] <= start), None)
            if free is not None:
                self._busy_until[free] = end
                return free, False
        track = len(self._busy_until)
        self._busy_until.append(end)
        if session is not None:
            self._sessions[session] = track
        else:
            self._lanes.append(track)
        return track, True


def _us(ns: int, requests: Requests) -> float:
    return (ns - requests.first_ns) / 1_000


def _count(ns: int, in_flight: int, requests: Requests) -> dict[str, Any]:
    return {
        "name": "requests in flight",
        "ph": "C",
        "pid": PROCESS,
        "ts": _us(ns, requests),
        "args": {"requests": in_flight},
    }


def _slices(row: Row, track: int, requests: Requests) -> Iterator[dict[str, Any]]:
    known = {name: row[name] for name in ARGUMENTS if row[name] is not None}
    yield _slice(
        row["model"] or row["model_requested"] or "request",
        (row["arrival_ns"], row["end_ns"]),
        track,
        requests,
        {"request_id": str(row["request_id"])} | known,
    )
    for name, begin, end in PHASES:
        start_ns, end_ns = row[begin], row[end]
        if start_ns is None and name == "until first content":
            start_ns = row["arrival_ns"]  # an import seldom knows when a request was sent
        if start_ns is not None and end_ns is not None and start_ns < end_ns <= row["end_ns"]:
            yield _slice(name, (start_ns, end_ns), track, requests, {})


def _slice(
    name: str, span: tuple[int, int], track: int, requests: Requests, args: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": name,
        "ph": "X",
        "pid": PROCESS,
        "tid": track,
        "ts": _us(span[0], requests),
        "dur": (span[1] - span[0]) / 1_000,
        "args": args,
    }


def _arrow(
    row: Row, parent: Any, placed: dict[Any, tuple[int, int]], track: int, requests: Requests
) -> Iterator[dict[str, Any]]:
    """From the end of what a request waited for to its arrival."""
    from_track, end_ns = placed[parent]
    same = {"name": "waits for", "cat": "parents", "pid": PROCESS}
    flow = {"id": f"{parent}>{row['request_id']}"}
    yield same | flow | {"ph": "s", "tid": from_track, "ts": _us(end_ns, requests) - 0.001}
    yield (
        same
        | flow
        | {
            "ph": "f",
            "bp": "e",
            "tid": track,
            "ts": _us(row["arrival_ns"], requests),
        }
    )
