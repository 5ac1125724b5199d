"""How `info` tells what a tape holds: a name and one line for each thing, for people.

The figures are traces/summary.py's; `--json` prints those as they are. No figure is made here.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokentape.traces.arrivals import Arrivals
    from tokentape.traces.summary import Lengths, Summary

_NS = {"h": 3600 * 10**9, "min": 60 * 10**9, "s": 10**9, "ms": 10**6, "us": 10**3}


def lines_of(summary: "Summary") -> Iterator[tuple[str, str]]:
    """(name, text), what does not apply left out."""
    yield from _arrivals(summary.arrivals, summary.requests)
    for name, lengths in (("prompts", summary.input_tokens), ("outputs", summary.output_tokens)):
        yield name, _lengths(lengths, summary.requests)
    yield "sessions", _sessions(summary)
    yield "prefixes", _prefixes(summary)
    yield "streams", f"{summary.streamed} asked for, {summary.events} events"
    for name, counts in summary.words.items():
        yield name, ", ".join(f"{word} {n}" for word, n in counts.items())
    if summary.lacks:
        yield "lacks", "; ".join(summary.lacks)


def _arrivals(found: "Arrivals", requests: int) -> Iterator[tuple[str, str]]:
    if found.per_s is None or found.first_ns is None or found.last_ns is None:
        yield "arrivals", "too few for a rate"
        return
    span = duration(found.last_ns - found.first_ns)
    yield "arrivals", f"{found.per_s:.4g}/s over {span}, most in one second {found.most_per_s}"
    spread = "" if found.dispersion is None else f", index of dispersion {found.dispersion:.3g}"
    windows = f" in {found.window_s} s windows" if spread else ""
    yield "burstiness", f"CV of gaps {found.cv:.3g}{spread}{windows} (Poisson: 1 and 1)"
    if found.longest_gap_ns and found.longest_gap_at_ns is not None:
        after = duration(found.longest_gap_at_ns - found.first_ns)
        yield "longest gap", f"{duration(found.longest_gap_ns)} without an arrival, after {after}"
    if found.quantised:
        usual = duration(found.usual_gap_ns or 0)
        few = f"{requests} arrivals on {found.instants} instants, usually {usual} apart"
        yield "quantised", f"{few}: a replay sends them in volleys"


def _lengths(found: "Lengths", requests: int) -> str:
    if found.quantiles is None:
        return "no token counts"
    spread = ", ".join(f"{name} {value}" for name, value in found.quantiles.items())
    unknown = f", not known of {requests - found.known}" if found.known < requests else ""
    return f"{found.total} tokens: {spread}, {found.least} to {found.most}{unknown}"


def _sessions(summary: "Summary") -> str:
    found = summary.sessions
    if found.turns is None:
        return "none"
    turns = ", ".join(f"{name} {value}" for name, value in found.turns.items())
    return (
        f"{found.sessions} with {found.requests} requests, turns {turns}, most {found.most_turns}; "
        f"{found.waiting} requests waited for others"
    )


def _prefixes(summary: "Summary") -> str:
    found = summary.prefixes
    if found.ideal_reuse is None:
        return "none known"
    sizes = ", ".join(f"{size}s" for size in found.block_sizes)
    share = "" if found.followed == 1 else f" (followed {found.followed:.2%} of the ids)"
    return (
        f"{found.blocks} blocks of {sizes} in {found.requests} requests, "
        f"{found.ideal_reuse:.1%} seen before: the ideal reuse{share}"
    )


def duration(ns: int) -> str:
    """Three digits and the largest unit that leaves one before the point."""
    for unit, size_ns in _NS.items():
        if ns >= size_ns:
            return f"{ns / size_ns:.3g} {unit}"
    return f"{ns} ns"
