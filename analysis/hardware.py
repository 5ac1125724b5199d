"""What a run ran on: GPUs and their price, from the tape's facts or as the reader was told.

The facts are those of `capture --fact` and `replay --fact`: `gpu`, `gpus`, `usd_per_gpu_hour`.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tokentape.traces.reader import Tape

HARDWARE_TABLE = pa.schema(
    [
        ("run", pa.string()),
        ("gpu", pa.string()),
        ("gpus", pa.float64()),
        ("usd_per_gpu_hour", pa.float64()),
        ("source", pa.string()),
    ]
)


@dataclass(frozen=True)
class Hardware:
    """Facts that replace those of the tape; None keeps what the tape says."""

    gpus: float | None = None
    usd_per_gpu_hour: float | None = None


def hardware_row(tape: Tape, run: str, told: Mapping[str, Hardware]) -> dict[str, Any]:
    """The row of HARDWARE_TABLE of a tape; `told` is by run label, with "" for all others."""
    given: dict[str, Any] = (tape.facts.get("candidate") or {}).get("given") or {}
    over = told.get(run, told.get("", Hardware()))
    gpus = over.gpus if over.gpus is not None else _number(given.get("gpus"))
    price = over.usd_per_gpu_hour
    price = price if price is not None else _number(given.get("usd_per_gpu_hour"))
    said = over.gpus is not None or over.usd_per_gpu_hour is not None
    return {
        "run": run,
        "gpu": given.get("gpu"),
        "gpus": gpus,
        "usd_per_gpu_hour": price,
        "source": "told" if said else "tape",
    }


def _number(value: object) -> float | None:
    """A number above zero; a fact is free text, so anything else is not known."""
    with contextlib.suppress(TypeError, ValueError):
        number = float(str(value))
        return number if 0 < number < float("inf") else None
    return None
