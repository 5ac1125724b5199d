"""The shell of every HTML page: one file that needs no other, and that no network can reach.

Style, script and Vega lie in analysis/web/ and are copied in. A content policy in the head lets run
only the scripts of this file, by their hashes, and nothing be fetched. All text is escaped here.
"""

import base64
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from types import MappingProxyType

from tokentape.analysis import display
from tokentape.analysis.charts import Chart

_WEB = Path(__file__).parent / "web"
_VENDOR = ("vega.min.js", "vega-lite.min.js", "vega-embed.min.js")
LONGEST_NAME = 160  # characters of a name that are shown; a table would burst with more


_LONGEST_TEXT = 4000


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def text(value: str) -> Html:
    """Text as text, whatever it holds; a right-to-left name turns nothing around it."""
    if isinstance(value, Html):
        return value
    return Html(escape(display.cut(value, LONGEST_NAME)))


def whole(value: str) -> Html:
    """Text as text, however long."""
    return Html(escape(value))


def long(value: str) -> Html:
    """Text of which more is shown than of a name: a command line, facts."""
    return Html(escape(display.cut(value, _LONGEST_TEXT)))


def table(
    shown: display.Table,
    caption: str,
    links: Mapping[str, str] = MappingProxyType({}),
) -> Html:
    """A table that scrolls in its own box; a cell that is a key of `links` leads there."""
    head = "".join(
        f'<th scope="col"{_kind(i, shown)}>{text(name)}</th>' for i, name in enumerate(shown.head)
    )
    body = "".join(
        "<tr>" + "".join(_cell(cell, i, shown, links) for i, cell in enumerate(row)) + "</tr>"
        for row in shown.rows
    )
    label = escape(caption, quote=True)
    return Html(
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(cell: str, i: int, shown: display.Table, links: Mapping[str, str]) -> str:
    told = text(cell)
    if cell in links:
        told = Html(f'<a href="#{escape(links[cell], quote=True)}">{told}</a>')
    elif i < shown.texts:
        told = Html(f"<bdi>{told}</bdi>")
    return f"<td{_kind(i, shown)}>{told}</td>"


def _kind(i: int, shown: display.Table) -> str:
    return ' class="words"' if i < shown.texts else ""


def blocks(
    found: Iterable[display.Block],
    caption: str,
    links: Mapping[str, str] = MappingProxyType({}),
) -> Html:
    """The tables and lines of a report; a line that warns stands out."""
    made = []
    for part in (part for block in found for part in block):
        if isinstance(part, display.Table):
            made.append(table(part, f"{caption}: {part.head[0]}", links))
        else:
            kind = ' class="warning"' if part.startswith("!") else ""
            made.append(Html(f"<p{kind}>{text(part.removeprefix('! '))}</p>"))
    return Html("".join(made))


def figure(chart: Chart) -> Html:
    """The place of a chart, its words, and the numbers behind it."""
    name, said = escape(chart.name, quote=True), escape(chart.summary, quote=True)
    numbers = ""
    if chart.table is not None:
        numbers = f"<details><summary>Numbers</summary>{table(chart.table, chart.title)}</details>"
    return Html(
        f"<figure><figcaption><h3>{text(chart.title)}</h3><p>{text(chart.summary)}</p></figcaption>"
        f'<div class="chart" id="chart-{name}" role="img" aria-label="{said}"></div>'
        f"{numbers}</figure>"
    )


def section(name: str, title: str, *parts: str) -> Html:
    """A part of a page with its heading; empty where it has nothing to say."""
    told = "".join(parts)
    return Html(f'<section id="{name}"><h2>{text(title)}</h2>{told}</section>' if told else "")


def page(
    title: str, sections: Sequence[tuple[str, str, Html]], lead: Html, charts: Sequence[Chart]
) -> str:
    """The whole file; sections are (name, title, HTML), those that are empty are left out."""
    kept = [(name, head, html) for name, head, html in sections if html]
    links = "".join(f'<li><a href="#{name}">{text(head)}</a></li>' for name, head, _ in kept)
    scripts = [*_scripts()] if charts else []
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts) or "'none'"
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:"
    policy += "; base-uri 'none'; form-action 'none'"
    drawn = "".join(f"<script>{script}</script>" for script in scripts)
    if charts:
        data = json.dumps([chart.as_dict() for chart in charts], separators=(",", ":"))
        drawn = f'<script type="application/json" id="charts">{_inert(data)}</script>{drawn}'
    body = "".join(section(name, head, html) for name, head, html in kept)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f'<meta name="color-scheme" content="light dark"/><title>{text(title)}</title>'
        f"<style>{_read('page.css')}</style></head><body>"
        f'<a class="skip" href="#main">Skip to the content</a><header><h1>{text(title)}</h1>{lead}'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header><main id="main">{body}</main>'
        f"{drawn}</body></html>\n"
    )


def _inert(data: str) -> str:
    """JSON that ends no script, whatever names it holds."""
    return data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@functools.cache
def _scripts() -> tuple[str, ...]:
    return tuple(_read(name) for name in (*(f"vendor/{v}" for v in _VENDOR), "page.js"))


@functools.cache
def _read(name: str) -> str:
    lines = (_WEB / name).read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("//# sourceMappingURL"))


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
