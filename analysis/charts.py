"""Charts as Vega-Lite specifications over rows that SQL has binned, each with its words.

Colours are CSS variables of the page, so that one drawing serves light, dark and print; runs differ
in dashes as well as in colour. Nothing is computed here but where to draw.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokentape.analysis import display

Row = dict[str, Any]

# What the axes of durations say, in ms, with a unit that fits.
_MS = (
    "datum.value >= 1000 ? format(datum.value / 1000, '~g') + ' s' : "
    "datum.value >= 1 ? format(datum.value, '~g') + ' ms' : "
    "format(datum.value * 1000, '~g') + ' us'"
)
_COLOURS = [f"var(--c{i})" for i in range(1, 7)]
_DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 4], [1, 3]]
_LABELS = {"p50": -5, "p90": -5, "p99": -5, "p99.9": 14}  # p99 and p99.9 are near each other
_FEW_DECADES = 4
MOST_LINES = len(_COLOURS)


@dataclass(frozen=True)
class Chart:
    """One figure: a title, a summary that says in words what it shows, and the numbers behind it.

    Rows are tuples in the order of `names`; `table` is for readers and may be coarser.
    """

    name: str
    title: str
    summary: str
    spec: dict[str, Any]
    names: Sequence[str]
    rows: Sequence[Sequence[Any]]
    table: display.Table | None = None

    def as_dict(self) -> dict[str, Any]:
        """What the page's script draws: five digits of a number, more than a screen shows."""
        rows = [[_rounded(cell) for cell in row] for row in self.rows]
        return {"name": self.name, "spec": self.spec, "names": list(self.names), "rows": rows}


@dataclass(frozen=True)
class Line:
    """A series over time: `key` of its rows, and its name."""

    key: str
    title: str
    rows: Sequence[Row] = field(default_factory=list)


def cdf(name: str, title: str, rows: Sequence[Row], marks: Sequence[Row], words: str) -> Chart:
    """Cumulative distributions of runs on a log axis; marks have run, value_ms, below and stat."""
    several = len({row["run"] for row in rows}) > 1
    runs = list(dict.fromkeys(row["run"] for row in rows))[:MOST_LINES]
    both = [{**row, "stat": ""} for row in rows if row["run"] in runs]
    both += [mark for mark in marks if mark["run"] in runs]
    names = ("run", "value_ms", "below", "stat")
    x = _log_axis("value_ms", both)
    y: dict[str, Any] = {"field": "below", "type": "quantitative", "title": "at most so long"}
    y |= {"axis": {"format": "%"}, "scale": {"domain": [0, 1]}}
    layers: list[dict[str, Any]] = [
        {
            "transform": [{"filter": "datum.stat === ''"}],
            "mark": {"type": "line", "interpolate": "step-after", "strokeWidth": 2},
            "encoding": {"strokeDash": _by_run("range", _DASHES, runs, legend=several)},
        },
        {
            "transform": [{"filter": "datum.stat !== ''"}],
            "mark": {"type": "point", "filled": True, "size": 45, "opacity": 1},
            "encoding": {"tooltip": _tips("run", "stat", "value_ms")},
        },
        *(_labels(runs[0], stat, dy) for stat, dy in _LABELS.items()),
    ]
    colour = _by_run("range", _COLOURS, runs, legend=several)
    spec = _spec({"layer": layers, "encoding": {"x": x, "y": y, "color": colour}}, 260)
    shown = [[m["run"], m["stat"], display.duration(m["value_ms"] * 1e6)] for m in marks]
    table = display.Table(["run", "percentile", title], shown, texts=2)
    return Chart(name, title, words, spec, names, [_picked(row, names) for row in both], table)


def _labels(run: str, stat: str, dy: int) -> dict[str, Any]:
    """The name of a percentile beside its mark, for the first run only."""
    mark = {"type": "text", "align": "right", "dx": -7, "dy": dy}
    encoding = {"text": {"field": "stat"}, "color": {"value": "var(--ink)"}}
    chosen = {"filter": f"datum.stat === '{stat}' && datum.run === {_text(run)}"}
    return {"transform": [chosen], "mark": mark, "encoding": encoding}


def heat(name: str, title: str, rows: Sequence[Row], width_s: float, words: str) -> Chart:
    """Counts by time and by duration on a log axis; darker where there are more."""
    names = ("from_s", "from_ms", "until_ms", "n")
    encoding = {
        "x": _seconds(rows, width_s),
        "x2": {"field": "until_s"},
        "y": _log_axis("from_ms", rows, "until_ms"),
        "y2": {"field": "until_ms"},
        "tooltip": _tips("from_s", "from_ms", "until_ms", "n"),
    }
    until = {"calculate": f"datum.from_s + {width_s}", "as": "until_s"}
    spec = _spec(_cells(encoding) | {"transform": [until]}, 220)
    return Chart(name, title, words, spec, names, [_picked(row, names) for row in rows])


def prompts(name: str, title: str, rows: Sequence[Row], what: str, words: str) -> Chart:
    """TTFT against prompt tokens, both on log axes, as counts."""
    names = ("from_tokens", "until_tokens", "from_ms", "until_ms", "n")
    encoding = {
        "x": _log_axis("from_tokens", rows, "until_tokens", title=what, tokens=True),
        "x2": {"field": "until_tokens"},
        "y": _log_axis("from_ms", rows, "until_ms"),
        "y2": {"field": "until_ms"},
        "tooltip": _tips(*names),
    }
    return Chart(
        name, title, words, _spec(_cells(encoding), 260), names, [_picked(r, names) for r in rows]
    )


def lines(
    name: str, title: str, series: Sequence[Line], width_s: float, words: str, form: str = "~s"
) -> Chart:
    """Series over time, a step for each slice."""
    titles = [line.title for line in series]
    rows = [
        (row["from_s"], line.title, row[line.key])
        for line in series
        for row in line.rows
        if row[line.key] is not None
    ]
    y = {"field": "value", "type": "quantitative", "title": None}
    several = len(series) > 1
    encoding = {
        "x": _seconds(rows, width_s),
        "y": y | {"axis": {"format": form}, "scale": {"zero": True}},
        "color": _by_run("range", _COLOURS, titles, legend=several, field="series"),
        "strokeDash": _by_run("range", _DASHES, titles, legend=several, field="series"),
        "tooltip": _tips("from_s", "series", "value"),
    }
    mark = {"type": "line", "interpolate": "step-after", "strokeWidth": 1.6, "point": len(rows) < 3}
    spec = _spec({"mark": mark, "encoding": encoding}, 140)
    return Chart(
        name, title, words, spec, ("from_s", "series", "value"), rows, _times(rows, titles)
    )


def phases(name: str, title: str, rows: Sequence[Row], width_s: float, words: str) -> Chart:
    """Mean phases of the requests that arrived in each slice, stacked."""
    order = ["queue", "prefill", "decode", "outside"]
    long = []
    for row in rows:
        top = 0.0
        for phase in order:
            mean = row[f"{phase}_ms"] or 0.0
            long.append((row["from_s"], phase, mean, row["n"], top, top + mean))
            top += mean
    names = ("from_s", "phase", "mean_ms", "n", "low_ms", "high_ms")
    high = {"field": "high_ms", "type": "quantitative", "title": "mean of a request"}
    encoding = {
        "x": _seconds(rows, width_s),
        "x2": {"field": "until_s"},
        "y": high | {"axis": {"labelExpr": _MS}},
        "y2": {"field": "low_ms"},
        "color": _by_run("range", _COLOURS, order, legend=True, field="phase"),
        "tooltip": _tips("from_s", "phase", "mean_ms", "n"),
    }
    until = {"calculate": f"datum.from_s + {width_s}", "as": "until_s"}
    mark = {"type": "rect", "stroke": "var(--paper)", "strokeWidth": 0.4}
    spec = _spec({"transform": [until], "mark": mark, "encoding": encoding}, 200)
    return Chart(name, title, words, spec, names, long, _times(long, order, ms=True))


def pareto(name: str, title: str, points: Sequence[Row], y: str, what: str, words: str) -> Chart:
    """Runs by tokens/s for each user and by `y`; dominated ones dimmed, the frontier joined."""
    names = ("run", "configuration", "tokens_per_s_user", y, "part", "on_frontier")
    known = [p | {"on_frontier": p["dominated"] is False} for p in points if p[y] is not None]
    known = [p for p in known if p["tokens_per_s_user"] is not None]
    parts = ["operating point", "frontier", "dominated", "not placed"]
    shape = _by_run(
        "range", ["diamond", "circle", "cross", "square"], parts, legend=True, field="part"
    )
    dim = {"test": "datum.part === 'dominated'", "value": 0.35}
    place = {
        "x": _value("tokens_per_s_user", "tokens/s for each user"),
        "y": _value(y, what),
    }
    dots: dict[str, Any] = {
        "mark": {"type": "point", "filled": True, "size": 110, "color": "var(--c1)"},
        "encoding": {
            "shape": shape,
            "opacity": {"condition": dim, "value": 1},
            "tooltip": _tips("run", "configuration", "part", "tokens_per_s_user", y),
        },
    }
    joined: dict[str, Any] = {
        "transform": [{"filter": "datum.on_frontier"}],
        "mark": {"type": "line", "color": "var(--c1)", "strokeWidth": 1.5},
        "encoding": {"order": {"field": "tokens_per_s_user", "type": "quantitative"}},
    }
    labels: dict[str, Any] = {
        "mark": {"type": "text", "align": "left", "dx": 8, "dy": -6, "limit": 140},
        "encoding": {"text": {"field": "run"}, "color": {"value": "var(--ink)"}},
    }
    layers = [joined, dots, labels] if y == "tokens_per_s_gpu" else [dots, labels]
    spec = _spec({"layer": layers, "encoding": place}, 320)
    return Chart(name, title, words, spec, names, [_picked(p, names) for p in known])


def _value(name: str, title: str) -> dict[str, Any]:
    axis = {"format": "~s"}
    scale = {"zero": True}
    return {"field": name, "type": "quantitative", "title": title, "axis": axis, "scale": scale}


def _times(
    rows: Sequence[Sequence[Any]], titles: Sequence[str], *, ms: bool = False
) -> display.Table:
    """A row for each slice, a column for each series."""
    found = {(row[0], row[1]): row[2] for row in rows}
    shown = [
        [
            f"{start:.1f}",
            *(
                display.duration(None if (v := found.get((start, t))) is None else v * 1e6)
                if ms
                else display.figure(found.get((start, t)))
                for t in titles
            ),
        ]
        for start in sorted({row[0] for row in rows})
    ]
    return display.Table(["second", *titles], shown)


def _spec(body: dict[str, Any], height: int) -> dict[str, Any]:
    return {"width": "container", "height": height, "autosize": {"type": "fit-x"}} | body


def _cells(encoding: dict[str, Any]) -> dict[str, Any]:
    shade: dict[str, Any] = {"field": "n", "type": "quantitative", "legend": None}
    shade |= {"scale": {"type": "sqrt", "range": [0.15, 1], "zero": True}}
    mark = {"type": "rect", "fill": "var(--c1)"}
    return {"mark": mark, "encoding": encoding | {"fillOpacity": shade}}


def _seconds(rows: Sequence[Any], width_s: float) -> dict[str, Any]:
    """The axis of time, as long as its chart's last slice."""
    starts = [row["from_s"] if isinstance(row, dict) else row[0] for row in rows]
    scale = {"nice": False, "domain": [0, max(starts, default=0) + width_s]}
    title = "seconds after the first arrival"
    return {"field": "from_s", "type": "quantitative", "title": title, "scale": scale}


def _log_axis(
    name: str,
    rows: Sequence[Row],
    until: str = "",
    *,
    title: str | None = None,
    tokens: bool = False,
) -> dict[str, Any]:
    """A log axis with ticks at 1, 2, 5, 10, ... that spans what is drawn."""
    low = min(row[name] for row in rows)
    high = max(row[until or name] for row in rows)
    scale = {"type": "log", "nice": False, "domain": [low, max(high, low * 1.1)]}
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= _FEW_DECADES else (1,)
    ticks = [step * 10.0**d for d in decades for step in steps]
    axis: dict[str, Any] = {"values": ticks, "labelOverlap": True}
    axis |= {"format": "~s"} if tokens else {"labelExpr": _MS}
    return {"field": name, "type": "quantitative", "title": title, "scale": scale, "axis": axis}


def _by_run(
    kind: str, values: Sequence[Any], domain: Sequence[str], *, legend: bool, field: str = "run"
) -> dict[str, Any]:
    scale = {"domain": list(domain), kind: list(values[: len(domain)])}
    shown = {"title": None, "orient": "top", "columns": 2, "labelLimit": 320} if legend else None
    return {"field": field, "type": "nominal", "scale": scale, "legend": shown}


def _tips(*names: str) -> list[dict[str, Any]]:
    words = {"run", "stat", "series", "phase", "configuration", "part"}
    return [
        {"field": n, "title": n.replace("_", " ")}
        | ({"type": "nominal"} if n in words else {"type": "quantitative", "format": ".4~g"})
        for n in names
    ]


def _picked(row: Row, names: Sequence[str]) -> list[Any]:
    return [row[name] for name in names]


def _text(value: str) -> str:
    """A literal of Vega's expressions, whatever a run is named."""
    quoted = "".join(
        c if c.isalnum() else f"\\u{ord(c):04x}" if ord(c) < 0x10000 else c for c in value
    )
    return f"'{quoted}'"


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def series_by_run(rows: Sequence[Row], key: str, titles: dict[str, str]) -> Iterator[Line]:
    """One line for each run that has the key at all, up to as many as can be told apart."""
    for run, title in list(titles.items())[:MOST_LINES]:
        found = [row for row in rows if row["run"] == run and row[key] is not None]
        if found:
            yield Line(key, title, found)
