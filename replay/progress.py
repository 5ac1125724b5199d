"""How a run stands, told about once a second to whoever watches it. Figures only, no printing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


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

    @property
    def left_s(self) -> float:
        """Until the last request is due; its reply comes on top."""
        return max(0.0, self.span_s - self.elapsed_s)

    def mean_s(self, what: str) -> float | None:
        """Mean so far of `time_to_first_token` (from arrival) or `time_per_output_token`."""
        name = f"gen_ai_server_{what}_seconds_"
        total, count = (
            sum(v for n, v in self.served.items() if n.startswith(name + part))
            for part in ("sum", "count")
        )
        return total / count if count else None


def added(states: Sequence[Progress]) -> Progress:
    """How several workers stand together; one at least."""
    served: dict[str, float] = {}
    for state in states:
        for name, value in state.served.items():
            served[name] = served.get(name, 0.0) + value
    return Progress(
        elapsed_s=max(s.elapsed_s for s in states),
        total=sum(s.total for s in states),
        sent=sum(s.sent for s in states),
        done=sum(s.done for s in states),
        in_flight=sum(s.in_flight for s in states),
        late=sum(s.late for s in states),
        worst_late_ms=max(s.worst_late_ms for s in states),
        span_s=max(s.span_s for s in states),
        served=served,
    )
