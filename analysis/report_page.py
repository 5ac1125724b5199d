"""The report as one HTML file: the tables of the text report, charts and intervals beside them.

Every figure comes from the same rows as the text, or from a query of chart_rows. A chart that has
no data is left out.
"""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import numpy as np
import pyarrow as pa

from tokentape.analysis import catalogue, chart_rows, charts, display, page, statistics
from tokentape.analysis import tails as tail_groups
from tokentape.analysis.chart_rows import ChartRows
from tokentape.analysis.charts import Chart
from tokentape.analysis.report import PERCENTILES, Report
from tokentape.analysis.session import Session

Row = dict[str, Any]

MOST_MAPS = 3  # runs that get maps of their own: a map has up to 2,160 cells
_CDFS = {"ttft": "TTFT from send", "itl_user": "ITL user", "e2e": "E2E from send"}
_MAPS = {"ttft": "TTFT by arrival", "e2e": "E2E by arrival", "icl": "Gaps between events"}
_ZEROS = ". Tokens that came in one event with the one before waited 0: left of the axis."
_BELOW = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
_LEVELS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_VERDICTS = ("valid", "suspect", "invalid")
_FACTS = ("tape_id", "role", "command", "versions", "candidate", "source", "content", "options")


def page_of(session: Session, found: Report, version: str) -> str:
    """The whole file. The report must be of this session; `version` is that of tokentape."""
    spans = [t["until_ns"] - t["from_ns"] for t in found.tapes if t["until_ns"] is not None]
    rows = chart_rows.ask(session, max(spans, default=1), phases=found.phases is not None)
    parts = found.parts()
    links = {title: f"def-{metric}" for metric, title in found.titles.items()}
    drawn = {
        "distributions": list(_distributions(found, rows)),
        "over-time": list(_over_time(found, rows)),
        "maps": list(_maps(found, rows)),
    }
    sections = [
        ("headline", "Headline", _headline(session, found, rows, links)),
        ("outcomes", "Outcomes", page.blocks(parts["outcomes"], "Outcomes")),
        ("distributions", "Distributions", _grid(drawn["distributions"])),
        ("maps", "Latency over time", _grid(drawn["maps"])),
        ("over-time", "Load over time", _grid(drawn["over-time"])),
        ("latency", "Latency in numbers", page.blocks(parts["latency"], "Latency", links)),
        ("throughput", "Throughput and reuse", page.blocks(parts["throughput"], "Throughput")),
        ("tails", "What the slowest share", _tails(session)),
        ("quality", "Quality of the measurement", page.blocks(parts["quality"], "Quality", links)),
        ("definitions", "Definitions", _definitions()),
        ("made", "What made it", _made(found, version)),
    ]
    title = f"Report: {', '.join(t['run'] for t in found.tapes)}"
    lead = page.blocks(parts["tapes"], "Tapes")
    every = [chart for some in drawn.values() for chart in some]
    return page.page(title, sections, lead, every)


def _grid(some: Sequence[Chart]) -> page.Html:
    told = "".join(page.figure(chart) for chart in some)
    return page.Html(f'<div class="charts">{told}</div>' if told else "")


def _headline(session: Session, found: Report, rows: ChartRows, links: dict[str, str]) -> page.Html:
    """Verdicts, and the latencies of requests with block bootstrap intervals."""
    samples = rows.samples
    lines: list[list[str]] = []
    keys = [np.array(samples[name].to_pylist(), dtype=object) for name in ("run", "metric")]
    for metric in ("ttft", "tpot", "e2e"):
        for run in session.labels:
            taken = samples.filter(pa.array((keys[0] == run) & (keys[1] == metric)))
            value, at_ns, weight = (taken[c].to_numpy() for c in ("value", "arrival_ns", "weight"))
            known = ~np.isnan(value)
            told = [
                statistics.estimate(value[known], at_ns[known], p, weight[known])
                for p in _LEVELS.values()
            ]
            cells = [cell for one in told for cell in _estimated(one)]
            lines.append([found.titles[metric], run, *cells, display.count(int(known.sum()))])
    head = ["metric", "run", *(c for p in _LEVELS for c in (p, "95 %")), "n"]
    rates = [[g["run"], g["slo"], *_attained(g)] for g in found.goodput]
    goodput = display.Table(["goodput", "SLO", "met", "95 %", "met/s"], rates, texts=2)
    return page.Html(
        "".join(_verdicts(found))
        + page.table(display.Table(head, lines, texts=2), "Headline", links)
        + (page.table(goodput, "Goodput") if rates else "")
        + "<p>Intervals: block bootstrap over time; none where a run is too short for one.</p>"
    )


def _estimated(one: statistics.Estimate) -> list[str]:
    if one.value is None:
        return [display.TOO_FEW if one.n else display.NOTHING, ""]
    if one.lo is None or one.hi is None:
        return [display.duration(one.value), display.TOO_FEW]
    return [
        display.duration(one.value),
        f"{display.duration(one.lo)} .. {display.duration(one.hi)}",
    ]


def _attained(row: Row) -> list[str]:
    known = row["lo"] is not None and row["hi"] is not None
    span = f"{100 * row['lo']:.1f} .. {100 * row['hi']:.1f}" if known else display.TOO_FEW
    return [display.share(row["attainment"]), span, display.figure(row["goodput_per_s"])]


def _verdicts(found: Report) -> Iterator[str]:
    for tape in found.tapes:
        verdict = tape["facts"].get("verdict")
        if not verdict:
            continue
        level = (
            verdict["level"] if verdict["level"] in ("valid", "suspect", "invalid") else "suspect"
        )
        why = "; ".join(verdict["reasons"])
        beside = (verdict.get("fidelity") or {}).get("says")
        told = " ".join([why, f"Beside its tape: {beside}" if beside else ""]).strip()
        yield f'<p><span class="badge {level}">{level}</span> <bdi>{page.text(tape["run"])}</bdi>'
        yield f" {escape(told)}</p>"


def _distributions(found: Report, rows: ChartRows) -> Iterator[Chart]:
    index = {(r["run"], r["metric"], r["stat"]): r for r in found.metrics}
    for metric, title in _CDFS.items():
        mine = [row for row in rows.cdf if row["metric"] == metric]
        if not mine:
            continue
        marks = [
            {"run": run, "value_ms": value / 1e6, "below": _BELOW[stat], "stat": stat}
            for run in dict.fromkeys(row["run"] for row in mine)
            for stat in PERCENTILES
            if (value := index[run, metric, stat]["value"])
        ]
        words = _in_words(marks) + (_ZEROS if metric == "itl_user" else "")
        yield charts.cdf(metric, title, mine, marks, words)
    for run in list(dict.fromkeys(row["run"] for row in rows.prompts))[:MOST_MAPS]:
        points = [row for row in rows.prompts if row["run"] == run]
        what = "uncached prompt tokens" if points[0]["told"] else "prompt tokens"
        n = display.figure(sum(row["n"] for row in points))
        words = f"{n} requests of {display.cut(run, 60)} whose {what} are known, darker where more."
        if not points[0]["told"]:
            words += " The server does not say what its cache held."
        title = f"TTFT against {what}"
        yield charts.prompts(f"prompts-{_place(found, run)}", title, points, what, words)


def _in_words(marks: Sequence[Row]) -> str:
    runs = dict.fromkeys(mark["run"] for mark in marks)
    told = [
        f"{display.cut(run, 60)}: "
        + ", ".join(
            f"{m['stat']} {display.duration(m['value_ms'] * 1e6)}" for m in marks if m["run"] == run
        )
        for run in runs
    ]
    return "; ".join(told) or "Too few values for percentiles."


def _maps(found: Report, rows: ChartRows) -> Iterator[Chart]:
    for run in [t["run"] for t in found.tapes][:MOST_MAPS]:
        for metric, what in _MAPS.items():
            cells = [r for r in rows.heat if (r["run"], r["metric"]) == (run, metric)]
            if cells:
                words = _slowest(run, [r for r in rows.by_slice if r["run"] == run], metric)
                name = f"{metric}-map-{_place(found, run)}"
                yield charts.heat(name, what, cells, rows.slice_s, words)
        some = [r for r in rows.phases if r["run"] == run]
        if some:
            words = f"{display.cut(run, 60)}: mean of the requests that arrived in each slice."
            name = f"phases-{_place(found, run)}"
            yield charts.phases(name, "Phases, stacked", some, rows.slice_s, words)


def _slowest(run: str, by_slice: Sequence[Row], metric: str) -> str:
    mine = [row for row in by_slice if row["metric"] == metric]
    told = f"{display.cut(run, 60)}, darker where there are more."
    if not mine:
        return told
    worst = max(mine, key=lambda row: float(row["p50_ms"]))
    return f"{told} Slowest slice: from second {worst['from_s']:.0f}, median " + display.duration(
        worst["p50_ms"] * 1e6
    )


def _over_time(found: Report, rows: ChartRows) -> Iterator[Chart]:
    titles = {t["run"]: display.cut(t["run"], 40) for t in found.tapes}
    for key, title, words in (
        ("in_flight", "Requests in flight", "Mean of each slice."),
        ("output_tokens_per_s", "Output tokens per second", "Tokens that arrived in each slice."),
        ("offered_per_s", "Requests offered per second", "Arrivals in each slice."),
        (
            "failed_per_s",
            "Failures per second",
            "Requests that ended badly in each slice.",
        ),
    ):
        if key == "failed_per_s" and not any(row[key] for row in rows.rates):
            continue
        series = list(charts.series_by_run(rows.rates, key, titles))
        if series:
            yield charts.lines(key, title, series, rows.slice_s, words)
    for key, title, words in (
        ("running", "Requests in the server's batch", "As the server's own page says."),
        ("waiting", "Requests in the server's queue", "As the server's own page says."),
        ("kv_used", "Use of the KV cache", "Share, as the server's own page says."),
    ):
        series = list(charts.series_by_run(rows.servers, key, titles))
        if series:
            form = "%" if key == "kv_used" else "~s"
            yield charts.lines(key, title, series, rows.slice_s, words, form)


def _place(found: Report, run: str) -> int:
    return [t["run"] for t in found.tapes].index(run)


def _tails(session: Session) -> page.Html:
    """The groups of each run's slowest hundredth by TTFT, as `tokentape tails` finds them."""
    told: list[str] = []
    for tail in tail_groups.tails(session, "ttft", "p99"):
        run = display.cut(tail.run, 60)
        if tail.threshold_ns is None:
            told.append(f"<p>{page.text(run)}: too few requests to have a p99.</p>")
            continue
        over = display.duration(tail.threshold_ns)
        told.append(
            f"<p><bdi>{page.text(run)}</bdi>: {tail.in_tail} of {tail.n:,} requests have a TTFT "
            f"over {over}. A lift says how many times as common a property is among them: a place "
            "to look, no proof.</p>"
        )
        shown = tail.groups_table()
        none = "<p>Nothing is clearly more common among them than by chance.</p>"
        told.append(page.table(shown, f"Tail of {run}") if shown.rows else none)
    return page.Html("".join(told))


def _definitions() -> page.Html:
    told = []
    for metric in catalogue.metrics():
        lines = (
            ("Formula", metric.formula),
            ("Unit", metric.unit),
            ("Undefined when", metric.undefined_when),
            ("Differs from", metric.differs_from),
        )
        body = "<br>".join(f"{name}: {escape(said)}" for name, said in lines)
        told.append(f'<dt id="def-{metric.name}">{escape(metric.title)}</dt><dd>{body}</dd>')
    return page.Html(f"<dl>{''.join(told)}</dl>")


def _made(found: Report, version: str) -> page.Html:
    told = [f"<p>Written by tokentape {escape(version)}; it reads nothing but itself.</p>"]
    for tape in found.tapes:
        facts = tape["facts"]
        rows = [[name, page.long(_fact(facts[name]))] for name in _FACTS if facts.get(name)]
        shown = display.Table(["fact", display.cut(tape["run"], 60)], rows, texts=2)
        told.append(page.table(shown, f"Facts of {display.cut(tape['run'], 60)}"))
    return page.Html("".join(told))


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        known = {k: v for k, v in value.items() if v not in (None, "", [], {})}
        return ", ".join(f"{k}={_fact(v)}" for k, v in known.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
