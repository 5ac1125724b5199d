"""What beside the latencies differs between two sides, and why a difference may not be theirs.

Outcomes and lengths that changed are facts to show; another load, cache, prompt or clock, and a run
that its verdict doubts, are warnings. Nothing here computes an effect.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tokentape.analysis import display, statistics
from tokentape.analysis.session import Session
from tokentape.traces.reader import Tape

LOAD_OPTIONS = ("speed", "thin", "multiply", "turns", "think", "window_ns")  # shape the load
_AS_RECORDED = {"speed": "1"}
Mask = npt.NDArray[np.bool_]
Sides = Mapping[str, Mask]


@dataclass(frozen=True)
class Length:
    """Tokens of the requests that both sides have: means, and how many requests changed.

    n: requests whose length both sides know; a request of several runs counts by its mean.
    """

    what: str
    a: float | None
    b: float | None
    changed: int
    n: int

    def line(self) -> str:
        """One line for people."""
        return (
            f"{self.what} tokens, mean: A {display.figure(self.a)}, B {display.figure(self.b)}; "
            f"{self.changed:,} of {self.n:,} differ"
        )


def column(rows: pa.Table, name: str) -> statistics.Floats:
    """A column as floats, NULL as NaN."""
    found: statistics.Floats = rows[name].cast(pa.float64()).to_numpy()
    return found


def numbered(rows: pa.Table, name: str) -> statistics.Ints:
    """A column of names as numbers: rows of one name have the same, from 0."""
    found: statistics.Ints = (
        rows[name].combine_chunks().dictionary_encode().indices.cast(pa.int64()).to_numpy()
    )
    return found


def outcomes(rows: pa.Table, sides: Sides) -> dict[str, dict[str, int]]:
    """How often each side's requests ended in which way, the most frequent first."""
    ended = np.asarray(rows["outcome"].to_pylist(), dtype=object)
    found = {}
    for side, mask in sides.items():
        names, counts = np.unique(ended[mask].astype(str), return_counts=True)
        order = np.argsort(-counts, kind="stable")
        found[side] = dict(zip(names[order].tolist(), counts[order].tolist(), strict=True))
    return found


def failed_on_one_side(keys: Any, ok: statistics.Floats, sides: Sides) -> dict[str, int]:
    """Requests that went well in every run of one side and failed in one of the other."""
    failed = {s: set(keys[m & (ok == 0)].tolist()) for s, m in sides.items()}
    return {"A": len(failed["A"] - failed["B"]), "B": len(failed["B"] - failed["A"])}


def lengths(rows: pa.Table, keys: Any, sides: Sides) -> list[Length]:
    """Input and output tokens of both sides."""
    found = []
    for what in ("input", "output"):
        tokens = column(rows, f"{what}_tokens")
        means = {s: _mean_by_key(keys[m], tokens[m]) for s, m in sides.items()}
        both = sorted(means["A"].keys() & means["B"].keys())
        a, b = (np.array([means[s][k] for k in both]) for s in ("A", "B"))
        known = len(both) > 0
        found.append(
            Length(
                what,
                float(a.mean()) if known else None,
                float(b.mean()) if known else None,
                int((a != b).sum()),
                len(both),
            )
        )
    return found


def _mean_by_key(keys: statistics.Ints, values: statistics.Floats) -> dict[int, float]:
    known = np.isfinite(values)
    names, place = np.unique(keys[known], return_inverse=True)
    means = np.bincount(place, values[known]) / np.maximum(np.bincount(place), 1)
    return dict(zip(names.tolist(), means.tolist(), strict=True))


def warnings(
    session: Session, rows: pa.Table, runs: Mapping[str, Sequence[str]], sides: Sides, paired: Sides
) -> list[str]:
    """Why a difference may not be the candidate's doing, one line each."""
    tapes = dict(zip(session.labels, session.tapes, strict=True))
    of_side = {side: [tapes[label] for label in labels] for side, labels in runs.items()}
    return [
        *(line for label, tape in tapes.items() for line in _verdict(label, tape)),
        *_unpaired(sides, paired),
        *_loads(of_side),
        *_prompts(of_side),
        *_unknown(of_side),
        *_clocks(session, runs),
        *_cache(rows, paired),
        *_answers([tape.facts.get("sentinels") for tape in session.tapes]),
        *(
            f"mean {x.what} tokens differ: A {display.figure(x.a)}, B {display.figure(x.b)}"
            for x in lengths(rows, numbered(rows, "key"), paired)
            if x.a and x.b is not None and abs(x.b - x.a) > 0.01 * x.a
        ),
    ]


def _verdict(label: str, tape: Tape) -> Iterator[str]:
    verdict = tape.facts.get("verdict")
    if verdict and verdict.get("level", "valid") != "valid":
        yield f"the run {label} is {verdict['level']}; see report {label}"
    elif not verdict and tape.role == "replay":
        yield f"the run {label} has no verdict: it did not end, or another tool made it"


def _unpaired(sides: Sides, paired: Sides) -> Iterator[str]:
    for side, mask in sides.items():
        alone = int(mask.sum() - paired[side].sum())
        if alone > 0.01 * mask.sum():
            yield f"{alone:,} of {int(mask.sum()):,} requests of {side} have no pair"


def _loads(of_side: Mapping[str, Sequence[Tape]]) -> Iterator[str]:
    """Options that make another load of the same tape; a capture is the load as recorded."""
    for name in LOAD_OPTIONS:
        used = {side: {_option(tape, name) for tape in tapes} for side, tapes in of_side.items()}
        if used["A"] != used["B"]:
            told = ", ".join(f"{side} {' and '.join(sorted(v))}" for side, v in used.items())
            yield f"the load differs, {name.removesuffix('_ns')}: {told}"


def _option(tape: Tape, name: str) -> str:
    value = (tape.facts.get("options") or {}).get(name)
    if value is None or value == [None, None]:
        return _AS_RECORDED.get(name, "as recorded")
    return str(value)


def _prompts(of_side: Mapping[str, Sequence[Tape]]) -> Iterator[str]:
    """How prompts were written and outputs pinned, where both sides say so."""
    for name, what in (("prompts", "prompts"), ("output_pinning", "output lengths")):
        told = {
            side: {str(how) for t in tapes if (how := _candidate(t).get(name))}
            for side, tapes in of_side.items()
        }
        if all(told.values()) and told["A"] != told["B"]:
            yield f"{what} were not made in the same way: see candidate.{name} in `info`"


def _candidate(tape: Tape) -> dict[str, Any]:
    found = tape.facts.get("candidate")
    return found if isinstance(found, dict) else {}


def _unknown(of_side: Mapping[str, Sequence[Tape]]) -> Iterator[str]:
    """Facts that one side has and the other lacks: nobody can tell whether they differ."""
    known = {
        side: set().union(*((_candidate(t).get("given") or {}).keys() for t in tapes))
        for side, tapes in of_side.items()
    }
    for side, other in (("A", "B"), ("B", "A")):
        if missing := sorted(known[other] - known[side]):
            yield f"not known of {side}, but of {other}: {', '.join(missing)} (--fact)"


def _clocks(session: Session, runs: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The clock of most event stamps; another clock is later by what its process was late."""
    query = """
        SELECT run, arg_max(clock, requests) AS clock
        FROM clocks
        WHERE stamp = 'event'
        GROUP BY run"""
    found = {row["run"]: row["clock"] for row in session.rows(query)}
    used = {s: {found[run] for run in labels if found.get(run)} for s, labels in runs.items()}
    if all(used.values()) and used["A"] != used["B"]:
        told = ", ".join(f"{side} {' and '.join(sorted(v))}" for side, v in used.items())
        yield f"events were stamped by different clocks: {told}"


def _cache(rows: pa.Table, paired: Sides) -> Iterator[str]:
    cached, prompt = column(rows, "cached_tokens"), column(rows, "input_tokens")
    known = {side: float(np.isfinite(cached[m]).mean()) for side, m in paired.items()}
    if min(known.values()) < 0.5 <= max(known.values()):
        blind = min(known, key=lambda side: known[side])
        yield f"{blind} does not say how many prompt tokens came from its cache; the other does"
        return
    shares = {s: np.nansum(cached[m]) / max(np.nansum(prompt[m]), 1) for s, m in paired.items()}
    if abs(shares["A"] - shares["B"]) > 0.05:
        told = ", ".join(f"{side} {share:.1%}" for side, share in shares.items())
        yield f"prompt tokens from the cache differ: {told}"


def _answers(told: list[dict[str, Any] | None]) -> list[str]:
    """Whether the candidates answered the same fixed questions alike, where they were asked."""
    asked = [t for t in told if t]
    if len(asked) < 2 or len({t["version"] for t in asked}) > 1:
        return []
    digests = [[answer["digest"] for answer in t["before"]] for t in asked]
    differ = sum(len(set(answers)) > 1 for answers in zip(*digests, strict=False))
    if not differ:
        return []
    what = "other arithmetic, another model or a broken one"
    return [f"{differ} of {len(digests[0])} sentinels were answered differently: {what}"]
