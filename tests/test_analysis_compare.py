"""compare: pairs, effects that were put in, warnings and gates."""

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rows import MS, make_tape, streamed_row
from tokentape import cli
from tokentape.analysis import compare as analysis
from tokentape.analysis import comparison_page, verdicts
from tokentape.analysis.effects import Effect
from tokentape.analysis.session import connect
from tokentape.traces.errors import UsageError

N = 1500
SEED = 3
IDS = [streamed_row(i)["request_id"] for i in range(N)]


def run_tape(
    path: Path,
    source: Path | None,
    ids: list[Any],
    slower: float = 1.0,
    noise: int = 1,
    **facts: Any,
) -> Path:
    """A request each 200 ms whose TTFT wanders with time; the same wandering for every run."""
    common, own = np.random.default_rng(SEED), np.random.default_rng(noise)
    wander = np.exp(np.cumsum(common.normal(0, 0.1, N)).clip(-1, 1))
    rows = []
    for i in range(N):
        arrival = i * 200 * MS
        ttft = int(50 * MS * wander[i] * slower * own.lognormal(0, 0.02))
        row = streamed_row(0, 3, arrival_ns=arrival, send_ns=arrival, send_end_ns=arrival)
        row |= {"first_content_ns": arrival + ttft, "last_content_ns": arrival + ttft + 40 * MS}
        row |= {"end_ns": arrival + ttft + 41 * MS, "request_id": ids[i]}
        if source:
            row |= {"source_request_id": ids[i], "copy_index": 0, "request_id": None}
            row["request_id"] = streamed_row(i)["request_id"]
        rows.append(row)
    known: Any = {"verdict": {"level": "valid", "reasons": []}} if source else {}
    return make_tape(path, rows, role="replay" if source else "capture", **(known | facts))


@pytest.fixture(scope="module")
def tapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("compare")
    ids = IDS
    source = run_tape(folder / "source", None, ids)
    invalid: Any = {"verdict": {"level": "invalid", "reasons": ["late"]}}
    return {
        "source": source,
        "same": run_tape(folder / "same", source, ids, noise=2),
        "slower": run_tape(folder / "slower", source, ids, slower=1.1, noise=3),
        "other": run_tape(folder / "other", None, [streamed_row(9)["request_id"] for _ in ids]),
        "bad": run_tape(folder / "bad", source, ids, noise=4, **invalid),
    }


def compared(tapes: dict[str, Path], a: list[str], b: list[str]) -> analysis.Comparison:
    with connect([tapes[name] for name in (*a, *b)]) as session:
        return analysis.compare(session, session.labels[: len(a)], session.labels[len(a) :])


def effect(found: analysis.Comparison, metric: str, stat: str) -> Effect:
    [one] = [e for e in found.effects if (e.group, e.metric, e.stat) == ("all", metric, stat)]
    return one


def test_a_candidate_that_is_ten_percent_slower_is_found_within_its_interval(
    tapes: dict[str, Path],
) -> None:
    found = compared(tapes, ["source"], ["slower"])
    assert found.pairs == N and found.warnings == []
    for stat in ("p50", "p90", "p99"):
        one = effect(found, "ttft", stat)
        assert one.lo is not None and one.hi is not None and one.word == "higher", stat
        assert one.lo <= 0.1 <= one.hi and one.hi - one.lo < 0.1, stat
    assert effect(found, "tpot", "p50").change == 0


def test_two_runs_of_one_candidate_do_not_differ(tapes: dict[str, Path]) -> None:
    found = compared(tapes, ["source"], ["same"])
    assert {e.word for e in found.effects if e.metric == "ttft"} == {"no clear change"}
    gates = analysis.judge(found, ["ttft_p50>0%", "ttft_p99>+5%", "failed>+0%"])
    assert list(gates.values()) == [None] * 3


def test_several_runs_on_a_side_pair_with_each_request(tapes: dict[str, Path]) -> None:
    found = compared(tapes, ["source", "same"], ["slower"])
    one = effect(found, "ttft", "p50")
    assert (found.pairs, one.n, one.word) == (N, N, "higher")


def test_a_gate_fails_on_a_clear_change_beyond_its_limit_only(tapes: dict[str, Path]) -> None:
    found = compared(tapes, ["source"], ["slower"])
    failure, none = analysis.judge(found, ["ttft_p50>+5%", "ttft_p50>+20%"]).values()
    assert none is None and failure is not None
    assert failure.startswith("ttft_p50>+5%: +") and "95 %" in failure
    for wrong in ("ttft>5%", "speed_p50>5%", "ttft_p50>5"):
        with pytest.raises(UsageError, match="need METRIC_STAT"):
            analysis.judge(found, [wrong])


def test_a_run_that_its_verdict_calls_invalid_is_named(tapes: dict[str, Path]) -> None:
    assert compared(tapes, ["source"], ["bad"]).warnings == [
        "the run bad is invalid; see report bad"
    ]


def test_tapes_that_share_no_request_are_refused(tapes: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="share no request"):
        compared(tapes, ["source"], ["other"])


def test_too_few_pairs_are_said_instead_of_a_number(tmp_path: Path) -> None:
    rows = [streamed_row(i) for i in range(50)]
    copies = [streamed_row(i) | {"source_request_id": r["request_id"]} for i, r in enumerate(rows)]
    pair = {"a": make_tape(tmp_path / "a", rows), "b": make_tape(tmp_path / "b", copies, "replay")}
    found = compared(pair, ["a"], ["b"])
    one = effect(found, "ttft", "p99")
    assert (one.a, one.change, one.word, one.n) == (None, None, "too few", 50)
    gates = analysis.judge(found, ["ttft_p99>+5%"])
    assert gates == {"ttft_p99>+5%": "ttft_p99>+5%: too few pairs (n=50)"}
    assert "too few" in found.text()


def test_junit_has_a_case_for_each_gate_and_its_failure(tapes: dict[str, Path]) -> None:
    found = compared(tapes, ["source"], ["slower"])
    gates = analysis.judge(found, ["ttft_p50>+5%", "ttft_p50>+20%"])
    suite = ET.fromstring(verdicts.junit(found, gates))
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    cases = {case.get("name"): case.find("failure") for case in suite.iter("testcase")}
    assert cases["ttft_p50>+20%"] is None
    failure = cases["ttft_p50>+5%"]
    assert failure is not None and "95 %" in (failure.get("message") or "")


def test_the_summary_says_which_gates_failed_and_what_changed(tapes: dict[str, Path]) -> None:
    found = compared(tapes, ["source"], ["bad"])
    gates = analysis.judge(found, ["ttft_p50>+5%", "failed>+1%"])
    page = verdicts.markdown(found, gates).splitlines()
    assert "- ✅ `ttft_p50>+5%`" in page and "- ✅ `failed>+1%`" in page
    assert "- ⚠️ the run bad is invalid; see report bad" in page
    rows = [line for line in page if line.startswith("| ttft p50 |")]
    assert len(rows) == 1 and rows[0].count("|") == 8


@pytest.mark.parametrize(("gate", "code"), [("ttft_p50>+5%", 3), ("ttft_p50>+20%", 0), ("x", 2)])
def test_the_exit_code_says_whether_the_gates_were_met(
    tapes: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    gate: str,
    code: int,
) -> None:
    sides = [str(tapes["source"]), str(tapes["slower"])]
    files = ["--junit", str(tmp_path / "j.xml"), "--summary", str(tmp_path / "s.md")]
    monkeypatch.setattr(sys, "argv", ["tokentape", "compare", *sides, "--fail-if", gate, *files])
    with pytest.raises(SystemExit) as left:
        cli.run()
    assert left.value.code == code
    assert (tmp_path / "j.xml").exists() == (tmp_path / "s.md").exists() == (code != 2)
    assert ("compare: ttft_p50>+5%" in capfd.readouterr().err) == (code == 3)


def test_gates_on_times_are_of_the_change_with_a_sign_and_of_the_value_without(
    tapes: dict[str, Path],
) -> None:
    found = compared(tapes, ["source"], ["slower"])
    new = effect(found, "ttft", "p50")
    assert new.a is not None and new.b is not None
    more, value = (new.b - new.a) / 1e6, new.b / 1e6
    told = {f"ttft_p50>+{more * 0.9:.2f}ms": True, f"ttft_p50>+{more * 1.1:.2f}ms": False}
    told |= {f"ttft_p50>{value * 0.9:.2f}ms": True, f"ttft_p50>{value * 1.1:.2f}ms": False}
    told |= {f"ttft_p50<{value * 1.1:.2f}ms": True, "ttft_p50<-1%": False, "ttft_p50<+99%": False}
    gates = analysis.judge(found, list(told))
    assert {gate: why is not None for gate, why in gates.items()} == told
    with pytest.raises(UsageError, match="part of requests"):
        analysis.judge(found, ["failed>5ms"])


def test_outcomes_and_lengths_that_changed_are_counted(tmp_path: Path) -> None:
    rows = [streamed_row(i, 3) | {"input_tokens": 10, "output_tokens": 3} for i in range(50)]
    copies = [
        streamed_row(i, 3)
        | {"source_request_id": row["request_id"], "input_tokens": 10, "output_tokens": 3 + i % 2}
        | {"outcome": "timeout" if i < 5 else "ok"}
        for i, row in enumerate(rows)
    ]
    pair = {"a": make_tape(tmp_path / "a", rows), "b": make_tape(tmp_path / "b", copies, "replay")}
    found = compared(pair, ["a"], ["b"])
    assert found.outcomes == {"A": {"ok": 50}, "B": {"ok": 45, "timeout": 5}}
    assert found.failed_on_one_side == {"A": 0, "B": 5}
    assert [(x.what, x.a, x.b, x.changed, x.n) for x in found.lengths] == [
        ("input", 10.0, 10.0, 0, 50),
        ("output", 3.0, 3.5, 25, 50),
    ]
    assert "failed on one side: A 0, B 5" in found.text()
    assert "mean output tokens differ: A 3.00, B 3.50" in found.warnings


def test_what_makes_runs_incomparable_is_said(tapes: dict[str, Path], tmp_path: Path) -> None:
    odd: Any = {
        "verdict": None,
        "options": {"speed": "2", "turns": "think"},
        "candidate": {"given": {"gpu": "H200"}},
    }
    mine = tapes | {"odd": run_tape(tmp_path / "odd", tapes["source"], IDS, **odd)}
    assert compared(mine, ["same"], ["odd"]).warnings == [
        "the run odd has no verdict: it did not end, or another tool made it",
        "the load differs, speed: A 1, B 2",
        "the load differs, turns: A as recorded, B think",
        "not known of A, but of B: gpu (--fact)",
    ]


def test_the_page_is_one_file_with_every_interval_drawn(tapes: dict[str, Path]) -> None:
    found = compared(tapes, ["source"], ["slower"])
    page = comparison_page.page(found, analysis.judge(found, ["ttft_p50>+5%"]))
    assert not re.search(r"src=|href=\"[^#]|https?:|<script|@import|url\(", page)
    root = ET.fromstring(page.replace("<!doctype html>", "").replace('<meta charset="utf-8">', ""))
    rows = root.findall(".//tbody/tr")
    assert len(rows) == len(found.effects)
    drawn = [row.find(".//svg") is not None for row in rows]
    assert drawn == [e.lo is not None and e.change is not None for e in found.effects]
    [higher] = [r for r in rows if "".join(r.itertext()).startswith("allttft p50")]
    assert higher.get("class") == "higher" and "❌" in page


def test_a_page_that_exists_is_not_replaced_unless_forced(
    tapes: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "page.html"
    file.write_text("mine")
    args = ["tokentape", "compare", str(tapes["source"]), str(tapes["same"]), "--html", str(file)]
    for more, code in (([], 1), (["--force"], 0)):
        monkeypatch.setattr(sys, "argv", [*args, *more])
        with pytest.raises(SystemExit) as left:
            cli.run()
        assert left.value.code == code
        assert (file.read_text() == "mine") == bool(code)
    assert "exists; --force" in capfd.readouterr().err
