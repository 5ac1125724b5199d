"""The event lists of a row: stamps of a stream as offsets from its sending, in their order."""

from typing import Any

import numpy as np

_UINT32_END = 1 << 32


def stream_columns(
    row: dict[str, Any], t_ns: Any, ntok: Any, cls: Any, choice: Any, aux_t_ns: Any, aux_cls: Any
) -> None:
    """Fill the event lists of a row; times in the row's own base, counted from send_ns.

    A stamp later than the one after it is lowered to that one, and counted in `clamped_events`.
    """
    base = row.get("send_ns") or row["arrival_ns"]
    off_us, clamped, late = _offsets(t_ns, base)
    kept = len(off_us)
    row["off_us"], row["ntok"] = off_us, np.asarray(ntok, dtype=np.uint16)[:kept]
    row["cls"] = bytes(cls)[:kept]
    row["choice"] = bytes(choice)[:kept] if choice is not None else None
    row["aux_off_us"], aux_clamped, aux_late = _offsets(aux_t_ns, base)
    row["aux_cls"] = bytes(aux_cls)[: len(row["aux_off_us"])]
    row["clamped_events"] = clamped + aux_clamped
    row["events_overflowed"] = late + aux_late
    if late:
        row["ntok_source"] = "overflowed"


def _offsets(t_ns: Any, base_ns: int) -> tuple[Any, int, int]:
    """(offsets in us as uint32, how many were lowered, how many lie past what uint32 holds)."""
    off_us = (np.asarray(t_ns, dtype=np.int64) - base_ns) // 1000
    rising = np.maximum(np.minimum.accumulate(off_us[::-1])[::-1], 0)
    kept = int(np.searchsorted(rising, _UINT32_END))
    clamped = int(np.count_nonzero(rising != off_us))
    return rising[:kept].astype(np.uint32), clamped, len(off_us) - kept


def mark_early(row: dict[str, Any]) -> None:
    """Flag a reply that began before the request was sent whole."""
    began = row.get("response_headers_ns")
    sent = [row[n] for n in ("send_end_ns", "request_end_ns") if row.get(n) is not None]
    if began is not None and sent:
        row["early_reply"] = began < max(sent)
