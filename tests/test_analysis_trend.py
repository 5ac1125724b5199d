"""Change points over many runs: planted ones are found, chance is not called a change."""

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from rows import MS, make_tape, streamed_row
from tokentape import cli
from tokentape.analysis.session import connect
from tokentape.analysis.trend import CHANCE, LEAST_RUNS, Series, Trend, changes, judge, trend
from tokentape.traces.errors import UsageError

RUNS = [f"r{i:02}" for i in range(24)]


def noisy(levels: list[float], seed: int = 1) -> list[float]:
    noise = np.random.default_rng(seed).lognormal(0, 0.02, len(levels))
    return [level * factor for level, factor in zip(levels, noise.tolist(), strict=True)]


def test_a_step_is_found_where_it_is_with_its_size() -> None:
    [change] = changes(RUNS, noisy([100.0] * 10 + [110.0] * 14))
    assert change.at == "r10"
    assert change.lo < 0.1 < change.hi and change.lo > 0.06 and change.hi < 0.14
    assert change.chance < CHANCE


def test_two_steps_are_found_each_against_its_neighbours() -> None:
    first, second = changes(RUNS, noisy([100.0] * 7 + [120.0] * 10 + [90.0] * 7))
    assert (first.at, second.at) == ("r07", "r17")
    assert first.change == pytest.approx(0.2, abs=0.03)
    assert second.change == pytest.approx(-0.25, abs=0.03)


def test_one_odd_run_is_no_change_and_unknown_values_are_left_out() -> None:
    values: list[float | None] = list(noisy([100.0] * 24))
    values[12] = 200.0
    values[3] = None
    assert changes(RUNS, values) == []


def test_chance_is_called_a_change_as_rarely_as_promised() -> None:
    found = sum(bool(changes(RUNS[:16], noisy([100.0] * 16, seed))) for seed in range(100))
    assert found <= 5  # 1 of 100 expected; 6 or more has a chance of 0.05 %


def test_fewer_runs_than_can_show_it_have_no_change() -> None:
    few = [100.0] * 5 + [200.0] * (LEAST_RUNS - 6)
    assert changes(RUNS[: len(few)], few) == []
    assert len(changes(RUNS[:LEAST_RUNS], noisy([100.0] * 5 + [200.0] * 5))) == 1


def test_runs_are_put_in_the_order_of_their_making(tmp_path: Path) -> None:
    names = ["z", "a", "m"]
    for i, name in enumerate(names):
        rows = [streamed_row(j, 3, first_content_ns=(j + 2 + i) * MS) for j in range(20)]
        make_tape(tmp_path / name, rows, created_unix_ns=1000 + i)
    with connect([tmp_path / name for name in sorted(names)]) as session:
        found = trend(session)
    assert found.runs == names
    [ttft] = [s for s in found.series if (s.metric, s.stat) == ("ttft", "p50")]
    assert ttft.values == [1 * MS, 2 * MS, 3 * MS] and ttft.word == "too few (n=3)"
    [tail] = [s for s in found.series if (s.metric, s.stat) == ("ttft", "p99")]
    assert tail.values == [None] * 3  # 20 requests have no p99
    assert "too few (n=3)" in found.text()


def test_one_run_has_no_trend(tmp_path: Path) -> None:
    with (
        connect([make_tape(tmp_path / "t", [])]) as session,
        pytest.raises(UsageError, match="two runs or more"),
    ):
        trend(session)


def told(values: list[float | None], unit: str = "ns") -> Trend:
    runs = RUNS[: len(values)]
    ends: list[tuple[float | None, float | None]] = [(None, None)] * len(values)
    return Trend(runs, [Series("ttft", "p99", unit, values, ends, [], len(values))])


def test_a_gate_fails_on_what_the_history_does_not_let_expect() -> None:
    usual = noisy([100e6] * 9)
    assert judge(told([*usual, 101e6]), ["ttft_p99>+0%"]) == {"ttft_p99>+0%": None}  # its noise
    gates = ["ttft_p99>+5%", "ttft_p99>+50%", "ttft_p99>+10ms", "ttft_p99>200ms", "ttft_p99<90ms"]
    found = judge(told([*usual, 120e6]), gates)
    assert [why is not None for why in found.values()] == [True, False, True, False, False]
    assert "over 9 runs, 95 % +" in str(found["ttft_p99>+5%"])


def test_the_history_of_a_gate_begins_at_the_last_change() -> None:
    values = noisy([100e6] * 8 + [150e6] * 8)
    assert judge(told([*values, 150e6]), ["ttft_p99>+5%"]) == {"ttft_p99>+5%": None}
    assert judge(told([*values, 100e6]), ["ttft_p99<-5%"])["ttft_p99<-5%"] is not None


def test_a_history_too_short_to_tell_fails_a_gate() -> None:
    [why] = judge(told([100e6] * 5), ["ttft_p99>+5%"]).values()
    assert why == "ttft_p99>+5%: too few runs before r04 (n=4)"
    [why] = judge(told([*noisy([100e6] * 9), None]), ["ttft_p99>+5%"]).values()
    assert why == "ttft_p99>+5%: too few samples in r09"
    with pytest.raises(UsageError, match="need METRIC_STAT"):
        judge(told([100e6] * 5), ["ttft_p90>+5%"])


@pytest.fixture(scope="module")
def nightly(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Seven runs of one candidate, and one whose first tokens come half as late again."""
    folder = tmp_path_factory.mktemp("nightly")
    for i in range(8):
        slower = 1.5 if i == 7 else 1 + i % 3 / 100
        rows = [
            streamed_row(j, 3, first_content_ns=(j + 1) * MS + int(50 * MS * slower))
            for j in range(30)
        ]
        make_tape(folder / f"run{i}", rows, role="replay", created_unix_ns=1000 + i)
    return [str(path) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize(
    ("gate", "until", "code", "why"),
    [
        ("ttft_p50>+5%", 8, 3, "trend: ttft_p50>+5%: +48"),
        ("ttft_p50>+5%", 7, 0, ""),  # as the runs before
        ("ttft_p50>70ms", 8, 3, "trend: ttft_p50>70ms: 75.0 ms"),
        ("ttft_p50>+5%", 4, 3, "too few runs before run3 (n=3)"),
        ("tpot>5%", 8, 2, "need METRIC_STAT"),
    ],
)
def test_the_exit_code_of_a_gate_on_the_latest_run(
    nightly: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    gate: str,
    until: int,
    code: int,
    why: str,
) -> None:
    junit, summary = tmp_path / "j.xml", tmp_path / "s.md"
    told = ["--fail-if", gate, "--junit", str(junit), "--summary", str(summary)]
    monkeypatch.setattr(sys, "argv", ["tokentape", "trend", *nightly[:until], *told])
    with pytest.raises(SystemExit) as left:
        cli.run()
    out, err = capfd.readouterr()
    assert left.value.code == code, err
    assert why in err
    assert junit.exists() == summary.exists() == (code != 2)
    if code == 2:
        return
    latest = f"run{until - 1} after {until - 1} runs"
    suite = ET.fromstring(junit.read_text())
    assert suite.get("name") == latest and suite.get("failures") == str(int(code == 3))
    failure = suite.find("testcase/failure")
    assert (failure is not None and why.removeprefix("trend: ") in str(failure.text)) == bool(code)
    page = summary.read_text()
    assert page.startswith(f"### {latest}") and f"- {'❌' if code else '✅'} `{gate}`" in page
    assert "| ttft p50 |" in page and f"run{until - 1}" in out
