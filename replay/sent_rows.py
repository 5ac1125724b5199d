"""What the row of a sent request says of its sending: stamps, outcome, and why it was late."""

from typing import Any

from tokentape.replay.exchange import Exchange

LATE_NS = 1_000_000  # a later send names its cause


def late_cause(exchange: Exchange, due_ns: int) -> str:
    """The largest part of a lateness: our own loop, the connect, or the write."""
    began = exchange.send_ns or exchange.end_ns
    parts = {
        "scheduler": exchange.release_ns - due_ns,
        "connection": began - exchange.release_ns,
        "write": (exchange.send_end_ns or exchange.end_ns) - began,
    }
    if exchange.send_ns and exchange.connect_ns is None:  # the wait was for us, not for a connect
        parts["scheduler"] += parts.pop("connection")
    return max(parts, key=lambda name: parts[name])


def sent_end_ns(exchange: Exchange) -> int:
    """When the last byte was handed over; 0: never. The call itself may return long after."""
    if exchange.send_end_ns and exchange.kernel_send_ns:
        return max(exchange.send_ns, min(exchange.send_end_ns, exchange.kernel_send_ns))
    return exchange.send_end_ns


def end_columns(exchange: Exchange, cause: str | None) -> dict[str, Any]:
    """The columns that the end of a request adds to its row; no NULL is among them."""
    row: dict[str, Any] = {
        "outcome": exchange.outcome,
        "error_type": exchange.error_type,
        "origin": "upstream" if exchange.head_ns else None,
        "late_cause": cause,
        "conn_id": exchange.conn_id,
        "connect_ns": exchange.connect_ns,
    }
    if exchange.send_ns:
        row |= {
            "send_ns": exchange.send_ns,
            "send_end_ns": sent_end_ns(exchange) or None,
            "kernel_send_ns": exchange.kernel_send_ns or None,
            "acked_ns": exchange.acked_ns or None,
            "send_clock": "kernel" if exchange.kernel_send_ns else "callback",
            "upstream_reused": exchange.reused,
        }
    return {name: value for name, value in row.items() if value is not None}
