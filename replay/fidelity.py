"""How a run differs from the tape that it replays: one number for each thing that a GPU can feel.

Requests are paired by the request that they repeat; recorded times are scaled by the run's speed
first. It says what differs and never whose doing it is: a slower candidate differs in concurrency
too. What one of the two tapes does not know is left out, never taken for equal.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tokentape.traces.errors import TapeError
from tokentape.traces.reader import Tape, open_tape

Floats = NDArray[np.float64]

NS_PER_MS = 1_000_000
ARRIVALS_NS = 5 * NS_PER_MS  # p99; what is below is told by the schedule lag
SHARE = 0.01  # of tokens, prefix reuse, outcomes
CONCURRENCY = 0.10  # of the mean in flight: engines are never equally fast
STREAM = 0.10  # Kolmogorov and Smirnov's distance of the gaps, and tokens for each event
SLICES = 1_000  # of the run's span, where concurrency is looked at
MOST_GAPS = 500_000  # of each tape
COLUMNS = [
    *("request_id", "source_request_id", "copy_index", "arrival_ns", "send_ns", "end_ns"),
    *("outcome", "input_tokens", "output_tokens", "cached_tokens", "off_us"),
]


@dataclass(frozen=True)
class Difference:
    """One thing compared: `value` of 0 is "the same", `text` says it in words."""

    name: str
    value: float
    unit: str
    differs: bool
    text: str


@dataclass(frozen=True)
class Fidelity:
    """All that could be compared, of `pairs` requests."""

    pairs: int
    found: list[Difference]
    unknown: list[str]  # what one of the tapes does not know

    def as_dict(self) -> dict[str, Any]:
        """For JSON and the tape."""
        found = {d.name: asdict(d) for d in self.found}
        return {"pairs": self.pairs, "found": found, "unknown": self.unknown, "says": self.line}

    @property
    def line(self) -> str:
        """What differs, on one line."""
        differing = [f"{d.name}: {d.text}" for d in self.found if d.differs]
        same = ", ".join(d.name for d in self.found if not d.differs)
        said = "; ".join(differing) or "as on the tape"
        return said + (f" (as on the tape: {same})" if differing and same else "")

    def text(self) -> str:
        """A line for each thing."""
        lines = [f"{self.pairs} requests paired with those of the tape"]
        for d in self.found:
            mark = "differs" if d.differs else "same"
            lines.append(f"  {d.name:<14} {mark:<8} {d.value:.4g} {d.unit}: {d.text}")
        lines += [f"  not known to both tapes: {', '.join(self.unknown)}"] * bool(self.unknown)
        return "\n".join(lines)


@dataclass(frozen=True)
class Pairs:
    """The rows of a run, and the source's row of each: tables of equal length."""

    run: pa.Table
    tape: pa.Table
    speed: float
    run_gaps: Floats
    tape_gaps: Floats

    def known(self, name: str, *, ok: bool = False) -> tuple[Floats, Floats]:
        """A column of both, where both know it; of requests that ended well in both, if `ok`."""
        ours, theirs = (_floats(t[name]) for t in (self.run, self.tape))
        both = np.isfinite(ours) & np.isfinite(theirs)
        if ok:
            both &= _is_ok(self.run) & _is_ok(self.tape)
        return ours[both], theirs[both]


def fidelity(run: Tape, source: Path | None = None) -> Fidelity:
    """Compare a run with the tape that it replays, at `source` or where the run says.

    TapeError for a tape that is no run, or whose source is gone or another tape by now.
    """
    told = run.facts.get("source") or {}
    if run.role != "replay" or "tape_id" not in told:
        raise TapeError(f"{run.path}: is not a run of replay (it is a {run.role})")
    tape = open_tape(source or Path(told["path"]))
    if tape.facts["tape_id"] != told["tape_id"]:
        raise TapeError(f"{tape.path}: is not the tape that {run.path} replays; name it: --source")
    speed = float(Fraction((run.facts.get("options") or {}).get("speed") or 1))
    pairs = _pair(run, tape, speed)
    parts = (
        ("arrivals", _arrivals(pairs)),
        ("concurrency", _concurrency(pairs)),
        ("input tokens", _tokens(pairs, "input", "input_tokens")),
        ("output tokens", _tokens(pairs, "output", "output_tokens")),
        ("prefix reuse", _prefixes(pairs, run)),
        ("stream shape", _streams(pairs)),
        ("outcomes", _outcomes(pairs)),
    )
    return Fidelity(
        pairs=pairs.run.num_rows,
        found=[d for _, d in parts if d is not None],
        unknown=[name for name, d in parts if d is None],
    )


def _pair(run: Tape, tape: Tape, speed: float) -> Pairs:
    ours, run_gaps = _read(run)
    theirs, tape_gaps = _read(tape)
    at = pc.index_in(ours["source_request_id"], value_set=theirs["request_id"])
    has = pc.is_valid(at)
    paired = theirs.take(at.filter(has)) if theirs.num_rows else theirs
    return Pairs(ours.filter(has), paired, speed, run_gaps, tape_gaps)


def _read(tape: Tape) -> tuple[pa.Table, Floats]:
    """The rows without their events, of which the number is left; and some of their gaps, in us."""
    parts, gaps, left = [], [np.empty(0)], MOST_GAPS
    for part in tape.parts(COLUMNS):
        ids = {n: part[n].cast(pa.binary(16)) for n in ("request_id", "source_request_id")}
        if left > 0:
            gaps.append(_gaps(part, left))
            left -= len(gaps[-1])
        columns = {n: part[n] for n in COLUMNS if n != "off_us"} | ids
        columns["events"] = pc.list_value_length(part["off_us"])
        parts.append(pa.table(columns))
    return pa.concat_tables(parts).combine_chunks(), np.concatenate(gaps)


def _gaps(part: pa.Table, most: int) -> Floats:
    offsets = part["off_us"].combine_chunks()
    values = pc.list_flatten(offsets).to_numpy(zero_copy_only=False).astype(float)
    owner = pc.list_parent_indices(offsets).to_numpy(zero_copy_only=False)
    inside = owner[1:] == owner[:-1]
    found: Floats = np.diff(values)[inside][:most]
    return found


def _arrivals(pairs: Pairs) -> Difference | None:
    """p99 of how far requests were sent from their place in the tape; copies have their own."""
    first = ~(_floats(pairs.run["copy_index"]) > 0)
    sent, at_ns = (_floats(t)[first] for t in (pairs.run["send_ns"], pairs.tape["arrival_ns"]))
    due = at_ns / pairs.speed
    away = (sent - due)[np.isfinite(sent) & np.isfinite(due)]
    if len(away) < 2:
        return None
    away = np.abs(away - np.median(away))
    p99 = float(np.quantile(away, 0.99, method="higher"))
    ours, theirs = _burstiness(sent), _burstiness(at_ns)
    text = f"p99 {p99 / NS_PER_MS:.2f} ms from the tape's instants, CV of gaps {ours:.3g}, "
    text += f"recorded {theirs:.3g}"
    return Difference("arrivals", p99, "ns", p99 > ARRIVALS_NS, text)


def _burstiness(at_ns: Floats) -> float:
    gaps = np.diff(np.sort(at_ns[np.isfinite(at_ns)]))
    mean = gaps.mean() if len(gaps) else 0.0
    return float(gaps.std() / mean) if mean else 0.0


def _concurrency(pairs: Pairs) -> Difference | None:
    """Area between both curves of requests in flight, over the area under the recorded one.

    In flight: from being offered to the end of the reply. The recorded curve is that of the
    recorded durations at the run's speed.
    """
    sent, ended = _floats(pairs.run["arrival_ns"]), _floats(pairs.run["end_ns"])
    began, over = _floats(pairs.tape["arrival_ns"]), _floats(pairs.tape["end_ns"])
    both = np.isfinite(sent + ended + began + over) & ~(_floats(pairs.run["copy_index"]) > 0)
    if both.sum() < 2:
        return None
    sent, ended, began, over = (a[both] for a in (sent, ended, began, over))
    scaled = (began - began.min()) / pairs.speed
    ours = (sent - sent.min(), ended - sent.min())
    theirs = (scaled, scaled + over - began)
    edges = np.linspace(0, max(ours[1].max(), theirs[1].max()), SLICES + 1)
    flight = [_in_flight(*one, edges) for one in (ours, theirs)]
    under = flight[1].sum()
    if not under:
        return None
    value = float(np.abs(flight[0] - flight[1]).sum() / under)
    means = [float(f.sum() / SLICES) for f in flight]
    text = f"mean {means[0]:.3g} in flight, with the recorded durations {means[1]:.3g}"
    return Difference("concurrency", value, "of the area", value > CONCURRENCY, text)


def _in_flight(began: Floats, ended: Floats, edges: Floats) -> Floats:
    """Mean number in flight within each slice."""
    at = np.concatenate([began, ended])
    steps = np.concatenate([np.ones(len(began)), -np.ones(len(ended))])
    order = np.argsort(at, kind="stable")
    at, level = at[order], np.cumsum(steps[order])
    area = np.concatenate([[0.0], np.cumsum(level[:-1] * np.diff(at))])
    found: Floats = np.diff(np.interp(edges, at, area)) / np.diff(edges)
    return found


def _tokens(pairs: Pairs, name: str, column: str) -> Difference | None:
    ours, theirs = pairs.known(column, ok=True)
    if not len(ours) or not theirs.sum():
        return None
    value = float(np.abs(ours - theirs).sum() / theirs.sum())
    other = int((ours != theirs).sum())
    text = (
        f"{ours.sum():,.0f}, recorded {theirs.sum():,.0f}; {other} of {len(ours)} requests differ"
    )
    return Difference(f"{name} tokens", value, "of the tokens", value > SHARE, text)


def _prefixes(pairs: Pairs, run: Tape) -> Difference | None:
    """What was got of the prompt tokens from a cache, against what was recorded, else asked for."""
    plan = run.facts.get("plan") or {}
    blocks = plan.get("prefix_blocks") or 0
    asked = plan["prefix_blocks_repeated"] / blocks if blocks else None
    told = {"by usage": _cached(pairs.run), "by /metrics": _hits(run)}
    got = next((share for share in told.values() if share is not None), None)
    recorded = _cached(pairs.tape)
    against = recorded if recorded is not None else asked
    if got is None or against is None:
        return None
    words = [f"got {share:.1%} {how}" for how, share in told.items() if share is not None]
    words += [f"asked {asked:.1%} of blocks"] if asked is not None else []
    words += [f"recorded {recorded:.1%}"] if recorded is not None else []
    value = abs(got - against)
    return Difference("prefix reuse", value, "of 1", value > SHARE, ", ".join(words))


def _cached(rows: pa.Table) -> float | None:
    cached, prompt = _floats(rows["cached_tokens"]), _floats(rows["input_tokens"])
    known = np.isfinite(cached) & np.isfinite(prompt)
    total = prompt[known].sum()
    return float(cached[known].sum() / total) if total else None


def _hits(run: Tape) -> float | None:
    """Hits over queries of vLLM's prefix cache, between the first and the last sample."""
    grown = {"vllm:prefix_cache_hits_total": 0.0, "vllm:prefix_cache_queries_total": 0.0}
    if not run.telemetry_files:
        return None
    columns = ["ts_ns", "source", "name", "labels", "value"]
    read = [pq.read_table(f, columns=columns) for f in run.telemetry_files]
    rows = pa.concat_tables(read)
    rows = rows.filter(pc.is_in(rows["name"], pa.array(list(grown)))).sort_by("ts_ns")
    ends: dict[tuple[str, str, str], list[float]] = {}
    for row in rows.to_pylist():
        ends.setdefault((row["source"], row["name"], row["labels"]), []).append(row["value"])
    for (_, name, _), values in ends.items():
        grown[name] += values[-1] - values[0]
    hits, queries = grown.values()
    return hits / queries if queries > 0 and hits >= 0 else None


def _streams(pairs: Pairs) -> Difference | None:
    """Distance of the distributions of gaps between events: 0 alike, 1 nothing in common."""
    ours, theirs = np.sort(pairs.run_gaps), np.sort(pairs.tape_gaps)
    if not len(ours) or not len(theirs):
        return None
    at = np.concatenate([ours, theirs])
    shares = [np.searchsorted(g, at, side="right") / len(g) for g in (ours, theirs)]
    value = float(np.abs(shares[0] - shares[1]).max())
    each = [_tokens_per_event(t) for t in (pairs.run, pairs.tape)]
    apart = abs(each[0] / each[1] - 1) if all(each) else 0.0
    medians = [float(np.median(g)) / 1000 for g in (ours, theirs)]
    text = f"median gap {medians[0]:.2f} ms, recorded {medians[1]:.2f}; tokens for each event "
    text += f"{each[0]:.3g}, recorded {each[1]:.3g}"
    return Difference("stream shape", value, "KS distance", max(value, apart) > STREAM, text)


def _tokens_per_event(rows: pa.Table) -> float:
    tokens, events = _floats(rows["output_tokens"]), _floats(rows["events"])
    known = np.isfinite(tokens) & (np.nan_to_num(events) > 0)
    return float(tokens[known].sum() / events[known].sum()) if known.any() else 0.0


def _outcomes(pairs: Pairs) -> Difference | None:
    ours, theirs = (_shares(t["outcome"].to_pylist()) for t in (pairs.run, pairs.tape))
    if not ours or None in theirs:
        return None
    names = sorted(ours.keys() | theirs.keys(), key=str)
    value = sum(abs(ours.get(n, 0) - theirs.get(n, 0)) for n in names) / 2
    words = [f"{n} {ours.get(n, 0):.1%}, recorded {theirs.get(n, 0):.1%}" for n in names]
    return Difference("outcomes", value, "of the requests", value > SHARE, "; ".join(words))


def _shares(values: Iterable[Any]) -> dict[Any, float]:
    listed = list(values)
    return {name: listed.count(name) / len(listed) for name in set(listed)}


def _floats(column: Any) -> Floats:
    """A column as floats, NULL as NaN."""
    found: Floats = column.cast(pa.float64()).to_numpy()
    return found


def _is_ok(rows: pa.Table) -> NDArray[np.bool_]:
    return np.asarray(pc.fill_null(pc.equal(rows["outcome"], "ok"), True).to_numpy())
