"""Which finished requests of a sampled capture get a row, and with which probability.

Whole sessions are kept, by a keyed draw that is the same on every worker, host and restart; errors
and slow requests are kept beside them, always. `sample_prob` is the probability with which a row
like this one is kept, whatever kept it: 1 for every error and slow request, those of kept sessions
included, else the sampled share. So its inverse is the weight that makes sums over rows unbiased.
Source: Horvitz and Thompson, "A generalization of sampling without replacement", JASA 1952.
"""

from dataclasses import asdict, dataclass
from typing import Any

SESSION, ERROR, SLOW = "session", "error", "slow"
# The user has waited too long for the first token, or for the end: well beyond what services
# promise (seconds, and a minute), so that what is kept by it is rare.
SLOW_TTFT_NS = 5_000_000_000
SLOW_E2E_NS = 60_000_000_000
DRAW_BITS = 64  # a session's draw is a whole number below 2 to this power
NO_ERROR = ("ok", "client_abort")


@dataclass(frozen=True)
class Keep:
    """The share of sessions that is kept, above 0; the limits beyond which a request is slow."""

    share: float
    ttft_ns: int = SLOW_TTFT_NS
    e2e_ns: int = SLOW_E2E_NS

    def as_dict(self) -> dict[str, Any]:
        """For another process; Keep(**...) is the inverse."""
        return asdict(self)

    def judge(self, draw: int, row: dict[str, Any]) -> dict[str, Any] | None:
        """The sample columns of a finished row whose session has this draw; None: it is left out.

        `sample_reason` is `session` where the draw alone would have kept the row, so rows of whole
        sessions can be told from what errors and slowness have added.
        """
        drawn = draw < self.share * (1 << DRAW_BITS)
        always = self._always(row)
        if not drawn and always is None:
            return None
        prob = self.share if always is None else 1.0
        return {"sample_prob": prob, "sample_reason": SESSION if drawn else always}

    def _always(self, row: dict[str, Any]) -> str | None:
        if row["outcome"] not in NO_ERROR:
            return ERROR
        begin, end, first = row["arrival_ns"], row["end_ns"], row.get("first_content_ns")
        if first is None and row.get("stream"):
            first = end  # it waited for a first token until its end, in vain
        if end - begin > self.e2e_ns or (first is not None and first - begin > self.ttft_ns):
            return SLOW
        return None


# What a row says until its end is known: whoever kills the writer makes an error of it.
UNTIL_ITS_END = {"sample_prob": 1.0, "sample_reason": ERROR}
