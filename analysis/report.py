"""The standard report of one or many tapes, as text or as plain data.

Both show the same rows of metrics_long. A number that stands on too few samples is not shown, what
is missing is said, and nothing is computed here but the ratio of two shown numbers.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tokentape.analysis import display, slo
from tokentape.analysis.display import Block
from tokentape.analysis.report_rows import ReportRows, Row, ask
from tokentape.analysis.session import Session

PERCENTILES = ("p50", "p90", "p99", "p99.9")
LATENCY = (
    "ttft",
    "ttft_arrival",
    "ttfa",
    "ttfa_arrival",
    "tpot",
    "icl",
    "itl_user",
    "itl_spread",
    "e2e",
    "e2e_content",
    "e2e_arrival",
    "queue",
    "prefill",
    "decode",
)
ESTIMATES = ("queue_estimate", "prefill_estimate", "decode_estimate")  # only with phases
LATENESS = ("send_lag", "schedule_lag")
RATES = (
    "offered_per_s",
    "completed_per_s",
    "input_tokens_per_s",
    "uncached_tokens_per_s",
    "output_tokens_per_s",
)
WEIGHTS = {"request": "requests", "event": "events", "token": "tokens"}


@dataclass(frozen=True)
class Report(ReportRows):
    """The same rows, and their text for people."""

    def text(self, width: int = 100) -> str:
        """Tables for a terminal; the ratio of every further tape to the first one."""
        blocks = [block for part in self.parts().values() for block in part if block]
        return "\n\n".join("\n".join(display.lines(block, width)) for block in blocks) + "\n"

    def parts(self) -> dict[str, list[Block]]:
        """All that is shown, as tables and lines of text by what they are about, in order."""
        latency = self._distributions("latency (outcome ok)", self._latencies)
        latencies = [self._stalls(), self._phases(), self._calibration(), self._interference()]
        rates = [self._rates(), self._prefixes(), self._speculation(), self._concurrency()]
        lateness = self._distributions("lateness (all sent)", LATENESS)
        return {
            "tapes": [self._identity()],
            "outcomes": [self._outcomes()],
            "latency": [latency, *latencies],
            "throughput": [self._goodput(), *rates, self._steady()],
            "quality": [self._clocks(), lateness, self._causes(), self._verdicts()],
        }

    @property
    def _runs(self) -> list[str]:
        return [t["run"] for t in self.tapes]

    @property
    def _latencies(self) -> tuple[str, ...]:
        return LATENCY if self.phases is None else (*LATENCY, *ESTIMATES)

    @functools.cached_property
    def _index(self) -> dict[tuple[str, str, str], Row]:
        return {(r["run"], r["metric"], r["stat"]): r for r in self.metrics}

    def _identity(self) -> Block:
        rows = []
        for tape in self.tapes:
            first, *others = tape["models"] or [display.NOTHING]
            known = tape["until_ns"] is not None
            rows.append(
                [
                    tape["run"],
                    f"{first} +{len(others)}" if others else first,
                    tape["role"],
                    display.instant(tape["first_arrival_unix_ns"]),
                    display.duration(tape["until_ns"] - tape["from_ns"] if known else None),
                    display.count(tape["sealed_requests"]),
                    display.count(tape["sealed_events"]),
                    display.share(self._index[tape["run"], "ttft", "max"]["coverage"]),
                ]
            )
        head = [
            "tape",
            "model",
            "role",
            "first arrival",
            "duration",
            "requests",
            "events",
            "of all seen",
        ]
        return [display.Table(head, rows, texts=2), *self._missing()]

    def _missing(self) -> Iterator[str]:
        """What no table can show: whatever keeps a tape from being whole."""
        for tape in self.tapes:
            for name, what in (
                ("unsealed_requests", "requests are not sealed yet and not counted here"),
                ("lost_requests", "requests were seen and are lost"),
                ("damaged_segments", "damaged segments were skipped"),
            ):
                if tape[name]:
                    yield f"! {tape['run']}: {display.count(tape[name])} {what}"
            if tape["sampled"]:
                yield f"! {tape['run']}: sampled; each row counts 1 / sample_prob"

    def _outcomes(self) -> Block:
        found = [r for r in self.metrics if r["metric"] == "outcomes"]
        happened = {r["stat"] for r in found if r["value"]}
        shown = ["ok", *sorted(happened - {"ok"})]
        index = self._index
        rows = [
            [run, *(display.count(_whole(index.get((run, "outcomes", s)))) for s in shown)]
            for run in self._runs
        ]
        errors = [
            f"! {e['run']}: {display.count(e['requests'])} x {e['outcome']}, {_why(e)}"
            for e in self.errors
        ]
        return [display.Table(["outcomes", *shown], rows), *errors]

    def _distributions(self, title: str, names: Iterable[str]) -> Block:
        rows: list[list[str]] = []
        empty: list[str] = []
        for name in names:
            if not any(self._index[run, name, "max"]["n"] for run in self._runs):
                empty.append(self.titles[name])
                continue
            rows += self._distribution(name)
        head = [title, "run", *PERCENTILES, "max", "n", "of"]
        if len(self.tapes) == 1:
            head, rows = head[:1] + head[2:], [r[:1] + r[2:] for r in rows]
        lines: Block = [display.Table(head, rows, texts=len(head) - 7)] if rows else []
        return [*lines, *([f"no values: {', '.join(empty)}"] if empty else [])]

    def _distribution(self, name: str) -> Iterator[list[str]]:
        index = self._index
        base: list[Row] = []
        for i, run in enumerate(self._runs):
            found = [index[run, name, stat] for stat in (*PERCENTILES, "max")]
            n, weight = found[0]["n"], found[0]["weight"]
            title = "" if i else self.titles[name]
            yield [title, run, *map(_shown, found), display.count(n), WEIGHTS[weight]]
            if i:
                pairs = zip(found, base, strict=True)
                yield [
                    "",
                    _over(i),
                    *(display.ratio(a["value"], b["value"]) for a, b in pairs),
                    "",
                    "",
                ]
            base = base or found

    def _rates(self) -> Block:
        head = ["per second, whole run", *("requests offered", "completed")]
        head += ["input tokens", "uncached", "output"]
        index = self._index
        found = [[index[run, name, "value"]["value"] for name in RATES] for run in self._runs]
        return [display.Table(head, self._with_ratios(found))]

    def _prefixes(self) -> Block:
        rows = [
            [
                p["run"],
                ("" if p["exact"] else "about ") + display.share(p["asked_share"]),
                display.share(p["got_share"]),
                display.figure(p["got_of_asked"]),
                display.count(p["requests"]),
                display.count(p["got_known"]),
            ]
            for p in self.prefixes
            if p["requests"] or p["got_known"]
        ]
        head = [
            "prefix reuse",
            "asked for",
            "got",
            "got / asked",
            "with hashes",
            "with cached tokens",
        ]
        return [display.Table(head, rows)] if rows else []

    def _concurrency(self) -> Block:
        index = self._index
        stats = ("mean", *PERCENTILES[:3], "max")
        found = [[index[run, "in_flight", s]["value"] for s in stats] for run in self._runs]
        return [display.Table(["in flight, over time", *stats], self._with_ratios(found))]

    def _with_ratios(self, found: Sequence[Sequence[float | None]]) -> list[list[str]]:
        rows = []
        for i, (run, values) in enumerate(zip(self._runs, found, strict=True)):
            rows.append([run, *map(display.figure, values)])
            if i:
                pairs = zip(values, found[0], strict=True)
                rows.append([_over(i), *(display.ratio(a, b) for a, b in pairs)])
        return rows

    def _stalls(self) -> Block:
        rows = [
            [
                s["run"],
                display.count(s["stalls"]),
                display.count(s["requests"]),
                display.duration(s["longest_us"] and s["longest_us"] * 1000),
                display.share(s["stalled_share"]),
                display.count(s["replies"]),
            ]
            for s in self.stalls
        ]
        head = ["stalls over 200 ms and 2 medians", "stalls", "requests hit", "longest"]
        return [display.Table([*head, "of decode time", "replies"], rows)] if rows else []

    def _phases(self) -> Block:
        """Means of a request, so that runs of different length stand side by side."""
        rows = []
        for p in self.phases or []:
            queue, low, high, *others = (
                display.duration(
                    None if p[f"{name}_s"] is None else 1e9 * p[f"{name}_s"] / p["requests"]
                )
                for name in ("queue", "queue_lo", "queue_hi", "prefill", "decode", "outside")
            )
            span = f"{low} .. {high}" if p["method"] == "stream" else "as reported"
            rows.append([p["run"], p["method"], queue, span, *others, display.count(p["requests"])])
        head = ["phases, mean", "told by", "queue", "between", "prefill", "decode", "outside", "n"]
        none: Block = [
            "no phases: too few streams to estimate them, or none that show a server's steps",
            "  (it batches by whole replies, or sends many tokens at a time)",
        ]
        return (
            [display.Table(head, rows, texts=2)] if rows else none[: 2 * (self.phases is not None)]
        )

    def _speculation(self) -> Block:
        """How much of what an engine drafted it kept, where its page counts that."""
        rows = [
            [
                s["run"],
                s["source"],
                *(display.count(int(s[k] or 0)) for k in ("drafts", "draft_tokens")),
                display.share(s["acceptance"]),
                display.figure(s["tokens_per_draft"]),
            ]
            for s in self.speculation
        ]
        head = ["speculation", "page", "drafts", "tokens drafted", "accepted", "tokens a draft"]
        return [display.Table(head, rows, texts=2)] if rows else []

    def _calibration(self) -> Block:
        """Sums of the phases beside those of the server's own histograms, where it has some."""
        rows = []
        for c in self.calibration or []:
            asked = ("tape", "tape_lo", "tape_hi", "server")
            tape, low, high, server = (
                display.duration(None if c[f"{name}_s"] is None else 1e9 * c[f"{name}_s"])
                for name in asked
            )
            between = f"{low} .. {high}" if c["tape_lo_s"] is not None else ""
            counts = (display.count(c["requests"]), display.count(int(c["server_requests"] or 0)))
            ratio = display.figure(c["tape_over_server"])
            told = c["method"] or display.NOTHING
            rows.append([c["run"], c["phase"], told, tape, between, server, ratio, *counts])
        head = ["phases, sum", "phase", "told by", "tape", "between", "/metrics", "tape / metrics"]
        head += ["n", "n of /metrics"]
        return [display.Table(head, rows, texts=3)] if rows else []

    def _interference(self) -> Block:
        rows = []
        for i in self.interference or []:
            parts = (f"{name}_s" for name in ("base", "prefill", "unexplained", "over"))
            rows.append(
                [
                    i["run"],
                    *(f"{100 * i[part] / i['decode_s']:.1f} %" for part in parts),
                    display.count(i["slow_gaps"]),
                    *(display.share(i[f"{which}_with_prefill"]) for which in ("slow", "all")),
                    display.figure(i["lift"]),
                ]
            )
        head = ["decode time", "base", "prefills", "unexplained", "(slower)", "slow gaps"]
        head += ["with prefill", "all gaps", "lift"]
        return [display.Table(head, rows)] if rows else []

    def _goodput(self) -> Block:
        rows = [
            [
                g["run"],
                g["slo"],
                display.share(g["attainment"]),
                _span(g["lo"], g["hi"]),
                display.figure(g["goodput_per_s"]),
                *(display.figure(g[verdict]) for verdict in slo.UNMET),
            ]
            for g in self.goodput
        ]
        unjudged = [
            f"! {g['run']}: {display.figure(g['unjudged'])} requests with no limit of {g['slo']} "
            "that applies to them count nowhere"
            for g in self.goodput
            if g["unjudged"]
        ]
        head = ["goodput", "SLO", "met", "95 %", "met/s", *slo.UNMET]
        return [display.Table(head, rows, texts=2), *unjudged] if rows else []

    def _steady(self) -> Block:
        """For replays: where ramp and drain are over."""
        starts = {t["run"]: t["from_ns"] for t in self.tapes if t["role"] == "replay"}
        lines: Block = []
        for s in (s for s in self.steady if s["run"] in starts):
            begin, end = (s[k] - starts[s["run"]] for k in ("from_ns", "until_ns"))
            window = (
                f"{display.duration(begin)} .. {display.duration(end)} after the first arrival: "
                f"{display.count(s['arrivals'])} arrivals, "
                f"{display.figure(s['in_flight'])} in flight"
            )
            told = f"none, {s['why']}" if s["why"] else window
            lines.append(f"steady window of {s['run']}: {told}")
        return lines

    def _clocks(self) -> Block:
        rows = []
        for quality in self.quality:
            run, lag_us = quality["run"], quality["lag_max_us"]
            rows.append(
                [
                    run,
                    *(self._clock(run, stamp) for stamp in ("arrival", "send", "event")),
                    display.duration(None if lag_us is None else lag_us * 1000),
                    display.count(quality["coalesced_reads"]),
                    display.count(quality["clamped_events"]),
                    display.count(quality["events_dropped"]),
                ]
            )
        head = [
            "stamps",
            "arrival",
            "send",
            "event",
            "read late max",
            "coalesced",
            "clamped",
            "dropped",
        ]
        return [display.Table(head, rows)] if rows else []

    def _clock(self, run: str, stamp: str) -> str:
        """The clock of a stamp; with how many rows each where a run has several."""
        found = [c for c in self.clocks if c["run"] == run and c["stamp"] == stamp]
        if len(found) == 1:
            return str(found[0]["clock"])
        return ", ".join(f"{c['clock']} {c['requests']:,}" for c in found) or display.NOTHING

    def _causes(self) -> Block:
        rows = [
            [
                c["run"],
                c["late_cause"],
                display.count(c["requests"]),
                display.duration(c["max_send_lag_ns"]),
                display.duration(c["max_schedule_lag_ns"]),
            ]
            for c in self.late_causes
        ]
        head = ["late by cause", "cause", "requests", "max after arrival", "max after plan"]
        return [display.Table(head, rows, texts=2)] if rows else []

    def _verdicts(self) -> Block:
        lines: Block = []
        for tape in self.tapes:
            if verdict := tape["facts"].get("verdict"):
                lines.append(f"verdict of {tape['run']}: {verdict['level']}")
                lines += [f"  {reason}" for reason in verdict["reasons"]]
                if beside := verdict.get("fidelity"):
                    lines.append(f"  beside its tape: {beside['says']}")
        return lines


def report(session: Session, *, phases: bool = False) -> Report:
    """The report on a session's tapes.

    phases: queue, prefill and decode as well, and what prefills cost others; some passes more.
    """
    return Report(**vars(ask(session, phases=phases)))


def _span(lo: float | None, hi: float | None) -> str:
    if lo is None or hi is None:
        return display.TOO_FEW
    return f"{100 * lo:.1f} .. {100 * hi:.1f}"


def _shown(row: Row) -> str:
    if row["value"] is None and row["n"]:
        return display.TOO_FEW
    return display.quantity(row["value"], row["unit"])


def _over(i: int) -> str:
    return f"#{i + 1} / #1"


def _whole(row: Row | None) -> int:
    return int(row["value"]) if row else 0


def _why(error: Row) -> str:
    parts = [f"status {error['http_status']}" if error["http_status"] else "", error["error_type"]]
    if error["retry_after_max_s"] is not None:
        parts.append(f"asked for waits of up to {error['retry_after_max_s']} s")
    told = ", ".join(p for p in parts if p) or "no reason recorded"
    return f"{told} (answered by the proxy)" if error["origin"] == "proxy" else told
