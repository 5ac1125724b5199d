"""Frontier and fleet on runs whose rates are known by hand."""

import math
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rows import MS, make_tape, streamed_row
from tokentape.analysis.fleet import HOURS_A_MONTH, fleet
from tokentape.analysis.frontier import LightSpeed, frontier
from tokentape.analysis.hardware import Hardware
from tokentape.analysis.session import Session, connect
from tokentape.analysis.slo import Slo
from tokentape.traces.errors import UsageError

S = 1000 * MS
TOKENS = 11  # 10 gaps, so that a reply takes 10 TPOT


def served(per_s: int, tpot_ms: int, seconds: int = 60) -> list[dict[str, Any]]:
    """Requests at a constant rate, all with the same TPOT; 20 us for each prompt token."""
    rows = []
    for i in range(per_s * seconds):
        at, prompt = i * S // per_s, 40 + i % 3 * 1000
        off = [60_000 + 20 * prompt + k * tpot_ms * 1000 for k in range(TOKENS)]
        times = {"arrival_ns": at, "send_ns": at, "send_end_ns": at}
        ends = {"first_content_ns": at + off[0] * 1000, "last_content_ns": at + off[-1] * 1000}
        row = streamed_row(0, TOKENS) | times | ends | {"off_us": array("I", off)}
        rows.append(row | {"end_ns": ends["last_content_ns"], "input_tokens": prompt})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of ever more load, each slower for its users; `waste` is worse than `mid` on both."""
    folder = tmp_path_factory.mktemp("frontier")
    for name, per_s, tpot_ms in (
        ("low", 2, 10),
        ("mid", 10, 20),
        ("high", 20, 80),
        ("waste", 8, 25),
    ):
        make_tape(folder / name, served(per_s, tpot_ms), role="replay")
    make_tape(folder / "prod", [*served(4, 10, 60), *shifted(served(12, 10, 30), 60 * S)])
    return folder


def shifted(rows: list[dict[str, Any]], by_ns: int) -> list[dict[str, Any]]:
    names = [n for n in rows[0] if n.endswith("_ns")]
    return [row | {n: row[n] + by_ns for n in names if row[n] is not None} for row in rows]


def opened(folder: Path, *names: str, **hardware: Hardware) -> Session:
    told = hardware or {"": Hardware(gpus=2, usd_per_gpu_hour=3)}
    return connect([folder / n for n in names], hardware=told, slos=[Slo("s", {"tpot": 30 * MS})])


def test_points_lie_where_the_rates_say_and_dominated_ones_are_marked(folder: Path) -> None:
    with opened(folder, "low", "mid", "high", "waste") as session:
        points = {p["run"]: p for p in frontier(session).points}
    assert list(points) == ["low", "mid", "waste", "high"]  # best for the user first
    for name, per_s, tpot_ms in (("low", 2, 10), ("mid", 10, 20), ("high", 20, 80)):
        point = points[name]
        assert point["tokens_per_s_user"] == pytest.approx(1000 / tpot_ms)
        assert point["tokens_per_s_user_p10"] == pytest.approx(1000 / tpot_ms)
        assert point["tokens_per_s_gpu"] == pytest.approx(per_s * TOKENS / 2, rel=0.03)
        assert point["usd_per_m_output"] == pytest.approx(6e6 / 3600 / (per_s * TOKENS), rel=0.03)
        assert point["tokens_per_s_gpu_lo"] <= per_s * TOKENS / 2 <= point["tokens_per_s_gpu_hi"]
    assert [name for name, point in points.items() if point["dominated"]] == ["waste"]


def test_the_operating_point_is_the_most_for_a_gpu_that_meets_the_slo(folder: Path) -> None:
    with opened(folder, "low", "mid", "high") as session:
        found = frontier(session, baseline=["low"], light=LightSpeed(16e9, 3.2e12))
    assert found.operating == "mid"
    assert [p["part"] for p in found.points] == ["frontier", "operating point", "frontier"]
    assert found.points[0]["of_light_speed"] == pytest.approx(100 / 400)
    assert found.pushed == pytest.approx(1)  # nobody else is as fast for the user
    assert "operating point at 99% of requests: mid" in found.text()


def test_a_better_run_pushes_the_frontier_of_the_baseline(folder: Path) -> None:
    with opened(folder, "waste", "mid") as session:
        found = frontier(session, baseline=["waste"])
    assert found.pushed == pytest.approx(10 / 8, rel=0.03)


def test_without_gpus_or_slo_a_run_is_not_placed_and_that_is_said(folder: Path) -> None:
    with connect([folder / "low"]) as session:
        found = frontier(session)
    assert found.operating is None and found.points[0]["part"] == "not placed"
    assert "give --gpus low=N" in found.text()
    with opened(folder, "low") as session, pytest.raises(UsageError, match="no such run"):
        frontier(session, baseline=["other"])


def test_a_fleet_carries_the_peak_with_headroom_and_spare(folder: Path) -> None:
    with opened(folder, "prod", "low", "mid", "high") as session:
        found = fleet(session, "prod", headroom=0.2, spare=1, peak_ns=30 * S)
    assert (found.run, found.peak_from_ns) == ("mid", 60 * S)
    assert found.need == pytest.approx(12 / 10, rel=0.03)
    assert found.deployments == math.ceil(1.2 * found.need) + 1 == 3
    assert (found.gpus, found.usd_per_month) == (6, 6 * 3 * HOURS_A_MONTH)
    assert found.need_lo is not None and found.need_hi is not None
    assert found.need_lo < found.need < found.need_hi
    assert "6 GPUs" in found.text() and "20% headroom over the peak" in found.text()


def test_the_prices_of_a_fleet_pay_for_its_month(folder: Path) -> None:
    with opened(folder, "prod", "mid") as session:
        found = fleet(session, "prod", peak_ns=30 * S)
    if found.usd_per_m_input is None or found.usd_per_m_output is None:
        pytest.fail("no price")
    requests, months = 4 * 60 + 12 * 30, 90 / 3600 / HOURS_A_MONTH
    paid = requests * (1040 * found.usd_per_m_input + TOKENS * found.usd_per_m_output) / 1e6
    assert found.usd_per_month == pytest.approx(paid / months, rel=0.01)


def test_a_fleet_needs_a_run_that_meets_the_slo_and_says_its_gpus(folder: Path) -> None:
    with opened(folder, "prod", "high") as session, pytest.raises(UsageError, match="met the SLO"):
        fleet(session, "prod")
    told = {"prod": Hardware(gpus=1)}
    with (
        opened(folder, "prod", "mid", **told) as session,
        pytest.raises(UsageError, match="give --gpus"),
    ):
        fleet(session, "prod")


def test_every_axis_and_who_is_dominated_agree_with_a_loop_over_random_runs(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(8)
    runs = {f"r{i}": random_run(rng, model="ab"[i % 2]) for i in range(6)}
    tapes = [make_tape(tmp_path / name, rows) for name, rows in runs.items()]
    limit = Slo("s", {"tpot": 40 * MS})
    told = {name: Hardware(gpus=1 + i % 3, usd_per_gpu_hour=2) for i, name in enumerate(runs)}
    with connect(tapes, hardware=told, slos=[limit]) as session:
        found = frontier(session, attain=0.8)
    points = {p["run"]: p for p in found.points}
    for name, rows in runs.items():
        agree_on_point(points[name], rows, told[name].gpus or 0)
    axes = {n: (p["tokens_per_s_user"], p["tokens_per_s_gpu"]) for n, p in points.items()}
    worse = {
        name
        for name, (user, gpu) in axes.items()
        for other, (more_user, more_gpu) in axes.items()
        if points[name]["model"] == points[other]["model"] and (user, gpu) != (more_user, more_gpu)
        if more_user >= user and more_gpu >= gpu
    }
    assert {n for n, p in points.items() if p["dominated"]} == worse != set()
    able = [n for n, p in points.items() if p["attainment"] >= 0.8]
    assert 0 < len(able) < len(points)
    assert found.operating == max(able, key=lambda n: axes[n][1])


def random_run(rng: np.random.Generator, model: str) -> list[dict[str, Any]]:
    """Requests at random times, each with a speed of its own; some fail, some are sampled."""
    mean_ms, rows = rng.uniform(10, 60), []
    for at in np.sort(rng.integers(0, 20 * S, 60)).tolist():
        gaps = rng.exponential(mean_ms * 1000, TOKENS).astype(int) + 1
        off = np.cumsum(gaps).tolist()
        ends = {"first_content_ns": at + off[0] * 1000, "last_content_ns": at + off[-1] * 1000}
        row = streamed_row(0, TOKENS) | {"arrival_ns": at, "send_ns": at, "send_end_ns": at} | ends
        row |= {"off_us": array("I", off), "end_ns": ends["last_content_ns"], "model": model}
        row |= {"outcome": "ok" if rng.random() < 0.9 else "timeout"}
        rows.append(row | {"sample_prob": 0.5 if rng.random() < 0.5 else None})
    return rows


def agree_on_point(point: dict[str, Any], rows: list[dict[str, Any]], gpus: float) -> None:
    begin, end = point["from_ns"], point["until_ns"]
    if point["measured_in"] == "whole run":
        assert (begin, end) == (rows[0]["arrival_ns"], max(r["end_ns"] for r in rows))
    weights = np.array([1 / (r["sample_prob"] or 1) for r in rows])
    tpot_ns = np.array([(r["last_content_ns"] - r["first_content_ns"]) / 10 for r in rows])
    ok = np.array([r["outcome"] == "ok" for r in rows])
    inside = np.array([begin <= r["arrival_ns"] <= end for r in rows])
    speeds, of = 1e9 / tpot_ns[ok & inside], weights[ok & inside]
    middle = np.quantile(speeds, 0.5, method="inverted_cdf", weights=of)
    slow = 1 / np.quantile(1 / speeds, 0.9, method="inverted_cdf", weights=of)
    tokens = sum(
        weight * sum(begin <= r["send_ns"] + off * 1000 <= end for off in r["off_us"])
        for r, weight in zip(rows, weights, strict=True)
    )
    met = weights[ok & (tpot_ns <= 40 * MS)].sum() / weights.sum()
    wanted = {
        "replies": len(speeds),
        "tokens_per_s_user": middle,
        "tokens_per_s_user_p10": slow,
        "offered_per_s": weights[inside].sum() / (end - begin) * 1e9,
        "tokens_per_s_gpu": tokens / (end - begin) * 1e9 / gpus,
        "usd_per_m_output": gpus * 2 * (end - begin) / 3.6e12 / tokens * 1e6,
        "attainment": met,
    }
    assert {name: point[name] for name in wanted} == {
        name: pytest.approx(value, rel=1e-9) for name, value in wanted.items()
    }
