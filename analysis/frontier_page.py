"""The frontier as one HTML file: runs on a Pareto chart, their cost and energy, a table to copy."""

import io
from collections.abc import Iterator
from typing import Any

from tokentape.analysis import charts, display, page
from tokentape.analysis.charts import Chart
from tokentape.analysis.frontier import Frontier

_AXES = {
    "tokens_per_s_gpu": ("Speed of a user against output of a GPU", "tokens/s for each GPU"),
    "usd_per_m_output": ("Speed of a user against cost", "USD for a million output tokens"),
    "joules_per_output_token": ("Speed of a user against energy", "J for an output token"),
}
_COPIED = (
    *("run", "configuration", "part", "tokens_per_s_user", "tokens_per_s_user_lo"),
    *("tokens_per_s_user_hi", "tokens_per_s_gpu", "tokens_per_s_gpu_lo", "tokens_per_s_gpu_hi"),
    *("usd_per_m_output", "joules_per_output_token", "attainment", "of_light_speed"),
)


def page_of(found: Frontier) -> str:
    """The whole file."""
    drawn = list(_charts(found))
    figures = "".join(page.figure(chart) for chart in drawn)
    story: display.Block = [*(f"! {warning}" for warning in found.warnings), *found.story()]
    none = "<p>No run has both a speed for its users and one of these axes.</p>"
    sections = [
        (
            "frontier",
            "Frontier",
            page.Html(f'<div class="charts">{figures}</div>' if drawn else none),
        ),
        ("points", "Points", page.Html(page.table(found.table(), "Points") + _to_copy(found))),
    ]
    title = f"Frontier of {len(found.points)} runs"
    return page.page(title, sections, page.blocks([story], "What they say"), drawn)


def _charts(found: Frontier) -> Iterator[Chart]:
    for axis, (title, what) in _AXES.items():
        known = [
            p for p in found.points if p[axis] is not None and p["tokens_per_s_user"] is not None
        ]
        if known:
            parts = [p["part"] for p in known]
            words = f"{len(known)} runs, {parts.count('dominated')} of them dominated in tokens/s"
            words += f"; operating point {found.operating}." if found.operating else "."
            yield charts.pareto(axis, title, known, axis, what, words)


def _to_copy(found: Frontier) -> str:
    """The numbers as they are, separated by tabs: a spreadsheet takes them."""
    out = io.StringIO()
    for row in [_COPIED, *([_plain(p[name]) for name in _COPIED] for p in found.points)]:
        out.write("\t".join(row) + "\n")
    told = page.whole(out.getvalue())
    return f'<details><summary>To copy, with tabs</summary><pre tabindex="0">{told}</pre></details>'


def _plain(value: Any) -> str:
    return "" if value is None else " ".join(str(value).split())
