"""Judges a run after it: did it measure the candidate, or the client and the machine.

Reads the sealed tape, as anybody else would. It never changes a number and never hides one: every
threshold stands below with its reason, and every reason says the figure that it comes from.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tokentape.replay.sender import LATE_NS, Sent
from tokentape.traces.reader import Tape

Ints = NDArray[np.int64]
NS_PER_MS, NS_PER_S = 1_000_000, 1_000_000_000
LEVELS = ("valid", "suspect", "invalid")

# (suspect above, invalid above)
LAG_OF_TTFT = (0.10, 0.50)  # p99 of the schedule lag, in median TTFTs: what a late send could hide
LAG_FLOOR_NS = (2 * NS_PER_MS, 20 * NS_PER_MS)  # not judged below: loopback TTFTs can be tiny
RATE_ERROR = (0.01, 0.05)  # achieved against offered rate; the load is the recorded load
STALL_P99_NS = (5 * NS_PER_MS, 50 * NS_PER_MS)  # lateness of own ticks: every stamp shares it
COALESCED_SHARE = (0.05, 1.0)  # events that share a read: an upper bound only; may be the server's
LENGTH_MISSED = (0.01, 0.10)  # requests whose token counts are not the planned ones
FAILED_SHARE = (0.01, 0.50)  # beyond one in two the load was another one
STEAL_SHARE = (0.01, 0.05)  # of all cores; the hypervisor's theft cannot be told from the engine
CPU_SHARE = (0.90, 1.1)  # of the one core that a worker has; a full core queues its reads
RATE_LEAST_NS = NS_PER_S  # a shorter span has no rate worth a percent

COLUMNS = [
    *("scheduled_ns", "arrival_ns", "send_ns", "send_end_ns", "late_cause", "outcome"),
    *("first_content_ns", "stream", "connect_ns", "upstream_reused", "event_clock"),
    *("input_tokens", "planned_input_tokens", "output_tokens", "planned_output_tokens"),
    *("coalesced_reads", "events_dropped", "off_us"),
]


@dataclass
class Verdict:
    """valid, suspect or invalid; why; and all figures, in ns, counts and shares of 1."""

    level: str = "valid"
    reasons: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def blame(self, level: str, reason: str) -> None:
        """Add a reason; the level only ever gets worse."""
        self.level = max(self.level, level, key=LEVELS.index)
        self.reasons.append(f"{level}: {reason}")

    def judge(self, value: float | None, limits: tuple[float, float], reason: str) -> None:
        """Blame what is above a limit."""
        if value is not None and value > limits[0]:
            self.blame("invalid" if value > limits[1] else "suspect", reason)

    def as_dict(self) -> dict[str, Any]:
        """For JSON and the tape."""
        return {"level": self.level, "reasons": self.reasons, **self.figures}

    def text(self) -> str:
        """Lines for a terminal."""
        return "\n".join(
            [f"verdict: {self.level}", *(f"  {r}" for r in self.reasons), *self._lines()]
        )

    def _lines(self) -> list[str]:
        f = self.figures
        lag, rate, loop = f["schedule_lag_ns"], f["rate"], f["loop_late_ns"]
        outcomes = ", ".join(f"{n} {name}" for name, n in f["outcomes"].items()) or "none"
        causes = ", ".join(f"{n} by {name}" for name, n in f["late_causes"].items())
        lines = [
            f"  requests: {f['requests']} sent: {outcomes}",
            f"  schedule lag: p50 {_ms(lag['p50'])}, p99 {_ms(lag['p99'])}, max {_ms(lag['max'])}"
            + (f"; later than 1 ms: {causes}" if causes else ""),
        ]
        if rate["achieved_over_offered"] is not None:
            lines.append(
                f"  rate: {rate['achieved_per_s']:.2f}/s of {rate['offered_per_s']:.2f}/s offered "
                f"({100 * rate['achieved_over_offered']:.2f} %)"
            )
        for name in ("input", "output"):
            match = f[f"{name}_match"]
            if match["counted"]:
                lines.append(
                    f"  {name} tokens: {match['matched']} of {match['counted']} requests as planned"
                    + (f", {match['exceptions']} exceptions" if match["exceptions"] else "")
                )
        coalesced = f["coalesced_share"]
        lines.append(
            f"  stamps: clock {f['event_clock'] or 'none'}, loop late p99 {_ms(loop['p99'])}, "
            f"max {_ms(loop['max'])}"
            + (
                f", {100 * coalesced:.2f} % of events in shared reads"
                if coalesced is not None
                else ""
            )
        )
        steal = f["steal_share"]
        lines.append(
            f"  machine: own CPU {100 * f['cpu_share']:.0f} % of a core"
            + (f", steal {100 * steal:.2f} %" if steal is not None else "")
        )
        lines.append(f"  connections: {f['fresh_connects']} requests had to wait for a connect")
        return lines


def judge_run(
    tape: Tape,
    sent: Sent,
    *,
    shortest_input_tokens: int = 0,
    prompts_counted: bool = True,
    losses: dict[str, int] | None = None,
) -> Verdict:
    """The verdict on a sealed run.

    shortest_input_tokens: what the candidate's template makes of the shortest prompt; a request
    planned shorter is an exception, not a miss. prompts_counted: False when the candidate's usage
    says nothing about prompts, so that no miss can be told from it.
    """
    verdict = Verdict()
    table = tape.read(COLUMNS)
    _judge_schedule(verdict, table)
    _judge_outcomes(verdict, table, sent)
    _judge_lengths(verdict, table, shortest_input_tokens, prompts_counted=prompts_counted)
    _judge_stamps(verdict, table, sent)
    health = sent.health
    verdict.figures |= {"cpu_share": health.cpu_share, "steal_share": health.steal_share}
    verdict.judge(
        health.cpu_share, CPU_SHARE, f"the sender used {100 * health.cpu_share:.0f} % of a core"
    )
    verdict.judge(
        health.steal_share,
        STEAL_SHARE,
        f"the hypervisor stole {100 * (health.steal_share or 0):.1f} % of the machine",
    )
    verdict.figures["losses"] = losses or {}
    lost = sum((losses or {}).values())
    if lost:
        verdict.blame("invalid", f"{lost} requests are missing on the tape: {losses}")
    return verdict


def _judge_schedule(verdict: Verdict, table: pa.Table) -> None:
    sent = table.filter(pc.is_valid(table["send_ns"]))
    due, send = _ints(sent["arrival_ns"]), _ints(sent["send_ns"])
    lag = send - due
    causes = pc.value_counts(sent["late_cause"].drop_null()).to_pylist()
    p50, p99, most = _spread(lag)
    ttft = _median(_ints(pc.subtract(sent["first_content_ns"], sent["send_end_ns"]).drop_null()))
    verdict.figures |= {
        "requests": table.num_rows,
        "schedule_lag_ns": {"p50": p50, "p99": p99, "max": most},
        "late_over_ns": LATE_NS,
        "late_causes": {c["values"]: c["counts"] for c in causes},
        "ttft_from_send_p50_ns": ttft,
        "rate": _rate(due, send),
    }
    limits = [max(low, share * ttft) for low, share in zip(LAG_FLOOR_NS, LAG_OF_TTFT, strict=True)]
    verdict.judge(
        p99,
        (limits[0], limits[1]),
        f"schedule lag p99 {_ms(p99)}, above {_ms(int(limits[0]))} (median TTFT {_ms(ttft)})",
    )
    ratio = verdict.figures["rate"]["achieved_over_offered"]
    if ratio is not None:
        verdict.judge(
            abs(ratio - 1), RATE_ERROR, f"achieved {100 * ratio:.2f} % of the offered rate"
        )


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


def _judge_outcomes(verdict: Verdict, table: pa.Table, sent: Sent) -> None:
    counts = pc.value_counts(table["outcome"]).to_pylist()
    outcomes = {str(c["values"]): int(c["counts"]) for c in counts}
    verdict.figures["outcomes"] = outcomes
    verdict.figures["not_sent"] = sent.not_sent
    waited = pc.sum(pc.is_valid(table["connect_ns"])).as_py() or 0
    verdict.figures["fresh_connects"] = int(waited)
    if sent.stopped:
        total = sent.sent + sent.not_sent
        verdict.blame("suspect", f"stopped early: {sent.sent} of {total} requests were sent")
    if not table.num_rows:
        verdict.blame("invalid", "no request was sent")
        return
    failed = table.num_rows - outcomes.get("ok", 0) - outcomes.get("cut", 0)
    kinds = ", ".join(f"{n} {name}" for name, n in outcomes.items() if name not in ("ok", "cut"))
    share = failed / table.num_rows
    verdict.judge(share, FAILED_SHARE, f"{100 * share:.1f} % of the requests failed: {kinds}")


def _judge_lengths(
    verdict: Verdict, table: pa.Table, shortest_input_tokens: int, *, prompts_counted: bool
) -> None:
    ok = table.filter(pc.equal(table["outcome"], "ok"))
    for name, least in (("input", shortest_input_tokens), ("output", 1)):
        both = ok.select([f"{name}_tokens", f"planned_{name}_tokens"]).drop_null()
        got, planned = _ints(both[0]), _ints(both[1])
        believed = prompts_counted or name == "output"
        exception = planned < least
        matched = int((got == planned)[~exception].sum()) if believed else 0
        counted = int((~exception).sum()) if believed else 0
        verdict.figures[f"{name}_match"] = {
            "matched": matched,
            "counted": counted,
            "exceptions": int(exception.sum()),
            "unknown": ok.num_rows - counted - int(exception.sum()),
        }
        if counted:
            verdict.judge(
                1 - matched / counted,
                LENGTH_MISSED,
                f"{name} tokens: {counted - matched} of {counted} requests are not as planned",
            )
        elif ok.num_rows > exception.sum():
            verdict.blame("suspect", f"{name} tokens: the candidate counts none, so not verified")


def _judge_stamps(verdict: Verdict, table: pa.Table, sent: Sent) -> None:
    health = sent.health
    events = int(pc.sum(pc.list_value_length(table["off_us"])).as_py() or 0)
    shared = int(pc.sum(table["coalesced_reads"]).as_py() or 0)
    dropped = int(pc.sum(table["events_dropped"]).as_py() or 0)
    clocks = pc.unique(table["event_clock"].drop_null()).to_pylist()
    share = shared / events if events else None
    verdict.figures |= {
        "events": events,
        "coalesced_share": share,
        "event_clock": max(clocks, default=None, key=_worse_clock),
        "loop_late_ns": {
            "p50": health.late_p50_ns,
            "p99": health.late_p99_ns,
            "max": health.late_max_ns,
        },
    }
    if not health.ticks:
        verdict.blame("suspect", "the event loop was not watched")
    verdict.judge(
        health.late_p99_ns,
        STALL_P99_NS,
        f"the event loop was late by {_ms(health.late_p99_ns)} (p99): stamps may be as late",
    )
    if share is not None:
        verdict.judge(
            share, COALESCED_SHARE, f"{100 * share:.1f} % of the events shared a socket read"
        )
    if dropped:
        verdict.blame("suspect", f"{dropped} pieces of replies were dropped by the recorder")


def _worse_clock(name: str) -> int:
    return ("kernel", "callback", "coroutine", "wall").index(name)


def _spread(values: Ints) -> tuple[int, int, int]:
    if not len(values):
        return 0, 0, 0
    p50, p99 = np.quantile(values, [0.5, 0.99], method="higher")
    return int(p50), int(p99), int(values.max())


def _median(values: Ints) -> int:
    return _spread(values)[0]


def _ints(column: Any) -> Ints:
    return np.asarray(column.cast(pa.int64()).to_numpy(), dtype=np.int64)


def _ms(ns: int) -> str:
    return f"{ns / NS_PER_MS:.2f} ms"
