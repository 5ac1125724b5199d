"""What a gate for CI says: `ttft_p99>+5%`, `ttft_p99>500ms`, `failed>+1%`. It reads no tape.

Percent, and durations with a sign, are changes; a duration without a sign is the new run's own
value. Whether a change is clear is for the caller to say, who has the intervals.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tokentape.traces.errors import UsageError

FORM = "METRIC_STAT>+N%, such as ttft_p99>+5%, ttft_p99>+20ms, ttft_p99>500ms or failed>+1%"
_UNITS_NS = {"us": 1e3, "ms": 1e6, "s": 1e9}
_GATE = re.compile(r"\s*(\w+?)\s*([<>])\s*([+-]?)(\d+(?:\.\d+)?)\s*(%|us|ms|s)\s*")


@dataclass(frozen=True)
class Gate:
    """One gate: fails where the change, or the value itself, is beyond the limit.

    limit: a part (0.05 for 5 %), or ns where `is_time`; `own`: of the value, not of its change.
    """

    text: str
    name: str
    above: bool
    limit: float
    is_time: bool
    own: bool

    def beyond(self, value: float) -> bool:
        """Whether a change or value is past the limit, on the side that the gate forbids."""
        return value > self.limit if self.above else value < self.limit

    def clear(self, lo: float, hi: float, still: float = 0.0) -> bool:
        """Whether an interval excludes `still` on that side."""
        return lo > still if self.above else hi < still


def parse(text: str, names: Sequence[str]) -> Gate:
    """The gate that a text says; UsageError where it cannot be read, or names none of `names`."""
    match = _GATE.fullmatch(text)
    if not match or match[1] not in names:
        raise UsageError(f"--fail-if {text}: need {FORM}; one of {', '.join(names)}")
    name, sign, amount, unit = match[1], match[3], float(match[4]), match[5]
    is_time = unit != "%"
    limit = amount * _UNITS_NS[unit] if is_time else amount / 100
    return Gate(
        text=text.strip(),
        name=name,
        above=match[2] == ">",
        limit=-limit if sign == "-" else limit,
        is_time=is_time,
        own=is_time and not sign,
    )
