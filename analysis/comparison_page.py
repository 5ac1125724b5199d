"""A comparison as one HTML file that needs nothing else: tables, intervals drawn as inline SVG.

It shows what `Comparison` holds and computes nothing but where to draw.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from tokentape.analysis import display
from tokentape.analysis.compare import Comparison, Effect, percent, span

_WIDTH, _HEIGHT = 240, 18
_LEAST_REACH = 0.02  # of the axis, to both sides of no change
_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em;
  color: #222; background: #fff }
table { border-collapse: collapse } td, th { padding: .15em .7em; text-align: right }
td:first-child, th:first-child, td:nth-child(2), th:nth-child(2), td:nth-child(3),
th:nth-child(3) { text-align: left }
tr:nth-child(even) { background: #8881 } .higher { color: #b3261e } .lower { color: #16713a }
svg line, svg rect { stroke: currentColor; fill: currentColor } .warning { color: #8a5a00 }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818 }
  .higher { color: #ff8a80 } .lower { color: #7bd88f } .warning { color: #e6b450 } }
"""


def page(found: Comparison, gates: Mapping[str, str | None]) -> str:
    """The whole file; `gates` has why each fails, or None."""
    title = escape(f"{', '.join(found.a)} against {', '.join(found.b)}")
    reach = _reach(found.effects)
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>",
        *(f"<p>{escape(line)}</p>" for line in found.facts()),
        *(f'<p class="warning">⚠ {escape(warning)}</p>' for warning in found.warnings),
        *(_gate(gate, why) for gate, why in gates.items()),
        f"<p>Changes from A to B with 95 % intervals, on an axis of ±{reach:.0%}.</p>",
        "<table><thead><tr>",
        *(f"<th>{head}</th>" for head in ("group", "metric", "B is", "A", "B", "change")),
        "<th>95 %</th><th></th><th>n</th></tr></thead><tbody>",
        *(_row(effect, reach) for effect in found.effects),
        "</tbody></table></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _reach(effects: Sequence[Effect]) -> float:
    """Half of the axis: the farthest end of an interval of all requests, in whole per cent."""
    ends = [
        abs(end) for e in effects if e.group == "all" for end in (e.lo, e.hi) if end is not None
    ]
    return max([_LEAST_REACH, *ends]) * 1.05


def _gate(gate: str, why: str | None) -> str:
    return f"<p>{'✅' if why is None else '❌'} <code>{escape(gate)}</code> {escape(why or '')}</p>"


def _row(effect: Effect, reach: float) -> str:
    kind = effect.word if effect.word in ("higher", "lower") else ""
    cells = [
        effect.group,
        f"{effect.metric} {effect.stat}",
        effect.word,
        display.duration(effect.a),
        display.duration(effect.b),
        percent(effect.change),
        span(effect),
    ]
    told = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    drawn = "".join(_drawing(effect, reach))
    return f'<tr class="{kind}">{told}<td>{drawn}</td><td>{display.count(effect.n)}</td></tr>'


def _drawing(effect: Effect, reach: float) -> Iterator[str]:
    """The interval as a line, the change as a square; what lies beyond the axis is cut."""
    if effect.change is None or effect.lo is None or effect.hi is None:
        return
    lo, at, hi = (
        _WIDTH * (0.5 + min(max(x / reach, -1), 1) / 2)
        for x in (effect.lo, effect.change, effect.hi)
    )
    middle, half = _WIDTH / 2, _HEIGHT / 2
    size, label = f'width="{_WIDTH}" height="{_HEIGHT}"', escape(span(effect))
    yield f'<svg {size} role="img" aria-label="{label}">'
    yield f'<line x1="{middle}" x2="{middle}" y1="0" y2="{_HEIGHT}" opacity=".3"/>'
    yield f'<line x1="{lo:.1f}" x2="{hi:.1f}" y1="{half}" y2="{half}" stroke-width="2"/>'
    yield f'<rect x="{at - 3:.1f}" y="{half - 3}" width="6" height="6"/></svg>'
