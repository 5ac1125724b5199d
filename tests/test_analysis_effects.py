"""Effects that compare computes: gaps, SLOs, groups, and runs that differ among themselves."""

import json
import sys
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rows import MS, make_tape, streamed_row
from test_analysis_oracle import random_rows
from tokentape import cli
from tokentape.analysis import compare as analysis
from tokentape.analysis.attainment import Attained, of_slo
from tokentape.analysis.effects import STATS, Effect, Pairs, of_requests
from tokentape.analysis.session import connect
from tokentape.analysis.slo import Slo
from tokentape.analysis.statistics import Estimate
from tokentape.traces.errors import UsageError

S = 1000 * MS
N, EVENTS = 400, 12
IDS = [streamed_row(i)["request_id"] for i in range(N)]
LIMIT = Slo("s", {"ttft": 60 * MS})
SEED = 4


def run_rows(noise: int, large: float = 1.0, source: bool = True) -> list[dict[str, Any]]:
    """A request a second; replies of the model `large` are so much slower in their gaps."""
    common, own = np.random.default_rng(SEED), np.random.default_rng(noise)
    rows = []
    for i in range(N):
        model = "large" if common.random() < 0.5 else "small"
        gaps = common.lognormal(9, 0.5, EVENTS) * (large if model == "large" else 1)
        ttft_us = int(50_000 * own.lognormal(0, 0.2))
        off = (ttft_us + np.cumsum(gaps * own.lognormal(0, 0.02, EVENTS))).astype(int).tolist()
        at, ntok = i * S, [1 + (i + k) % 5 // 4 for k in range(EVENTS)]
        row = streamed_row(0, EVENTS) | {"arrival_ns": at, "send_ns": at, "send_end_ns": at}
        row |= {"first_content_ns": at + off[0] * 1000, "last_content_ns": at + off[-1] * 1000}
        row |= {"off_us": array("I", off), "ntok": array("H", ntok), "output_tokens": sum(ntok)}
        row |= {"end_ns": at + off[-1] * 1000, "model": model, "request_id": IDS[i]}
        if source:
            row |= {"source_request_id": IDS[i], "request_id": streamed_row(i)["request_id"]}
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def tapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("effects")
    made = {"source": run_rows(1, source=False), "slower": run_rows(2, large=1.2)}
    return {name: make_tape(folder / name, rows) for name, rows in made.items()}


@pytest.fixture(scope="module")
def found(tapes: dict[str, Path]) -> analysis.Comparison:
    with connect(list(tapes.values()), slos=[LIMIT, Slo("none", {"e2e": S}, model="x")]) as session:
        return analysis.compare(session, ["source"], ["slower"])


def effect(found: analysis.Comparison, group: str, metric: str, stat: str) -> Effect:
    [one] = [e for e in found.effects if (e.group, e.metric, e.stat) == (group, metric, stat)]
    return one


def test_longer_gaps_are_found_within_their_interval_and_in_their_group_only(
    found: analysis.Comparison,
) -> None:
    for metric in ("icl", "itl_user", "itl_spread"):
        for stat in ("p50", "p99"):
            one = effect(found, "model large", metric, stat)
            assert one.lo is not None and one.hi is not None and one.word == "higher"
            assert one.lo <= 0.2 <= one.hi and one.hi - one.lo < 0.1
        assert effect(found, "model small", metric, "p50").word == "no clear change"


def test_gaps_of_both_sides_agree_with_numpy_to_half_a_bucket(found: analysis.Comparison) -> None:
    for side, rows in (("a", run_rows(1)), ("b", run_rows(2, large=1.2))):
        gaps = [(np.diff(r["off_us"]), np.array(r["ntok"])) for r in rows]
        icl = np.concatenate([gap for gap, _ in gaps])
        zeros = int(sum((ntok - 1).sum() for _, ntok in gaps))
        spread = np.concatenate([np.repeat(gap / ntok[1:], ntok[1:]) for gap, ntok in gaps])
        values = {"icl": icl, "itl_user": np.append(icl, np.zeros(zeros)), "itl_spread": spread}
        for metric, all_of in values.items():
            for stat, p in STATS.items():
                one = effect(found, "all", metric, stat)
                wanted = 1000 * np.quantile(all_of, p, method="inverted_cdf")
                assert getattr(one, side) == pytest.approx(wanted, rel=0.0028), (metric, stat)
                assert one.n == len(all_of)


def test_gaps_of_odd_replies_are_those_of_metrics_long(tmp_path: Path) -> None:
    """Several choices, events without tokens, unknown tokens: against the exact numbers."""
    rows = [row | {"outcome": "ok"} for row in random_rows(2) if row["send_ns"]]
    copies = [row | {"source_request_id": row["request_id"]} for row in rows]
    tapes = [make_tape(tmp_path / "a", rows), make_tape(tmp_path / "b", copies, "replay")]
    with connect(tapes) as session:
        made = analysis.compare(session, ["a"], ["b"])
    with connect(tapes[:1]) as session:
        long = session.rows("FROM metrics_long WHERE metric IN ('icl', 'itl_user', 'itl_spread')")
    for row in (r for r in long if r["stat"] in STATS):
        one = effect(made, "all", row["metric"], row["stat"])
        assert one.n == row["n"] > 1000
        assert one.a == one.b == pytest.approx(row["value"], rel=0.0028)


def test_an_slo_has_both_sides_and_the_change_between_them(found: analysis.Comparison) -> None:
    empty, one = found.attained
    parts = [
        np.mean([r["first_content_ns"] - r["send_ns"] <= 60 * MS for r in rows])
        for rows in (run_rows(1), run_rows(2, large=1.2))
    ]
    assert [one.a.value, one.b.value] == pytest.approx(parts)
    assert one.change is not None and one.lo is not None and one.hi is not None
    assert one.change == pytest.approx(parts[1] - parts[0])
    assert one.lo < one.change < one.hi
    assert one.hi - one.lo < 0.2
    assert one.goodput_a == pytest.approx(parts[0] * N / (N - 1), rel=0.01)
    assert (empty.n, empty.change) == (0, None)
    assert f"SLO s: A {100 * parts[0]:.2f} %" in found.text()


def test_a_gate_on_an_slo_fails_on_a_clear_loss_only(found: analysis.Comparison) -> None:
    def judged(lo: float | None, hi: float | None, gate: str) -> str | None:
        side = Estimate(0.9, None, None, 100, None)
        lost = Attained("s", side, side, -0.03, lo, hi, None, None, 100)
        return analysis.judge(replace(found, attained=[lost]), [gate])[gate]

    assert judged(-0.05, 0.01, "slo_attainment<-1%") is None  # may be chance
    assert judged(-0.05, -0.01, "slo_attainment<-5%") is None  # not so much
    why = judged(-0.05, -0.01, "slo_attainment<-1%")
    told = "slo_attainment<-1%: -3.00% of requests for s, 95 % -5.00 .. -1.00 %"
    assert why == told
    assert judged(None, None, "slo_attainment<-1%") == (
        "slo_attainment<-1%: too few pairs for s (n=100)"
    )
    with pytest.raises(UsageError, match="give the objective"):
        analysis.judge(replace(found, attained=[]), ["slo_attainment<-1%"])
    with pytest.raises(UsageError, match="part of requests"):
        analysis.judge(found, ["slo_attainment<-5ms"])


def test_an_slo_on_the_command_line_is_compared_and_told_everywhere(
    tapes: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    sides = [str(tapes["source"]), str(tapes["slower"]), "--json", "--slo", "ttft=60ms"]
    files = {
        "--junit": tmp_path / "j.xml",
        "--summary": tmp_path / "s.md",
        "--html": tmp_path / "h",
    }
    more = [word for option, file in files.items() for word in (option, str(file))]
    monkeypatch.setattr(sys, "argv", ["tokentape", "compare", *sides, *more])
    with pytest.raises(SystemExit) as left:
        cli.run()
    assert left.value.code == 0
    [one] = json.loads(capfd.readouterr().out)["attained"]
    assert one["slo"] == "ttft=60ms" and one["n"] == N and one["lo"] < one["change"] < one["hi"]
    for file in files.values():
        assert "SLO ttft=60ms: A " in file.read_text()


RUNS_A_SIDE, SIMULATIONS, RUN_SD = 3, 60, 0.05


def several_runs(rng: np.random.Generator, runs: int) -> tuple[Pairs, np.ndarray]:
    """Requests of runs that differ by 5 % among themselves, and by nothing between the sides."""
    n = 60
    key = np.tile(np.arange(n), 2 * runs)
    run = np.repeat(np.arange(2 * runs), n)
    sides = {"A": run < runs, "B": run >= runs}
    factors = rng.lognormal(0, RUN_SD, 2 * runs)[run]
    values = rng.lognormal(0, 0.1, n)[key] * factors * rng.lognormal(0, 0.01, len(key))
    return Pairs(key, run, sides, np.arange(n) * S), values


def test_what_runs_differ_by_is_in_the_interval_of_several_runs() -> None:
    """Coverage of no change at 95 %: at least 85 %; without what runs differ by, under 60 %."""
    rng = np.random.default_rng(SEED)
    held = alone = 0
    for _ in range(SIMULATIONS):
        pairs, values = several_runs(rng, RUNS_A_SIDE)
        everyone = np.ones(len(values), bool)
        one = of_requests(pairs, values, np.ones(len(values)), everyone, "all", "x")[0]
        assert one.lo is not None and one.hi is not None and one.between_runs is not None
        held += one.lo <= 0 <= one.hi
        as_one = replace(pairs, run=np.where(pairs.sides["A"], 0, 1))
        [narrow, *_] = of_requests(as_one, values, np.ones(len(values)), everyone, "all", "x")
        assert narrow.lo is not None and narrow.hi is not None and narrow.between_runs is None
        alone += narrow.lo <= 0 <= narrow.hi
    assert held >= 0.85 * SIMULATIONS and alone < 0.6 * SIMULATIONS, (held, alone)


def test_runs_of_one_side_speak_for_a_side_of_one_run() -> None:
    rng = np.random.default_rng(SEED)
    pairs, values = several_runs(rng, 3)
    a_once = pairs.sides["A"] & (pairs.run == 0)
    lone = replace(pairs, sides={"A": a_once, "B": pairs.sides["B"]})
    one = of_requests(lone, values, np.ones(len(values)), np.ones(len(values), bool), "all", "x")[0]
    medians = [
        np.quantile(values[pairs.run == run], 0.5, method="inverted_cdf") for run in (3, 4, 5)
    ]
    assert one.lo is not None and one.hi is not None and one.between_runs is not None
    assert one.between_runs == pytest.approx(np.std(np.log(medians), ddof=1))
    reach = 4.303 * one.between_runs * np.sqrt(1 + 1 / 3)  # Student's t with 2 degrees of freedom
    assert np.log1p(one.hi) - np.log1p(one.lo) > 2 * reach


def test_the_change_of_an_slo_holds_the_truth_also_where_all_requests_met_it() -> None:
    """Coverage of a loss of 2 % of requests at 95 %: at least 85 %."""
    rng = np.random.default_rng(SEED)
    n, held = 300, 0
    key, run = np.tile(np.arange(n), 2), np.repeat([0, 1], n)
    pairs = Pairs(key, run, {"A": run == 0, "B": run == 1}, np.arange(n) * S)
    for _ in range(SIMULATIONS):
        a = rng.random(n) < 0.98
        b = a & (rng.random(n) < 0.96 / 0.98)
        one = of_slo("s", pairs, np.append(a, b).astype(float), np.ones(2 * n), (None, None))
        assert one.lo is not None and one.hi is not None
        held += one.lo <= -0.02 <= one.hi
    assert held >= 0.85 * SIMULATIONS, held
    all_met = of_slo("s", pairs, np.ones(2 * n), np.ones(2 * n), (None, None))
    assert all_met.change == 0 and all_met.lo is not None and all_met.hi is not None
    assert all_met.lo == -all_met.hi and 0.005 < all_met.hi < 0.01
