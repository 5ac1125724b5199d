"""A comparison as one HTML file that needs nothing else: tables, intervals drawn as inline SVG.

It shows what `Comparison` holds and computes nothing but where to draw.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from tokentape.analysis import display
from tokentape.analysis import page as pages
from tokentape.analysis.compare import Comparison, percent, span
from tokentape.analysis.effects import Effect

_WIDTH, _HEIGHT = 240, 18
_WORDS = 3  # columns
_LEAST_REACH = 0.02  # of the axis, to both sides of no change


def page(found: Comparison, gates: Mapping[str, str | None]) -> str:
    """The whole file; `gates` has why each fails, or None."""
    reach = _reach(found.effects)
    lead = "".join(f"<p>{pages.whole(line)}</p>" for line in found.facts())
    warned: display.Block = [f"! {warning}" for warning in found.warnings]
    words = ("group", "metric", "B is")
    heads = "".join(f'<th scope="col" class="words">{head}</th>' for head in words)
    heads += "".join(f'<th scope="col">{h}</th>' for h in ("A", "B", "change", "95 %", "", "n"))
    changes = (
        f"<p>Changes from A to B with 95 % intervals, on an axis of ±{reach:.0%}.</p>"
        '<div class="scroll" role="region" tabindex="0" aria-label="Changes">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>"
        f"{''.join(_row(effect, reach) for effect in found.effects)}</tbody></table></div>"
    )
    gated = "".join(_gate(gate, why) for gate, why in gates.items())
    sections = [
        ("gates", "Gates", pages.Html(gated)),
        ("warnings", "Warnings", pages.blocks([warned], "Warnings")),
        ("changes", "Changes", pages.Html(changes)),
    ]
    title = f"{', '.join(found.a)} against {', '.join(found.b)}"
    return pages.page(title, sections, pages.Html(lead), [])


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
    told = "".join(
        f"<td{' class="words"' if i < _WORDS else ''}>{pages.text(cell)}</td>"
        for i, cell in enumerate(cells)
    )
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
