"""Every number of metrics_long recomputed in numpy from the rows, without SQL, on random traces."""

from array import array
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rows import MS, make_tape, streamed_row
from tokentape.analysis.session import connect
from tokentape.traces.writer import TapeWriter

Row = dict[str, Any]
Samples = dict[str, list[tuple[float, float]]]  # metric: (value in ns, weight), one per sample

LEVELS = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
SEEDS = (1, 2, 3)
OUTCOMES = ("ok", "ok", "ok", "client_abort", "http_error", "cut")


def random_rows(seed: int, n: int = 300) -> list[Row]:
    """Requests of every shape: whole, failed, one token, several choices, events without tokens."""
    rng = np.random.default_rng(seed)
    return [_random_row(rng, i, sampled=seed == SEEDS[-1]) for i in range(n)]


def _random_row(rng: np.random.Generator, i: int, *, sampled: bool) -> Row:
    events = int(rng.choice([0, 1, 2, 5, 40]))
    off_us = np.cumsum(rng.integers(0, 5000, events)) + 800
    ntok = rng.choice([1, 1, 1, 2, 4], events)
    if rng.random() < 0.2:
        ntok = rng.choice([0, 1, 2], events)
    arrival = i * 3 * MS + int(rng.integers(0, MS))
    send = arrival + int(rng.integers(0, 2 * MS))
    row = streamed_row(0, 0) | {
        "arrival_ns": arrival,
        "scheduled_ns": arrival - 1000 if rng.random() < 0.5 else None,
        "send_ns": send if rng.random() < 0.95 else None,
        "send_end_ns": send + int(rng.integers(0, MS)),
        "early_reply": bool(rng.random() < 0.1),
        "off_us": array("I", off_us.tolist()),
        "ntok": array("H", ntok.tolist()) if rng.random() < 0.9 else None,
        "cls": bytes(events),
        "output_tokens": int(ntok.sum()),
        "outcome": str(rng.choice(OUTCOMES)),
        "sample_prob": float(rng.choice([0.1, 0.25, 1.0])) if sampled else None,
        "end_ns": send + 10 * MS + int(rng.integers(0, 100 * MS)) if rng.random() < 0.95 else None,
    }
    if events:
        first, last = send + int(off_us[0]) * 1000, send + int(off_us[-1]) * 1000
        row |= {"first_content_ns": first, "first_answer_ns": first, "last_content_ns": last}
    if rng.random() < 0.2:
        row |= {"choice": bytes(rng.integers(0, 3, events).tolist()), "n_choices": 3}
    return row


def weight_of(row: Row) -> float:
    return round(65536 / (np.float32(row["sample_prob"]))) / 65536 if row["sample_prob"] else 1.0


def streams_of(row: Row) -> list[list[tuple[int, int | None]]]:
    """(offset, tokens) of each choice of a reply."""
    by_choice: dict[int, list[tuple[int, int | None]]] = defaultdict(list)
    choices = row.get("choice")
    for i, off in enumerate(row["off_us"]):
        tokens = None if row["ntok"] is None else int(row["ntok"][i])
        by_choice[choices[i] if choices is not None else 0].append((off, tokens))
    return list(by_choice.values())


def oracle(rows: list[Row]) -> Samples:
    """All samples of all metrics, by the words of METRICS.md."""
    samples: Samples = defaultdict(list)
    for row in rows:
        values = list(of_sending(row))
        if row["outcome"] == "ok":
            values += [*of_request(row), *of_choices(row)]
        for metric, value in values:
            samples[metric].append((value, weight_of(row)))
    return samples


def of_sending(row: Row) -> Iterator[tuple[str, float]]:
    if row["send_ns"] is not None:
        yield "send_lag", row["send_ns"] - row["arrival_ns"]
        if row["scheduled_ns"] is not None:
            yield "schedule_lag", row["send_ns"] - row["scheduled_ns"]


def of_request(row: Row) -> Iterator[tuple[str, float]]:
    sent = row["send_ns"] if row["early_reply"] else row["send_end_ns"]
    for metric, base, end in (
        ("ttft", sent, row["first_content_ns"]),
        ("ttft_arrival", row["arrival_ns"], row["first_content_ns"]),
        ("ttfa", sent, row.get("first_answer_ns")),
        ("ttfa_arrival", row["arrival_ns"], row.get("first_answer_ns")),
        ("e2e", sent, row["end_ns"]),
        ("e2e_content", sent, row["last_content_ns"]),
        ("e2e_arrival", row["arrival_ns"], row["end_ns"]),
    ):
        if end is not None and base is not None:
            yield metric, end - base
    if row["output_tokens"] and row["end_ns"] is not None and sent is not None:
        yield "normalized", (row["end_ns"] - sent) / row["output_tokens"]
    if row.get("choice") is None and row["output_tokens"] >= 2 and len(row["off_us"]) >= 2:
        span = row["last_content_ns"] - row["first_content_ns"]
        yield from of_pace(span / (row["output_tokens"] - 1))


def of_pace(tpot_ns: float) -> Iterator[tuple[str, float]]:
    yield "tpot", tpot_ns
    if tpot_ns:
        yield "tokens_per_s_user", 1e9 / tpot_ns


def of_choices(row: Row) -> Iterator[tuple[str, float]]:
    for stream in streams_of(row):
        tokens = sum(k or 0 for _, k in stream)
        if row.get("choice") is not None and tokens >= 2 and len(stream) >= 2:
            yield from of_pace((stream[-1][0] - stream[0][0]) * 1000 / (tokens - 1))
        yield from (("icl", (off - before) * 1000) for (before, _), (off, _) in pairwise(stream))
        carrying = [(off, k) for off, k in stream if k]
        for i, (off, k) in enumerate(carrying):
            yield from [("itl_user", 0.0)] * (k - 1)
            if i:
                gap = (off - carrying[i - 1][0]) * 1000
                yield "itl_user", gap
                yield from [("itl_spread", gap / k)] * k


def in_flight(rows: list[Row]) -> list[tuple[float, float]]:
    """(level, ns that it lasted), one per step, by counting at every instant."""
    spans = [r for r in rows if r["send_ns"] is not None]
    last = max(
        max(filter(None, (r["end_ns"] or r["last_content_ns"], r["send_ns"]))) for r in spans
    )
    ends = [r["end_ns"] or last for r in spans]
    starts = [r["send_ns"] for r in spans]
    weights = np.array([weight_of(r) for r in spans])
    instants = np.unique([*starts, *ends])
    steps = []
    for now, then in pairwise(instants):
        open_ = (np.array(starts) <= now) & (np.array(ends) > now)
        steps.append((float(weights[open_].sum()), float(then - now)))
    return steps


def expected(samples: list[tuple[float, float]], *, over_time: bool = False) -> dict[str, Any]:
    values, weights = (np.array(column, dtype=float) for column in zip(*samples, strict=True))
    found: dict[str, Any] = {
        stat: float(np.quantile(values, p, method="inverted_cdf", weights=weights))
        for stat, p in LEVELS.items()
        if over_time or len(values) > np.ceil(p * len(values))
    }
    mean = float(np.average(values, weights=weights))
    return found | {"mean": mean, "min": values.min(), "max": values.max()}


@pytest.mark.parametrize("seed", SEEDS)
def test_every_statistic_agrees_with_numpy(tmp_path: Path, seed: int) -> None:
    rows = random_rows(seed)
    with connect([make_tape(tmp_path / "t", rows)]) as session:
        long = session.table("FROM metrics_long").to_pylist()
    got: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in long:
        got[row["metric"]] |= {row["stat"]: row["value"], "n": row["n"]}
    samples = oracle(rows)
    assert len(samples) == 15
    for metric, values in samples.items():
        assert got[metric].pop("n") == len(values), metric
        agree(metric, got[metric], expected(values))
    agree("in_flight", got["in_flight"], expected(in_flight(rows), over_time=True))


@pytest.mark.parametrize("seed", SEEDS[1:])
def test_every_single_number_agrees_with_numpy(tmp_path: Path, seed: int) -> None:
    """Rates, shares and counts; cost and energy have their own tests with known answers."""
    rng = np.random.default_rng(seed)
    rows = random_rows(seed)
    for row in rows:
        prompt, cached = int(rng.integers(1, 5000)), int(rng.integers(0, 2))
        row["input_tokens"] = prompt if rng.random() < 0.9 else None
        row["cached_tokens"] = prompt * cached // 2 if rng.random() < 0.8 else None
    with connect([make_tape(tmp_path / "t", rows)]) as session:
        long = session.rows("FROM metrics_long WHERE stat = 'value' OR metric = 'outcomes'")
    got = {(r["metric"], r["stat"]): r["value"] for r in long if r["value"] is not None}
    wanted = single_numbers(rows)
    assert {m for m, _ in wanted} <= {m for m, _ in got}
    for key, value in wanted.items():
        assert got.pop(key) == pytest.approx(value, rel=1e-12), key
    assert {m for m, s in got if got[m, s]} <= {"stalled_share"}


def single_numbers(rows: list[Row]) -> dict[tuple[str, str], float]:
    last = ("end_ns", "last_content_ns", "send_end_ns", "send_ns", "arrival_ns")
    ends = [next(r[c] for c in last if r.get(c) is not None) for r in rows]
    span_s = (max(ends) - min(r["arrival_ns"] for r in rows)) / 1e9
    both = [r for r in rows if None not in (r["input_tokens"], r["cached_tokens"])]
    sums = {
        "offered_per_s": sum(map(weight_of, rows)),
        "completed_per_s": sum(
            weight_of(r) for r in rows if r["outcome"] == "ok" and r["end_ns"] is not None
        ),
        "input_tokens_per_s": sum(weight_of(r) * (r["input_tokens"] or 0) for r in rows),
        "uncached_tokens_per_s": sum(
            weight_of(r) * (r["input_tokens"] - r["cached_tokens"]) for r in both
        ),
        "output_tokens_per_s": sum(weight_of(r) * r["output_tokens"] for r in rows),
    }
    cached, asked = (
        sum(weight_of(r) * r[c] for r in both) for c in ("cached_tokens", "input_tokens")
    )
    found = {(name, "value"): total / span_s for name, total in sums.items()}
    found["prefix_got", "value"] = cached / asked
    for outcome in set(OUTCOMES):
        found["outcomes", outcome] = sum(r["outcome"] == outcome for r in rows)
    return found


def agree(metric: str, got: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Quantiles, minimum and maximum are values that were seen: equal, not close."""
    for stat in (*LEVELS, "min", "max"):
        assert got[stat] == wanted.get(stat), (metric, stat)
    assert got["mean"] == pytest.approx(wanted["mean"], rel=1e-12), metric


@pytest.mark.parametrize(("least_us", "medians"), [(3000, 2), (0, 0), (4000, 0.5)])
def test_stalls_agree_with_numpy(tmp_path: Path, least_us: int, medians: float) -> None:
    rows = random_rows(5)
    wanted = []
    for row in rows:
        for stream in streams_of(row):
            gaps = np.diff([off for off, _ in stream])
            if len(gaps):
                median = np.quantile(gaps, 0.5, method="inverted_cdf")
                longer = (gaps > least_us) & (gaps > medians * median)
                wanted += [(int(gap), int(median)) for gap in gaps[longer]]
    query = f"SELECT gap_us, median_us FROM stalls_over({least_us}, {medians})"
    with connect([make_tape(tmp_path / "t", rows)]) as session:
        found = session.sql(query).fetchall()
    assert wanted and sorted(found) == sorted(wanted)


def test_the_tokens_of_the_events_are_the_output_tokens(tmp_path: Path) -> None:
    rows = [r for r in random_rows(4) if r["ntok"] is not None and r["off_us"]]
    with connect([make_tape(tmp_path / "t", rows)]) as session:
        found = session.sql("SELECT sum(ntok) FROM events").fetchall()
    assert found == [(sum(r["output_tokens"] for r in rows),)]


def test_the_answer_does_not_depend_on_threads_or_on_the_split_into_files(tmp_path: Path) -> None:
    rows = random_rows(SEEDS[-1])
    answers = []
    for threads, pieces, memory in ((1, 1, None), (2, 1, None), (2, 7, None), (2, 2, "500MB")):
        tape = split_tape(tmp_path / f"{threads}-{pieces}" / "t", rows, pieces)
        with connect([tape], threads=threads, memory_limit=memory) as session:
            answers.append(session.table("FROM metrics_long ORDER BY metric, stat").to_pylist())
    for answer in answers[1:]:
        for row, first in zip(answer, answers[0], strict=True):
            if row["stat"] == "mean" and row["value"] is not None:
                # a sum of floats: equal to the last bits
                row["value"] = pytest.approx(row["value"], rel=1e-12)
            assert row == first


def split_tape(path: Path, rows: list[Row], pieces: int) -> Path:
    writer = TapeWriter.create(path, role="capture", command=["test"], options={}, facts={})
    for piece in range(pieces):
        for row in rows[piece::pieces]:
            writer.append(row)
        writer.seal()
    writer.close()
    assert len(list(path.glob("requests/**/*.parquet"))) == pieces
    return path
