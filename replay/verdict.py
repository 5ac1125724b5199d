"""Judges a run after it: did it measure the candidate, or the client and the machine.

Reads the sealed tape, as anybody else would. It never changes a number and never hides one: every
threshold stands below with its reason, and every reason says the figure that it comes from.
"""

from dataclasses import dataclass, field
from math import inf
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tokentape.replay import measures
from tokentape.replay.exchange import ABORTED
from tokentape.replay.health import cores
from tokentape.replay.sender import Sent
from tokentape.replay.sent_rows import LATE_NS
from tokentape.traces.reader import Tape

NS_PER_MS = 1_000_000
LEVELS = ("valid", "suspect", "invalid")

# (suspect above, invalid above)
LAG_OF_TTFT = (0.10, 0.50)  # p99 of the schedule lag, in median TTFTs: what a late send could hide
LAG_FLOOR_NS = (2 * NS_PER_MS, 20 * NS_PER_MS)  # not judged below: loopback TTFTs can be tiny
RATE_ERROR = (0.01, 0.05)  # achieved against offered rate; the load is the recorded load
SLICE_ERROR = (0.05, 0.25)  # the same in the worst slice: a minute behind must not average out
STALL_P99_NS = (5 * NS_PER_MS, 50 * NS_PER_MS)  # lateness of own ticks, where user stamps share it
KERNEL_STALL_P99_NS = (50 * NS_PER_MS, 500 * NS_PER_MS)  # kernel stamps do not: sends still do
ARRIVAL_LAG_OF_GAP = (0.5, 2.0)  # worst read of a row, p99: a second event may be in it by then
FEW_SHARED = 0.001  # of events: kernel stamps that share no read are right, however late it was
COALESCED_SHARE = (0.05, 1.0)  # events that share a read, at least; may be the server's
LENGTH_MISSED = (0.01, 0.10)  # requests whose token counts are not the planned ones
FAILED_SHARE = (0.01, 0.50)  # beyond one in two the load was another one
STEAL_SHARE = (0.01, 0.05)  # of all cores; the hypervisor's theft cannot be told from the engine
CPU_SHARE = (0.90, 1.1)  # of the one core that a worker has; a full core queues its reads
CORES_SHARE = (0.9, 1.0)  # of all cores, by several workers; candidate and writers need some too
GC_NS = (5 * NS_PER_MS, 1000 * NS_PER_MS)  # collections should not run at all
PAUSED_SHARE = (0.01, 0.50)  # requests whose bytes waited for the socket: the load left late
WINDOWS_SHARE = (0.01, inf)  # full receive buffers per request; maybe other programs'


@dataclass
class Verdict:
    """valid, suspect or invalid; why; and all figures, in ns, counts and shares of 1."""

    level: str = "valid"
    reasons: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    client: str = "valid"  # the same without what the candidate did: failures and lengths

    def blame(self, level: str, reason: str, *, candidate: bool = False) -> None:
        """Add a reason; the level only ever gets worse. candidate: it is its doing, not ours."""
        self.level = max(self.level, level, key=LEVELS.index)
        if not candidate:
            self.client = max(self.client, level, key=LEVELS.index)
        self.reasons.append(f"{level}: {reason}")

    def judge(
        self,
        value: float | None,
        limits: tuple[float, float],
        reason: str,
        *,
        candidate: bool = False,
    ) -> None:
        """Blame what is above a limit."""
        if value is not None and value > limits[0]:
            level = "invalid" if value > limits[1] else "suspect"
            self.blame(level, reason, candidate=candidate)

    def as_dict(self) -> dict[str, Any]:
        """For JSON and the tape."""
        told = {"level": self.level, "client": self.client, "reasons": self.reasons}
        return told | self.figures

    def text(self) -> str:
        """Lines for a terminal."""
        return "\n".join(
            [f"verdict: {self.level}", *(f"  {r}" for r in self.reasons), *self._lines()]
        )

    def _lines(self) -> list[str]:
        f = self.figures
        outcomes = ", ".join(f"{n} {name}" for name, n in f["outcomes"].items()) or "none"
        return [
            f"  requests: {f['requests']} sent: {outcomes}",
            *_abort_lines(f),
            *_refusal_lines(f["refusals"]),
            *_schedule_lines(f),
            *_length_lines(f),
            *_stamp_lines(f),
            *_machine_lines(f),
            *([f"  beside its tape: {f['fidelity']['says']}"] if "fidelity" in f else []),
        ]


def _abort_lines(f: dict[str, Any]) -> list[str]:
    planned, left = f["planned_aborts"], f["outcomes"].get(ABORTED, 0)
    if not planned:
        return []
    rest = f", {planned - left} had ended before or were not sent" if planned > left else ""
    return [f"  aborts: {left} of {planned} replies were left as their recorded clients did{rest}"]


def _refusal_lines(refusals: dict[str, Any]) -> list[str]:
    by_status, waits = refusals["by_status"], refusals["retry_after_s"]
    if not by_status:
        return []
    kinds = ", ".join(f"{n} with {status}" for status, n in by_status.items())
    asked = refusals["with_retry_after"]
    wait = f"; {asked} asked for a wait of {waits['p50']} s (median, most {waits['max']} s)"
    return [f"  refused, never tried again: {kinds}{wait if asked else ''}"]


def _schedule_lines(f: dict[str, Any]) -> list[str]:
    rate, over = f["rate"], f["rate_over_time"]
    lines = [f"  schedule lag: {_three(f['schedule_lag_ns'])}"]
    lines += [
        f"    {f['late_causes'][name]} later than {_ms(f['late_over_ns'])} by {name}: {_three(lag)}"
        for name, lag in f["lag_by_cause_ns"].items()
    ]
    moved, early = f["moved_by_predecessor"], f["before_planned"]
    if moved or early:
        lines.append(
            f"  turns: {moved} due after their planned time, as those before them ended late"
            + (f", {early} before it" if early else "")
            + f"; sent after the planned time {_three(f['session_delay_ns'])}"
        )
    if f["after_failure"]:
        lines.append(f"    {f['after_failure']} sent after one that failed, as if it had not")
    if rate["achieved_over_offered"] is not None:
        lines.append(
            f"  rate: {rate['achieved_per_s']:.2f}/s of {rate['offered_per_s']:.2f}/s offered "
            f"({100 * rate['achieved_over_offered']:.2f} %), at most {over['most_behind']} behind"
        )
    if (worst := over["worst"]) is not None:
        lines.append(
            f"    worst of {len(over['offered'])} slices: {100 * worst['ratio']:.1f} % "
            f"at {worst['slice'] * over['slice_ns'] / 1e9:.0f} s"
        )
    return lines


def _length_lines(f: dict[str, Any]) -> list[str]:
    lines = []
    for name in ("input", "output"):
        match = f[f"{name}_match"]
        if match["counted"]:
            lines.append(
                f"  {name} tokens: {match['matched']} of {match['counted']} requests as planned"
                + (f", {match['exceptions']} exceptions" if match["exceptions"] else "")
            )
    return lines


def _stamp_lines(f: dict[str, Any]) -> list[str]:
    clocks = ", ".join(f"{n} {name}" for name, n in f["clocks"]["event"].items()) or "none"
    shared = f["coalesced_share"]
    lines = [
        f"  stamps: replies by clock: {clocks}"
        + (
            f"; at least {100 * shared:.2f} % of events in shared reads"
            if shared is not None
            else ""
        )
    ]
    if f["arrival_lag_ns"]["p99"] is not None:
        lag, gap = f["arrival_lag_ns"], f["event_gap_p50_ns"]
        lines.append(
            f"  arrival lag: worst read of each request {_three(lag)}"
            + (f" (median gap of events {_ms(gap)})" if gap else "")
        )
    if f["wall_stepped_ns"] > 0:
        lines.append(f"  wall clock: moved by {_ms(f['wall_moved_ns'])} against the monotonic one")
    return lines


def _machine_lines(f: dict[str, Any]) -> list[str]:
    steal, windows = f["steal_share"], f["windows_closed"]
    garbage = f"{f['gc_runs']} collections of {_ms(f['gc_ns'])}"
    several = f" (the worst of {f['workers']} workers)" if f["workers"] > 1 else ""
    return [
        f"  event loop: late {_three(f['loop_late_ns'])}, {f['stalls']} stalls; {garbage}{several}",
        f"  machine: own CPU {100 * f['cpu_share']:.0f} % of a core{several}"
        + (f", steal {100 * steal:.2f} %" if steal is not None else ""),
        f"  sockets: {f['fresh_connects']} requests had to wait for a connect, "
        f"{f['paused_writes']} for room to write"
        + (f", receive buffers full {windows} times" if windows else ""),
    ]


def judge_run(
    tape: Tape,
    sent: Sent,
    *,
    shortest_input_tokens: int = 0,
    prompts_counted: bool = True,
    losses: dict[str, int] | None = None,
    planned_aborts: int = 0,
) -> Verdict:
    """The verdict on a sealed run.

    shortest_input_tokens: what the candidate's template makes of the shortest prompt; a request
    planned shorter is an exception, not a miss. prompts_counted: False when the candidate's usage
    says nothing about prompts, so that no miss can be told from it.
    """
    verdict = Verdict()
    verdict.figures["planned_aborts"] = planned_aborts
    table = measures.read(tape)
    _judge_outcomes(verdict, table, sent)
    _judge_schedule(verdict, table)
    _judge_lengths(verdict, table, shortest_input_tokens, prompts_counted=prompts_counted)
    _judge_stamps(verdict, table, tape)
    _judge_process(verdict, sent)
    verdict.figures["losses"] = losses or {}
    lost = sum((losses or {}).values())
    if lost:
        verdict.blame("invalid", f"{lost} requests are missing on the tape: {losses}")
    return verdict


def _judge_schedule(verdict: Verdict, table: pa.Table) -> None:
    found = measures.schedule(table, LATE_NS)
    verdict.figures |= found
    p99, ttft = found["schedule_lag_ns"]["p99"], found["ttft_from_send_p50_ns"]
    low, high = (
        max(floor, share * (ttft or 0))
        for floor, share in zip(LAG_FLOOR_NS, LAG_OF_TTFT, strict=True)
    )
    median = f" (median TTFT {_ms(ttft)})" if ttft is not None else ""
    verdict.judge(p99, (low, high), f"schedule lag p99 {_ms(p99)}, above {_ms(int(low))}{median}")
    for name, lag in found["lag_by_worker_ns"].items():
        if lag["p99"] != p99:
            verdict.judge(
                lag["p99"],
                (low, high),
                f"schedule lag p99 {_ms(lag['p99'])} of worker {name}, above {_ms(int(low))}",
            )
    ratio = found["rate"]["achieved_over_offered"]
    if ratio is not None:
        verdict.judge(
            abs(ratio - 1), RATE_ERROR, f"achieved {100 * ratio:.2f} % of the offered rate"
        )
    over = found["rate_over_time"]
    if (worst := over["worst"]) is not None:
        at_s = worst["slice"] * over["slice_ns"] / 1e9
        verdict.judge(
            abs(worst["ratio"] - 1),
            SLICE_ERROR,
            f"at {at_s:.0f} s the rate was {100 * worst['ratio']:.1f} % of the offered one",
        )
    if verdict.figures["requests"]:
        verdict.judge(
            found["paused_writes"] / verdict.figures["requests"],
            PAUSED_SHARE,
            f"{found['paused_writes']} requests waited for room to write in their socket",
        )


def _judge_outcomes(verdict: Verdict, table: pa.Table, sent: Sent) -> None:
    counts = pc.value_counts(table["outcome"]).to_pylist()
    outcomes = {str(c["values"]): int(c["counts"]) for c in counts}
    waited = pc.sum(pc.is_valid(table["connect_ns"])).as_py() or 0
    verdict.figures |= {
        "requests": table.num_rows,
        "after_failure": sent.after_failure,
        "outcomes": outcomes,
        "not_sent": sent.not_sent,
        "fresh_connects": int(waited),
        "refusals": measures.refusals(table),
    }
    for missing in sent.dead:
        verdict.blame("invalid", missing)
    if sent.stopped:
        total = sent.sent + sent.not_sent
        verdict.blame("suspect", f"stopped early: {sent.sent} of {total} requests were sent")
    if not table.num_rows:
        verdict.blame("invalid", "no request was sent")
        return
    no_failure = ("ok", "cut", ABORTED)  # a replay leaves a reply only where its tape says so
    failed = table.num_rows - sum(outcomes.get(name, 0) for name in no_failure)
    kinds = ", ".join(f"{n} {name}" for name, n in outcomes.items() if name not in no_failure)
    share = failed / table.num_rows
    failures = f"{100 * share:.1f} % of the requests failed: {kinds}"
    verdict.judge(share, FAILED_SHARE, failures, candidate=True)


def _judge_lengths(
    verdict: Verdict, table: pa.Table, shortest_input_tokens: int, *, prompts_counted: bool
) -> None:
    for name, least in (("input", shortest_input_tokens), ("output", 1)):
        believed = prompts_counted or name == "output"
        match = measures.lengths(table, name, least, believed=believed)
        verdict.figures[f"{name}_match"] = match
        counted = match["counted"]
        if counted:
            missed = counted - match["matched"]
            verdict.judge(
                missed / counted,
                LENGTH_MISSED,
                f"{name} tokens: {missed} of {counted} requests are not as planned",
                candidate=True,
            )
        elif match["unknown"]:
            unverified = f"{name} tokens: the candidate counts none, so not verified"
            verdict.blame("suspect", unverified, candidate=True)


def _judge_stamps(verdict: Verdict, table: pa.Table, tape: Tape) -> None:
    found = measures.stamps(table)
    found |= measures.wall_clock([a for s in tape.segments for a in s.anchors])
    verdict.figures |= found
    share, lag, gap = (
        found["coalesced_share"],
        found["arrival_lag_ns"]["p99"],
        found["event_gap_p50_ns"],
    )
    verdict.judge(
        share,
        COALESCED_SHARE,
        f"at least {100 * (share or 0):.1f} % of the events shared a socket read",
    )
    alone = found["event_clock"] == "kernel" and (share or 0) <= FEW_SHARED
    if lag is not None and gap and not alone:
        verdict.judge(
            lag / gap,
            ARRIVAL_LAG_OF_GAP,
            f"reads waited up to {_ms(lag)} (p99), events came each {_ms(gap)}: "
            "some may share a stamp",
        )
    if found["wall_stepped_ns"] > 0:
        moved = _ms(found["wall_moved_ns"])
        verdict.blame("suspect", f"the wall clock was set while it ran, by {moved} in all")
    if found["event_clock"] in ("coroutine", "wall"):
        verdict.blame("suspect", f"replies are stamped by the {found['event_clock']} clock only")
    if found["events_dropped"]:
        verdict.blame(
            "suspect", f"{found['events_dropped']} pieces of replies were dropped by the recorder"
        )


def _judge_process(verdict: Verdict, sent: Sent) -> None:
    health, requests = sent.health, verdict.figures["requests"]
    verdict.figures |= {
        "loop_late_ns": {
            "p50": health.late_p50_ns,
            "p99": health.late_p99_ns,
            "max": health.late_max_ns,
        },
        "stalls": health.stalls,
        "gc_runs": health.gc_runs,
        "gc_ns": health.gc_ns,
        "cpu_share": health.cpu_share,
        "steal_share": health.steal_share,
        "windows_closed": health.windows_closed,
        "workers": len(sent.workers) or 1,
    }
    if not health.ticks:
        verdict.blame("suspect", "the event loop was not watched")
    kernel = verdict.figures["event_clock"] == "kernel"
    verdict.judge(
        health.late_p99_ns,
        KERNEL_STALL_P99_NS if kernel else STALL_P99_NS,
        f"the event loop was late by {_ms(health.late_p99_ns)} (p99)"
        + ("" if kernel else ": stamps may be as late"),
    )
    collected = f"{health.gc_runs} garbage collections took {_ms(health.gc_ns)}"
    verdict.judge(health.gc_ns, GC_NS, collected)
    verdict.judge(
        health.cpu_share, CPU_SHARE, f"the sender used {100 * health.cpu_share:.0f} % of a core"
    )
    verdict.judge(
        health.steal_share,
        STEAL_SHARE,
        f"the hypervisor stole {100 * (health.steal_share or 0):.1f} % of the machine",
    )
    used = sum(w["health"]["cpu_share"] for w in sent.workers.values() if "health" in w)
    verdict.judge(
        used / cores(),
        CORES_SHARE,
        f"{len(sent.workers)} workers used {used:.1f} of {cores()} cores",
    )
    if requests and health.windows_closed is not None:
        verdict.judge(
            health.windows_closed / requests,
            WINDOWS_SHARE,
            f"receive buffers of this machine were full {health.windows_closed} times",
        )


def _three(lag: dict[str, int | None]) -> str:
    return f"p50 {_ms(lag['p50'])}, p99 {_ms(lag['p99'])}, max {_ms(lag['max'])}"


def _ms(ns: int | None) -> str:
    return "-" if ns is None else f"{ns / NS_PER_MS:.2f} ms"
