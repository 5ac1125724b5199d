"""How a run stands, told about once a second to whoever watches it. Figures only, no printing."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

ABORTED = "client_abort"  # in a replay only where the tape says so
OUTCOMES = "tokentape_requests_total"
FAILED_SHARE = 0.01  # as in the verdict
LATE_SHARE = 0.01  # the verdict's p99
WATCHED = {
    "TTFT": "server_time_to_first_token",  # from arrival
    "TPOT": "server_time_per_output_token",
    "ICL": "client_operation_time_per_output_chunk",  # ITL, where an event is one token
}


@dataclass(frozen=True)
class Progress:
    """How a run stands."""

    elapsed_s: float
    total: int
    sent: int
    done: int
    in_flight: int
    late: int
    worst_late_ms: float
    span_s: float = 0.0  # from the first due time to the last
    served: Mapping[str, float] = field(default_factory=dict)  # totals of finished requests
    late_causes: Mapping[str, int] = field(default_factory=dict)
    moved: int = 0  # sent later than planned, because a request that they waited for ended late
    most_moved_s: float = 0.0

    @property
    def left_s(self) -> float:
        """Until the last request is due; its reply comes on top."""
        return max(0.0, self.span_s - self.elapsed_s)

    def mean_s(self, what: str) -> float | None:
        """Mean so far of one of `WATCHED`, in seconds."""
        name = f"gen_ai_{WATCHED[what]}_seconds_"
        total, count = (
            sum(v for n, v in self.served.items() if n.startswith(name + part))
            for part in ("sum", "count")
        )
        return total / count if count else None

    def at_most_s(self, what: str, q: float) -> float | None:
        """Bound of the histogram bucket that holds a quantile; None beyond the last, or of none."""
        name = f"gen_ai_{WATCHED[what]}_seconds_bucket"
        up_to: dict[float, float] = {}
        for series, count in self.served.items():
            if series.startswith(name):
                bound = float(json.loads(series.removeprefix(name))["le"])
                up_to[bound] = up_to.get(bound, 0.0) + count
        total = up_to.get(math.inf, 0.0)
        held = [b for b, n in sorted(up_to.items()) if total and n >= q * total]
        return held[0] if held and held[0] < math.inf else None

    def doubts(self) -> list[str]:
        """What would speak against the run if it ended now; the verdict looks at more."""
        outcomes = {
            json.loads(series.removeprefix(OUTCOMES))["outcome"]: int(count)
            for series, count in self.served.items()
            if series.startswith(OUTCOMES)
        }
        failed = {n: c for n, c in outcomes.items() if n not in ("ok", "cut", ABORTED)}
        found = []
        if sum(failed.values()) > FAILED_SHARE * sum(outcomes.values()):
            found.append(", ".join(f"{n} {name}" for name, n in failed.items()))
        if self.late > LATE_SHARE * self.sent:
            found.append(f"{100 * self.late / self.sent:.1f} % of the requests left late")
        return found


def added(states: Sequence[Progress]) -> Progress:
    """How several workers stand together; one at least."""
    served: dict[str, float] = {}
    for state in states:
        for name, value in state.served.items():
            served[name] = served.get(name, 0.0) + value
    causes: dict[str, int] = {}
    for state in states:
        for name, count in state.late_causes.items():
            causes[name] = causes.get(name, 0) + count
    return Progress(
        elapsed_s=max(s.elapsed_s for s in states),
        total=sum(s.total for s in states),
        sent=sum(s.sent for s in states),
        done=sum(s.done for s in states),
        in_flight=sum(s.in_flight for s in states),
        late=sum(s.late for s in states),
        worst_late_ms=max(s.worst_late_ms for s in states),
        span_s=max(s.span_s for s in states),
        late_causes=causes,
        moved=sum(s.moved for s in states),
        most_moved_s=max(s.most_moved_s for s in states),
        served=served,
    )
