"""Goodput, fluidity, stalls, prefixes, prices, energy and tails recomputed by hand on random tapes.

Independent of the SQL: loops over rows and numpy, by the words of METRICS.md. Hypothesis draws
a few small tapes at once, empty ones included, so that one session asks about all of them.
"""

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rows import MS, make_tape, streamed_row
from test_analysis_oracle import of_choices, of_request, streams_of, weight_of
from tokentape.analysis.hardware import Hardware
from tokentape.analysis.session import Session, connect
from tokentape.analysis.slo import Slo
from tokentape.traces.schema import TELEMETRY

Row = dict[str, Any]
Runs = dict[str, list[Row]]

GPUS, USD, PREFILL_S, CACHED_PART = 3, 2.5, 0.0004, 0.1
FIRST_US, PACE_US = 5000, 2000
LEVEL = 0.5  # exact in binary, so that no sum lies on either side of it by chance
SLOS = (
    Slo("all", {"ttft": 4 * MS, "tpot": 3 * MS, "e2e_arrival": 300 * MS}),
    Slo("a", {"ttft_arrival": 3 * MS}, model="a"),
    Slo("short", {"tpot": 2 * MS}, prompt_until=32),
    Slo("mine", {"e2e": 100 * MS}, tenant="x", prompt_from=16),
)
SHARED = (
    "prompt",
    "output",
    "turn",
    "in_flight",
    "waiting",
    "cache",
    "model",
    "connection",
    "tenant",
)


@st.composite
def requests(draw: st.DrawFn) -> Row:
    """What one request is like; `placed` gives it a time."""
    events = draw(st.lists(st.tuples(GAPS_US, st.sampled_from([1, 1, 2, 5, 0])), max_size=5))
    prompt = draw(st.sampled_from([None, 1, 16, 32, 33, 200]))
    choices = draw(st.sampled_from([1, 1, 1, 2]))
    whose = draw(st.lists(st.integers(0, choices - 1), min_size=len(events), max_size=len(events)))
    return {
        "gap_ns": draw(st.integers(0, 60)) * MS,
        "send_ns": draw(st.integers(0, 3)) * MS,
        "length_ns": draw(st.integers(1, 400)) * MS,
        "off_us": np.cumsum([800 + gap for gap, _ in events]).astype(int).tolist(),
        "ntok": [k for _, k in events] if draw(st.integers(0, 7)) else None,
        "choice": bytes(whose) if choices > 1 else None,
        "outcome": draw(st.sampled_from(["ok", "ok", "ok", "client_abort", "http_error", "cut"])),
        "input_tokens": prompt,
        "cached_tokens": draw(st.sampled_from([None, 0, (prompt or 0) // 2])),
        "output_tokens": sum(k for _, k in events),
        "sample_prob": draw(st.sampled_from([None, 0.25])),
        "early_reply": draw(st.booleans()),
        "model": draw(st.sampled_from(["a", "b", None])),
        "tenant_digest": draw(st.sampled_from(["x", None])),
        "turn_index": draw(st.sampled_from([None, 0, 1])),
        "upstream_reused": draw(st.sampled_from([None, True, False])),
        "block_hashes": chained(draw(st.lists(st.integers(0, 1), max_size=3))),
    }


GAPS_US = st.sampled_from([0, 1, 1000, 3000, 9000, 250_000])
LOADS = st.lists(st.lists(requests(), max_size=9), min_size=5, max_size=5)
READINGS = st.lists(st.tuples(st.integers(0, 900), st.floats(0, 1e6)), max_size=5)


def chained(blocks: list[int]) -> list[int]:
    """Hashes of which each stands for all blocks up to it."""
    return [int("1" + "".join(map(str, blocks[: i + 1]))) for i in range(len(blocks))]


def placed(drawn: list[Row]) -> list[Row]:
    """The rows of a tape: each request a gap after the one before."""
    rows, now = [], 0
    for made in drawn:
        one = dict(made)
        now += one.pop("gap_ns")
        send, end = now + one["send_ns"], now + one["send_ns"] + one.pop("length_ns")
        at = [send + off * 1000 for off in one["off_us"]]
        first, last = (at[0], at[-1]) if at else (None, None)
        one |= {"arrival_ns": now, "send_ns": send, "send_end_ns": send, "end_ns": end}
        one |= {"first_content_ns": first, "first_answer_ns": first, "last_content_ns": last}
        one |= {"off_us": array("I", one["off_us"]), "cls": bytes(len(at))}
        one |= {"ntok": array("H", one["ntok"]) if one["ntok"] is not None else None}
        one |= {"n_choices": 2 if one["choice"] is not None else None}
        one |= {"block_tokens": 16, "block_unit": "token", "block_scope": "tape"}
        rows.append(streamed_row(0) | one)
    return rows


def span_s(rows: list[Row]) -> float:
    ends = [r["end_ns"] for r in rows]
    return (max(ends) - min(r["arrival_ns"] for r in rows)) / 1e9 if rows else 0.0


def took(row: Row) -> dict[str, float]:
    """Each metric of a request that ended well, the slowest choice for TPOT."""
    found: dict[str, float] = {}
    for metric, value in [*of_request(row), *of_choices(row)]:
        found[metric] = max(value, found.get(metric, 0.0))
    return found


def verdict(row: Row, limits: dict[str, int]) -> str:
    if row["outcome"] != "ok":
        return {"client_abort": "aborted", "cut": "cut"}.get(row["outcome"], "failed")
    known = {metric: value for metric, value in took(row).items() if metric in limits}
    if not known:
        return "unjudged"
    return "met" if all(value <= limits[metric] for metric, value in known.items()) else "missed"


def in_class(row: Row, slo: Slo) -> bool:
    prompt = row["input_tokens"]
    return (
        (slo.model is None or row["model"] == slo.model)
        and (slo.tenant is None or row["tenant_digest"] == slo.tenant)
        and (slo.prompt_from is None or (prompt is not None and prompt >= slo.prompt_from))
        and (slo.prompt_until is None or (prompt is not None and prompt <= slo.prompt_until))
    )


def agree_on_goodput(session: Session, runs: Runs) -> None:
    got = {(r["run"], r["slo"]): r for r in session.rows("FROM goodput")}
    assert len(got) == len(runs) * len(SLOS)
    for (run, rows), slo in ((item, slo) for item in runs.items() for slo in SLOS):
        mine = [(r, verdict(r, dict(slo.limits_ns))) for r in rows if in_class(r, slo)]
        sums: dict[str, float] = defaultdict(float)
        for row, word in mine:
            sums[word] += weight_of(row)
        row, judged = got[run, slo.name], sum(sums.values()) - sums["unjudged"]
        for word in ("met", "missed", "failed", "aborted", "cut", "unjudged"):
            assert row[word] == sums[word], (slo.name, word)
        attained = sums["met"] / judged if judged else None
        assert row["requests"] == len(mine) and row["attainment"] == near(attained)
        good = [r for r, word in mine if word == "met"]
        if mine:
            assert row["goodput_per_s"] == near(sums["met"] / span_s(rows))
        if good:
            tokens = sum(weight_of(r) * r["output_tokens"] for r in good)
            assert row["good_tokens_per_s"] == near(tokens / span_s(rows))


def near(value: float | None) -> Any:
    return None if value is None else pytest.approx(value, rel=1e-9)


def agree_on_fluidity(session: Session, runs: Runs) -> None:
    query = f"SELECT run, deadlines, missed FROM fluidity_at({FIRST_US}, {PACE_US}) ORDER BY ALL"
    wanted = sorted(
        (run, *fluidity(row))
        for run, rows in runs.items()
        for row in rows
        if row["choice"] is None and row["off_us"] and row["ntok"] and 0 not in row["ntok"]
    )
    assert session.sql(query).fetchall() == wanted


def fluidity(row: Row) -> tuple[int, int]:
    """(deadlines, missed), token by token; the tokens of an event but its first wait 0."""
    waits, before = [], (row["arrival_ns"] - row["send_ns"]) // 1000
    for off, k in zip(row["off_us"], row["ntok"], strict=True):
        waits += [off - before, *[0] * (k - 1)]
        before = off
    slack = met = missed = 0
    for i, wait in enumerate(waits):
        due = PACE_US if i else FIRST_US
        if wait <= due + slack:
            slack, met = slack + due - wait, met + 1
        else:
            missed, slack = missed + (wait - slack - due) // due + 1, 0
    return met + missed, missed


def agree_on_stalls(session: Session, runs: Runs) -> None:
    got = {r["run"]: r for r in session.rows("FROM stall_rates")}
    for run, rows in runs.items():
        long = [(row, gap) for row in rows if row["outcome"] == "ok" for gap in stalls(row)]
        ok = [r for r in rows if r["outcome"] == "ok" and r["off_us"]]
        decode = sum(weight_of(r) * (r["last_content_ns"] - r["first_content_ns"]) for r in ok)
        if decode == 0:
            assert run not in got
            continue
        stalled = sum(weight_of(row) * gap * 1000 for row, gap in long)
        row = got[run]
        assert (row["stalls"], row["requests"]) == (len(long), len({id(r) for r, _ in long}))
        assert row["longest_us"] == max((gap for _, gap in long), default=None)
        assert row["stalled_ns"] == near(stalled) and row["decode_ns"] == near(decode)
        assert row["stalled_share"] == near(stalled / decode)


def stalls(row: Row) -> list[int]:
    found = []
    for stream in streams_of(row):
        gaps = np.diff([off for off, _ in stream])
        if len(gaps):
            median = np.quantile(gaps, 0.5, method="inverted_cdf")
            found += [int(gap) for gap in gaps if gap > 200_000 and gap > 2 * median]
    return found


def agree_on_prefixes(session: Session, runs: Runs) -> None:
    got = {r["run"]: r for r in session.rows("FROM prefix_reuse")}
    for run, rows in runs.items():
        hashed = [r for r in rows if r["block_hashes"] and r["outcome"] != "http_error"]
        had: dict[int, int] = {}
        for row in hashed:
            for block in row["block_hashes"]:
                had.setdefault(block, row["arrival_ns"])  # rows are in order of arrival
        asked = [
            None
            if row["input_tokens"] is None
            else min(
                16 * sum(had[b] < row["arrival_ns"] for b in row["block_hashes"]),
                row["input_tokens"],
            )
            for row in hashed
        ]
        known = [(r, a) for r, a in zip(hashed, asked, strict=True) if a is not None]
        both = [(r, a) for r, a in known if r["cached_tokens"] is not None]
        row = got[run]
        assert row["requests"] == len(hashed)
        total = sum(weight_of(r) * a for r, a in known)
        assert row["asked_tokens"] == (total if known else None)
        prompts = sum(weight_of(r) * r["input_tokens"] for r, _ in known)
        assert row["asked_share"] == near(total / prompts if known else None)
        wanted = sum(weight_of(r) * a for r, a in both)
        hits = sum(weight_of(r) * r["cached_tokens"] for r, _ in both)
        assert row["got_of_asked"] == near(hits / wanted if wanted else None)


def agree_on_prices(session: Session, runs: Runs) -> None:
    """The whole is what the hours cost; the split by kind of token pays for all of it."""
    got = {r["run"]: r for r in session.rows("FROM price")}
    split = {r["run"]: r for r in session.rows(f"FROM price_split({PREFILL_S}, {CACHED_PART})")}
    rates = {r["run"]: r for r in session.rows("FROM hardware_rates")}
    for run, rows in ((run, rows) for run, rows in runs.items() if rows):
        usd, output = GPUS * USD * span_s(rows) / 3600, total(rows, "output_tokens")
        assert got[run]["usd"] == near(usd)
        assert got[run]["usd_per_m_output"] == near(usd / output * 1e6 if output else None)
        per_gpu = output / span_s(rows) / GPUS
        assert rates[run]["output_tokens_per_s_gpu"] == near(per_gpu)
        known = [r for r in rows if r["input_tokens"] is not None]
        if not known:
            continue
        both = total(known, "input_tokens") + output
        assert got[run]["usd_per_m_total"] == near(usd / both * 1e6)
        assert rates[run]["total_tokens_per_s_gpu"] == near(both / span_s(rows) / GPUS)
        cached = total(rows, "cached_tokens")
        uncached = total(known, "input_tokens") - total(known, "cached_tokens")
        share = min(1.0, uncached * PREFILL_S / span_s(rows))
        assert split[run]["prefill_share"] == near(share)
        paid = [
            tokens * price
            for tokens, name in ((uncached, "input"), (cached, "cached"), (output, "output"))
            if tokens and (price := split[run][f"usd_per_m_{name}"]) is not None
        ]
        whole = usd * (share if uncached + cached else 0) + usd * (1 - share if output else 0)
        assert sum(paid) / 1e6 == near(whole)


def total(rows: list[Row], name: str) -> float:
    return sum(weight_of(r) * (r[name] or 0) for r in rows)


def agree_on_tails(session: Session, runs: Runs) -> None:
    """Threshold, membership, and for every shared property its counts, lift and evidence."""
    of = session.rows(f"FROM tails_of('e2e', {LEVEL})")
    groups = {
        (r["run"], r["property"], r["value"]): r
        for r in session.rows(f"FROM tails_groups('e2e', {LEVEL})")
        if r["property"] in SHARED
    }
    wanted = 0
    for run, rows in runs.items():
        ok = [r for r in rows if r["outcome"] == "ok"]
        values = np.array([took(r)["e2e"] for r in ok])
        weights = np.array([weight_of(r) for r in ok])
        mine = [r for r in of if r["run"] == run]
        assert len(mine) == len(ok)
        if not ok:
            continue
        limit = float(np.quantile(values, LEVEL, method="inverted_cdf", weights=weights))
        assert {r["threshold_ns"] for r in mine} == {limit}
        tail = values > limit
        assert sum(r["tail"] for r in mine) == tail.sum()
        for name, shares in shared(ok, rows).items():
            for value, n in Counter(shares).items():
                hit = int(sum(t for s, t in zip(shares, tail, strict=True) if s == value))
                agree_on_group(groups[run, name, value], hit, n, int(tail.sum()), len(ok))
                wanted += 1
    assert len(groups) == wanted


def agree_on_group(row: Row, hit: int, n: int, in_tail: int, everything: int) -> None:
    assert (row["in_tail"], row["requests"]) == (hit, n)
    lift = hit / in_tail / (n / everything) if in_tail else None
    assert row["lift"] == near(lift)
    seen = np.array([[hit, n - hit], [in_tail - hit, everything - in_tail - n + hit]], float)
    expected = np.outer(seen.sum(1), seen.sum(0)) / everything
    terms = seen[seen > 0] * np.log(seen[seen > 0] / expected[seen > 0])
    sign = np.sign(hit * everything - n * in_tail)
    assert row["evidence"] == pytest.approx(2 * sign * terms.sum(), rel=1e-9, abs=1e-9)


def shared(ok: list[Row], rows: list[Row]) -> dict[str, list[str]]:
    """Each property of tails_of, by request."""
    waits = [(r["send_ns"], r["first_content_ns"] or 0, weight_of(r)) for r in rows]
    flights = [(r["send_ns"], r["end_ns"], weight_of(r)) for r in rows]
    words: dict[str, Callable[[Row], str]] = {
        "prompt": lambda r: bucket(r["input_tokens"]),
        "output": lambda r: bucket(r["output_tokens"]),
        "turn": lambda r: {None: "none", 0: "first"}.get(r["turn_index"], "later"),
        "cache": lambda r: {None: "unknown", 0: "miss"}.get(r["cached_tokens"], "hit"),
        "model": lambda r: r["model"] or "unknown",
        "tenant": lambda r: r["tenant_digest"] or "unknown",
        "connection": lambda r: {None: "unknown", True: "reused"}.get(r["upstream_reused"], "new"),
        "in_flight": lambda r: bucket(open_at(flights, r["send_ns"])),
        "waiting": lambda r: bucket(open_at(waits, r["send_ns"])),
    }
    return {name: [word(r) for r in ok] for name, word in words.items()}


def open_at(spans: list[tuple[int, int, float]], t_ns: int) -> int:
    return int(np.ceil(sum(weight for begin, end, weight in spans if begin <= t_ns < end)))


def bucket(tokens: int | None) -> str:
    """The power of two at or above it."""
    if tokens is None:
        return "unknown"
    return str(1 << (tokens - 1).bit_length() if tokens else 0)


def agree_on_energy(session: Session, runs: Runs, counters: dict[str, list[Any]]) -> None:
    got = {r["run"]: r for r in session.rows("FROM energy")}
    for run, rows in runs.items():
        readings = counters[run]
        at = [t for one in readings for t, _ in one]
        if not at or max(at) - min(at) < 1_000_000_000:
            assert run not in got
            continue
        steps = [max(b - a, 0.0) for one in readings for a, b in zip(*pairs(one), strict=True)]
        tokens = sum(
            weight_of(r) * k
            for r in rows
            for off, k in zip(r["off_us"], r["ntok"] or [], strict=bool(r["ntok"]))
            if min(at) <= r["send_ns"] + off * 1000 <= max(at)
        )
        row = got[run]
        assert row["counters"] == sum(bool(one) for one in readings)
        assert (row["from_ns"], row["until_ns"]) == (min(at), max(at))
        assert row["joules"] == pytest.approx(sum(steps), rel=1e-9, abs=1e-9)
        assert (row["output_tokens"] or 0) == tokens
        if tokens:
            each = pytest.approx(sum(steps) / tokens, rel=1e-9, abs=1e-9)
            assert row["joules_per_output_token"] == each


def pairs(readings: list[tuple[int, float]]) -> tuple[list[float], list[float]]:
    values = [value for _, value in sorted(readings)]
    return values[:-1], values[1:]


def with_energy(tape: Path, drawn: list[list[tuple[int, float]]]) -> list[list[tuple[int, float]]]:
    """Write the readings of each GPU, one an instant of 4 ms at most; returns them."""
    kept = [[(t * 4 * MS, value) for t, value in dict(one).items()] for one in drawn]
    name = "tokentape_gpu_energy_joules_total"
    rows = [
        {"ts_ns": t, "end_ns": t, "source": f"gpu{i}", "name": name, "labels": "{}", "value": v}
        for i, one in enumerate(kept)
        for t, v in one
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=TELEMETRY), tape / "telemetry" / "g.parquet")
    return kept


def ask_everything(drawn: list[list[Row]], readings: list[Any]) -> None:
    runs = {f"t{i}": placed(one) for i, one in enumerate(drawn)}
    with TemporaryDirectory() as folder:
        tapes = [make_tape(Path(folder) / name, rows) for name, rows in runs.items()]
        counters = {
            tape.name: with_energy(tape, one) for tape, one in zip(tapes, readings, strict=True)
        }
        told = {"": Hardware(gpus=GPUS, usd_per_gpu_hour=USD)}
        with connect(tapes, hardware=told, slos=SLOS) as session:
            agree_on_goodput(session, runs)
            agree_on_fluidity(session, runs)
            agree_on_stalls(session, runs)
            agree_on_prefixes(session, runs)
            agree_on_prices(session, runs)
            agree_on_tails(session, runs)
            agree_on_energy(session, runs, counters)


TWO_GPUS = st.lists(st.lists(READINGS, min_size=2, max_size=2), min_size=5, max_size=5)
LOOSE = settings(deadline=None, suppress_health_check=list(HealthCheck))


@given(LOADS, TWO_GPUS)
@settings(LOOSE, max_examples=3)
def test_every_view_says_what_a_loop_over_the_rows_says(
    drawn: list[list[Row]], readings: list[Any]
) -> None:
    ask_everything(drawn, readings)


@pytest.mark.slow
@given(LOADS, TWO_GPUS)
@settings(LOOSE, max_examples=100)
def test_every_view_says_it_on_a_hundred_loads(drawn: list[list[Row]], readings: list[Any]) -> None:
    ask_everything(drawn, readings)
