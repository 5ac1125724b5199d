"""Comparisons and trends for machines: JUnit XML for CI, Markdown for a job's summary page."""

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence

from tokentape.analysis import display
from tokentape.analysis.compare import Comparison
from tokentape.analysis.effects import Effect
from tokentape.analysis.trend import Trend

_SHOWN_IN_SUMMARY = ("p50", "p99")


def junit(found: Comparison, gates: Mapping[str, str | None]) -> str:
    """JUnit XML: one test case for each gate; `gates` has why it fails, or None.

    Without gates the one case that is there passes and holds the text, so that a page shows it.
    """
    facts = {"pairs": found.pairs} | {f"failed {s}": v for s, v in found.failed.items()}
    name = f"{', '.join(found.a)} against {', '.join(found.b)}"
    return _suite("compare", name, facts, found.text(), gates)


def trend_junit(found: Trend, gates: Mapping[str, str | None]) -> str:
    """The same for a trend: its gates hold the latest run against those before."""
    name = f"{found.runs[-1]} after {len(found.runs) - 1} runs"
    return _suite("trend", name, {"runs": len(found.runs)}, found.text(), gates)


def _suite(
    verb: str,
    name: str,
    facts: Mapping[str, float],
    text: str,
    gates: Mapping[str, str | None],
) -> str:
    failed = sum(why is not None for why in gates.values())
    suite = ET.Element(
        "testsuite", name=name, tests=str(max(len(gates), 1)), failures=str(failed), errors="0"
    )
    properties = ET.SubElement(suite, "properties")
    for key, value in facts.items():
        ET.SubElement(properties, "property", name=key, value=str(value))
    for gate, why in gates.items() or {verb: None}.items():
        case = ET.SubElement(suite, "testcase", classname=f"tokentape.{verb}", name=gate)
        if why is not None:
            ET.SubElement(case, "failure", message=why).text = why
    ET.SubElement(suite, "system-out").text = text
    ET.indent(suite)
    return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def markdown(found: Comparison, gates: Mapping[str, str | None]) -> str:
    """GitHub-flavoured Markdown: the gates, the warnings, the changes over all requests."""
    lines = [
        f"### {_cell(', '.join(found.a))} against {_cell(', '.join(found.b))}",
        "",
        *(f"{_cell(line)}  " for line in found.facts()),
        "",
        *_told(gates),
        *(f"- ⚠️ {_cell(warning)}" for warning in found.warnings),
        "",
        "| metric | B is | A | B | change | 95 % | n |",
        "|---|---|--:|--:|--:|--:|--:|",
        *_rows(found.effects),
    ]
    return "\n".join(lines) + "\n"


def trend_markdown(found: Trend, gates: Mapping[str, str | None]) -> str:
    """The same for a trend: the gates, then each metric with its first and latest value."""
    lines = [
        f"### {_cell(found.runs[-1])} after {len(found.runs) - 1} runs",
        "",
        *_told(gates),
        "",
        "| metric | over the runs | first | latest | changed from |",
        "|---|---|--:|--:|---|",
    ]
    for s in found.series:
        first, latest = (display.quantity(s.values[i], s.unit) for i in (0, -1))
        changes = ", ".join(f"{_cell(c.at)} {100 * c.change:+.1f} %" for c in s.changes)
        lines.append(f"| {s.metric} {s.stat} | {s.word} | {first} | {latest} | {changes} |")
    return "\n".join(lines) + "\n"


def _told(gates: Mapping[str, str | None]) -> Iterator[str]:
    for gate, why in gates.items():
        yield f"- {'✅' if why is None else '❌'} `{gate}`{_because(why)}"


def _rows(effects: Sequence[Effect]) -> Iterator[str]:
    for e in effects:
        if e.group == "all" and e.stat in _SHOWN_IN_SUMMARY:
            change = display.NOTHING if e.change is None else f"{100 * e.change:+.1f} %"
            known = e.lo is not None and e.hi is not None
            span = f"{100 * (e.lo or 0):+.1f} .. {100 * (e.hi or 0):+.1f} %" if known else "too few"
            sides = f"{display.duration(e.a)} | {display.duration(e.b)}"
            yield f"| {e.metric} {e.stat} | {e.word} | {sides} | {change} | {span} | {e.n:,} |"


def _because(why: str | None) -> str:
    return "" if why is None else f": {_cell(why)}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
