"""What a run's rows say about the run itself: lags, rates over time, clocks, token counts.

Pure arithmetic over a sealed tape's columns; `verdict.py` judges the figures. Times in ns, shares
of 1. A figure that the rows cannot give is None, never 0.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tokentape.traces.kernel_stamps import STEP_NS
from tokentape.traces.reader import Tape

Ints = NDArray[np.int64]
NS_PER_S = 1_000_000_000

RATE_LEAST_NS = NS_PER_S  # a shorter span has no rate worth a percent
MOST_SLICES = 60  # of a run's span; none is shorter than a second
SLICE_LEAST = 100  # requests: in a thinner slice one request at its edge is over a percent
SLEWED = 0.0005  # the kernel moves a clock by this at most (500 ppm); what is beyond was set
REFUSED = (429, 503)  # RFC 6585 section 4, RFC 9110 section 15.6.4
CLOCKS = ("kernel", "callback", "coroutine", "wall")  # best first

COLUMNS = [
    *("scheduled_ns", "arrival_ns", "send_ns", "send_end_ns", "late_cause", "outcome"),
    *("first_content_ns", "last_content_ns", "stream", "connect_ns", "event_clock", "send_clock"),
    *("worker", "http_status", "retry_after_s"),
    *("input_tokens", "planned_input_tokens", "output_tokens", "planned_output_tokens"),
    *("coalesced_reads", "clamped_events", "events_dropped", "lag_max_us", "off_us"),
]


def read(tape: Tape) -> pa.Table:
    """The rows that are judged, in no order; of their events (`off_us`) only the number."""
    parts = []
    for part in tape.parts(COLUMNS):
        events = pc.list_value_length(part["off_us"])
        parts.append(part.drop_columns("off_us").append_column("events", events))
    return pa.concat_tables(parts)


def ints(column: Any) -> Ints:
    """A column without NULLs as integers."""
    return np.asarray(column.cast(pa.int64()).to_numpy(), dtype=np.int64)


def spread(values: Ints) -> dict[str, int | None]:
    """Median, p99 and most, each a value that occurred; None of nothing."""
    if not len(values):
        return {"p50": None, "p99": None, "max": None}
    p50, p99 = np.quantile(values, [0.5, 0.99], method="higher")
    return {"p50": int(p50), "p99": int(p99), "max": int(values.max())}


def refusals(table: pa.Table) -> dict[str, Any]:
    """Requests that the candidate turned away for now (429, 503), and the wait that it asked for.

    None of them was tried again: a retry would offer load that the tape does not have.
    """
    refused = table.filter(pc.is_in(table["http_status"], pa.array(REFUSED, pa.int16())))
    counts = pc.value_counts(refused["http_status"]).to_pylist()
    waits = refused.filter(pc.is_valid(refused["retry_after_s"]))["retry_after_s"]
    return {
        "by_status": {str(c["values"]): int(c["counts"]) for c in counts},
        "with_retry_after": len(waits),
        "retry_after_s": spread(ints(waits)),
    }


def schedule(table: pa.Table, late_ns: int) -> dict[str, Any]:
    """How late requests were sent, as a whole and by cause, and the rates, whole and over time.

    The lag counts from the instant at which a request was due, the session delay from the plan's.
    """
    sent = table.filter(pc.is_valid(table["send_ns"])).combine_chunks()
    due, send = ints(sent["arrival_ns"]), ints(sent["send_ns"])
    planned = ints(pc.coalesce(sent["scheduled_ns"], sent["arrival_ns"]))
    lag, moved = send - due, due - planned
    causes = sent["late_cause"].to_numpy(zero_copy_only=False)
    lag_by = {"predecessor": moved}  # how late it was due; all others: how late it was sent then
    named = sorted({str(c) for c in causes if c is not None})
    whole = ints(pc.subtract(sent["send_end_ns"], sent["send_ns"]).drop_null())
    ttft = ints(pc.subtract(sent["first_content_ns"], sent["send_end_ns"]).drop_null())
    workers = sent["worker"].to_numpy(zero_copy_only=False)
    names = sorted({str(w) for w in workers if w is not None})
    by_worker = {name: spread(lag[workers == name]) for name in names} if len(names) > 1 else {}
    return {
        "schedule_lag_ns": spread(lag),
        "lag_by_worker_ns": by_worker,
        "late_over_ns": late_ns,
        "late_causes": {name: int((causes == name).sum()) for name in named},
        "lag_by_cause_ns": {name: spread(lag_by.get(name, lag)[causes == name]) for name in named},
        "session_delay_ns": spread(send - planned),
        "moved_by_predecessor": int((moved > late_ns).sum()),
        "before_planned": int((moved < -late_ns).sum()),
        "write_ns": spread(whole),
        "paused_writes": int((whole > late_ns).sum()),
        "ttft_from_send_p50_ns": spread(ttft)["p50"],
        "rate": _rate(due, send),
        "rate_over_time": _rate_over_time(due, send),
    }


def _rate(due: Ints, send: Ints) -> dict[str, float | None]:
    if len(due) < 2 or due.max() - due.min() < RATE_LEAST_NS:
        return {"offered_per_s": None, "achieved_per_s": None, "achieved_over_offered": None}
    gaps = len(due) - 1
    offered = gaps * NS_PER_S / int(due.max() - due.min())
    achieved = gaps * NS_PER_S / int(send.max() - send.min())
    return {
        "offered_per_s": round(offered, 4),
        "achieved_per_s": round(achieved, 4),
        "achieved_over_offered": round(achieved / offered, 5),
    }


def _rate_over_time(due: Ints, send: Ints) -> dict[str, Any]:
    """Requests due and sent in each slice, the worst slice, and the most that were ever behind.

    A slice is judged when SLICE_LEAST requests were due in it; `worst` is (slice, achieved over
    offered) of the one that is furthest from 1.
    """
    found: dict[str, Any] = {"slice_ns": None, "offered": [], "achieved": [], "worst": None}
    if not len(due):
        return found | {"most_behind": 0}
    first, span = int(due.min()), int(due.max() - due.min())
    due, send = np.sort(due), np.sort(send)
    behind = np.arange(1, len(due) + 1) - np.searchsorted(send, due, side="right")
    found["most_behind"] = int(behind.max())  # at a due time, that request included
    width = max(NS_PER_S, -(-span // MOST_SLICES))
    slices = span // width  # whole ones only: the rest of the span has another width
    if not slices:
        return found
    edges = first + width * np.arange(slices + 1, dtype=np.int64)
    offered, achieved = (np.diff(np.searchsorted(times, edges)) for times in (due, send))
    found |= {"slice_ns": width, "offered": offered.tolist(), "achieved": achieved.tolist()}
    thick = np.flatnonzero(offered >= SLICE_LEAST)
    if len(thick):
        ratio = achieved[thick] / offered[thick]
        at = int(np.argmax(np.abs(ratio - 1)))
        found["worst"] = {"slice": int(thick[at]), "ratio": round(float(ratio[at]), 5)}
    return found


def stamps(table: pa.Table) -> dict[str, Any]:
    """Which clocks stamped, how late the process read what they stamped, what shared a read."""
    events = int(pc.sum(table["events"]).as_py() or 0)
    shared = int(pc.sum(table["coalesced_reads"]).as_py() or 0)
    counts = {name: _clocks(table[f"{name}_clock"]) for name in ("event", "send")}
    several = table.filter(pc.greater(table["events"], 1))
    span = ints(several["last_content_ns"].fill_null(0)) - ints(
        several["first_content_ns"].fill_null(0)
    )
    gaps = ints(several["events"]) - 1
    return {
        "events": events,
        "coalesced_reads": shared,
        "coalesced_share": 2 * shared / events if events else None,  # at least: two a read
        "event_clock": max(counts["event"], default=None, key=CLOCKS.index),
        "clocks": counts,
        "arrival_lag_ns": spread(ints(table["lag_max_us"].drop_null()) * 1000),
        "event_gap_p50_ns": spread(span // np.maximum(gaps, 1))["p50"],
        "clamped_events": int(pc.sum(table["clamped_events"]).as_py() or 0),
        "events_dropped": int(pc.sum(table["events_dropped"]).as_py() or 0),
    }


def _clocks(column: Any) -> dict[str, int]:
    counted = pc.value_counts(column.drop_null()).to_pylist()
    return {str(c["values"]): int(c["counts"]) for c in counted}


def wall_clock(anchors: list[dict[str, int]]) -> dict[str, int]:
    """How far the wall clock moved against the monotonic one, and how much of it was a step."""
    moved = stepped = 0
    if anchors:
        first = anchors[0]
        for anchor in anchors[1:]:
            passed = anchor["monotonic_ns"] - first["monotonic_ns"]
            moved_now = anchor["wall_unix_ns"] - first["wall_unix_ns"] - passed
            moved = max(moved, moved_now, key=abs)
            beyond = abs(moved_now) - int(SLEWED * abs(passed)) - STEP_NS
            stepped = max(stepped, beyond)
    return {"wall_moved_ns": moved, "wall_stepped_ns": stepped}


def lengths(table: pa.Table, name: str, least: int, *, believed: bool) -> dict[str, int]:
    """How many answered requests have the planned `name` tokens; shorter than `least` is excepted.

    believed: False when the candidate's usage says nothing about them.
    """
    planned_some = pc.is_valid(table[f"planned_{name}_tokens"])  # recorded bodies have no plan
    ok = table.filter(pc.and_(pc.equal(table["outcome"], "ok"), planned_some))
    both = ok.select([f"{name}_tokens", f"planned_{name}_tokens"]).drop_null()
    got, planned = ints(both[0]), ints(both[1])
    exception = planned < least
    matched = int((got == planned)[~exception].sum()) if believed else 0
    counted = int((~exception).sum()) if believed else 0
    return {
        "matched": matched,
        "counted": counted,
        "exceptions": int(exception.sum()),
        "unknown": ok.num_rows - counted - int(exception.sum()),
    }
