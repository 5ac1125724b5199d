"""Goodput, stalls, steady windows and rates over time, by hand and against numpy."""

from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rows import MS, make_tape, streamed_row
from test_analysis_oracle import of_request, random_rows, streams_of, weight_of
from tokentape.analysis import slo
from tokentape.analysis.session import connect
from tokentape.analysis.slo import Slo
from tokentape.analysis.statistics import share
from tokentape.cli.objectives import slos as read_slos
from tokentape.traces.errors import UsageError

Row = dict[str, Any]
S = 1000 * MS


def verdicts(tape: Path, *slos: Slo) -> dict[str, list[str]]:
    """Verdicts of the requests by SLO, in order of arrival."""
    query = "SELECT slo, verdict FROM goodput_requests ORDER BY arrival_ns"
    with connect([tape], slos=slos) as session:
        found: dict[str, list[str]] = {}
        for name, verdict in session.sql(query).fetchall():
            found.setdefault(name, []).append(verdict)
    return found


def test_failures_stay_in_the_denominator_and_what_no_limit_fits_counts_nowhere(
    tmp_path: Path,
) -> None:
    rows = [
        streamed_row(0, 3),  # TTFT from arrival 2 ms, TPOT 1 ms
        streamed_row(10, 3, first_content_ns=13 * MS, last_content_ns=14 * MS),  # TTFT 3 ms
        streamed_row(20, 0, outcome="http_error"),
        streamed_row(30, 3, outcome="client_abort"),
        streamed_row(40, 3, outcome="cut", end_ns=None),
        streamed_row(50, 0, outcome="ok"),  # a whole reply
        streamed_row(60, 1),  # no TPOT
    ]
    tape = make_tape(tmp_path / "t", rows)
    limits = {"ttft_arrival": 2 * MS, "tpot": MS}
    assert verdicts(tape, Slo("a", limits))["a"] == [
        *("met", "missed", "failed", "aborted", "cut", "unjudged", "met"),
    ]
    with connect([tape], slos=[Slo("a", limits)]) as session:
        [row] = session.table("FROM goodput").to_pylist()
        long = session.sql("SELECT metric, stat, value, n FROM metrics_long WHERE stat = 'a'")
        assert set(long.fetchall()) == {
            ("goodput", "a", row["goodput_per_s"], 6),
            ("slo_attainment", "a", 2 / 6, 6),
        }
    assert (row["requests"], row["met"], row["skipped"]) == (7, 2, 1)
    assert row["goodput_per_s"] == pytest.approx(2 / 0.063)  # the last one ends at 63 ms
    assert row["good_tokens_per_s"] == pytest.approx(4 / 0.063)


def test_a_limit_is_kept_when_it_is_reached_exactly_and_names_what_broke(tmp_path: Path) -> None:
    tape = make_tape(tmp_path / "t", [streamed_row(0, 3)])
    with connect([tape], slos=[Slo("a", {"ttft": MS, "tpot": MS - 1, "e2e": 1})]) as session:
        assert session.sql("SELECT broken FROM goodput_requests").fetchall() == [(["tpot", "e2e"],)]


def test_a_class_holds_only_its_requests_and_an_empty_one_says_so(tmp_path: Path) -> None:
    rows = [
        streamed_row(0, model="small", input_tokens=100, tenant_digest="x"),
        streamed_row(1, model="large", input_tokens=101),
        streamed_row(2, model="large", input_tokens=None),
    ]
    tape = make_tape(tmp_path / "t", rows)
    limit = {"ttft": S}
    slos = [
        Slo("small", limit, model="small"),
        Slo("x", limit, tenant="x"),
        Slo("short", limit, prompt_until=100),
        Slo("long", limit, prompt_from=101),
        Slo("none", limit, model="other"),
    ]
    with connect([tape], slos=slos) as session:
        found = session.sql("SELECT slo, requests, attainment FROM goodput").fetchall()
    assert {name: rest for name, *rest in found} == {
        **{name: [1, 1.0] for name in ("small", "x", "short", "long")},
        "none": [0, None],
    }


def test_presets_are_limits_by_name_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    tape = make_tape(tmp_path / "t", [streamed_row(0)])
    with connect([tape], slos=[Slo("p", {"tpot": 1}, preset="llama3.1-8b-interactive")]) as session:
        query = "SELECT ttft_arrival_ns, tpot_ns FROM slos"
        assert session.sql(query).fetchall() == [(500 * MS, 1)]
    with pytest.raises(UsageError, match="no preset is named x; there are llama2-70b-server"):
        connect([tape], slos=[Slo("p", preset="x")])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_attainment_agrees_with_an_oracle_on_random_requests(tmp_path: Path, seed: int) -> None:
    rows = [r for r in random_rows(seed) if r.get("choice") is None]
    limits = {"ttft": 4 * MS, "tpot": 2 * MS, "e2e_arrival": 80 * MS}
    expected: dict[str, float] = defaultdict(float)
    for row in rows:
        expected[oracle(row, limits)] += weight_of(row)
    with connect([make_tape(tmp_path / "t", rows)], slos=[Slo("a", limits)]) as session:
        [got] = session.table("FROM goodput").to_pylist()
    names = ("met", "missed", "failed", "aborted", "cut", "unjudged")
    assert {v: got[v] for v in names} == {v: expected[v] for v in names}
    assert min(got["met"], got["missed"], got["failed"]) > 0


def oracle(row: Row, limits: dict[str, int]) -> str:
    if row["outcome"] != "ok":
        return {"client_abort": "aborted", "cut": "cut"}.get(row["outcome"], "failed")
    took = {metric: value for metric, value in of_request(row) if metric in limits}
    if not took:
        return "unjudged"
    return "met" if all(took[m] <= limits[m] for m in took) else "missed"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_stalls_agree_with_an_oracle_on_random_requests(tmp_path: Path, seed: int) -> None:
    rows = random_rows(seed)
    expected = []
    for row in rows:
        for stream in streams_of(row):
            gaps = [b - a for (a, _), (b, _) in pairwise(stream)]
            if gaps:
                median = sorted(gaps)[-(-len(gaps) // 2) - 1]
                expected += [(g, median) for g in gaps if g > 3000 and g > 1.5 * median]
    query = "SELECT gap_us, median_us FROM stalls_over(3000, 1.5)"
    with connect([make_tape(tmp_path / "t", rows)]) as session:
        assert sorted(session.sql(query).fetchall()) == sorted(expected)
    assert expected


def test_stalled_time_is_a_part_of_the_decode_time_of_good_replies(tmp_path: Path) -> None:
    at = [1000, 2000, 3000, 303_000, 304_000]
    rows = [
        streamed_row(0, 5, off_us=at, last_content_ns=305 * MS, end_ns=306 * MS),
        streamed_row(1, 5, off_us=at, outcome="cut"),
        streamed_row(2, 5),
    ]
    with connect([make_tape(tmp_path / "t", rows)]) as session:
        [found] = session.table("FROM stall_rates").to_pylist()
        [(begin, end)] = session.sql(
            "SELECT from_ns, until_ns FROM stalls WHERE outcome = 'ok'"
        ).fetchall()
    assert (begin, end) == (4 * MS, 304 * MS)
    assert (found["stalls"], found["requests"], found["longest_us"]) == (1, 1, 300_000)
    assert found["stalled_share"] == pytest.approx(300 / (303 + 4))


def test_slices_hold_what_arrived_in_them_and_empty_ones_are_zero(tmp_path: Path) -> None:
    rows = [
        streamed_row(0, 3),  # events at 2, 3, 4 ms, end at 5 ms
        streamed_row(25, 2, outcome="stream_error"),
    ]
    with connect([make_tape(tmp_path / "t", rows)]) as session:
        columns = "from_ns // 1000000, offered, ended, failed, events, output_tokens"
        query = f"SELECT {columns} FROM rates_over_time(3000000) ORDER BY 1"
        found = session.sql(query).fetchall()
        query = "SELECT from_ns // 1000000, mean FROM in_flight_over_time(3000000) ORDER BY 1"
        levels = dict(session.sql(query).fetchall())
    assert len(found) == len(levels) == 10
    assert found[0] == (0, 1, 0, 0, 1, 1)
    assert found[1] == (3, 0, 1, 0, 2, 2)
    assert found[2] == (6, 0, 0, 0, 0, 0)
    assert found[8] == (24, 1, 0, 0, 0, 0)
    assert found[9] == (27, 0, 1, 1, 2, 2)
    assert levels[0] == pytest.approx(2 / 3)  # sent at 1 ms
    assert levels[3] == pytest.approx(2 / 3)
    assert levels[6] == 0


def load(seconds: int, per_s: int, busy_s: float) -> list[Row]:
    """Requests at a constant rate, each in flight for busy_s."""
    rows = []
    for i in range(seconds * per_s):
        start = i * S // per_s
        end = start + int(busy_s * S)
        rows.append(
            streamed_row(0, 0, arrival_ns=start, send_ns=start, send_end_ns=start, end_ns=end)
        )
    return rows


def test_a_constant_load_is_steady_after_its_ramp(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    rows = load(60, 10, 2.0)
    for row in rows:
        row["end_ns"] += int(rng.integers(0, S // 10))
    with connect([make_tape(tmp_path / "t", rows)]) as session:
        [found] = session.table("FROM steady").to_pylist()
    assert found["steady"] and found["why"] is None
    assert 3.7 * S < found["from_ns"] < 4.3 * S  # 90 % of 20 after about 2 s, and one E2E
    assert found["until_ns"] == rows[-1]["arrival_ns"]
    assert found["in_flight"] == pytest.approx(20.5, abs=0.3)
    assert found["arrivals"] == sum(r["arrival_ns"] >= found["from_ns"] for r in rows)


def test_a_growing_backlog_is_not_steady(tmp_path: Path) -> None:
    rows = load(60, 10, 1.0)
    for i, row in enumerate(rows):
        row["end_ns"] += i * S // 100  # each waits a little longer
    with connect([make_tape(tmp_path / "t", rows)]) as session:
        [found] = session.table("FROM steady").to_pylist()
    assert not found["steady"] and found["drift"] > 0.1
    assert found["why"] == "the number in flight has a trend"


def test_the_interval_of_a_share_holds_it_and_never_claims_certainty() -> None:
    at_ns = np.arange(1000, dtype=np.int64) * S
    none = share(np.ones(1000), at_ns)
    assert none.value == none.hi == 1.0
    assert none.lo == pytest.approx(1 - 3.84 / 1000, abs=1e-4)
    half = share((np.arange(1000) % 2).astype(np.float64), at_ns)
    assert half.lo is not None and half.hi is not None
    assert 0.4 < half.lo < 0.5 < half.hi < 0.6
    assert share(np.ones(5), np.zeros(5, dtype=np.int64)).lo is None  # one block
    assert share(np.ones(0), np.zeros(0, dtype=np.int64)).value is None


def test_goodput_comes_with_the_interval_of_its_attainment(tmp_path: Path) -> None:
    rows = [
        streamed_row(0, 2, arrival_ns=i * S, first_content_ns=i * S + (i % 4) * MS)
        for i in range(400)
    ]
    with connect([make_tape(tmp_path / "t", rows)], slos=[Slo("a", {"ttft_arrival": MS})]) as s:
        [row] = slo.goodput(s)
    assert row["attainment"] == 0.5
    assert 0.4 < row["lo"] < 0.5 < row["hi"] < 0.6


def test_objectives_are_read_with_their_units() -> None:
    [found, preset] = read_slos(
        ["ttft=500ms,tpot=50us,prompt=..4096,model=m", "name=x,preset=p,prompt=10..20"]
    )
    assert found.limits_ns == {"ttft": 500 * MS, "tpot": 50_000}
    assert (found.model, found.prompt_from, found.prompt_until) == ("m", None, 4096)
    assert (preset.name, preset.preset, preset.prompt_from, preset.prompt_until) == (
        "x",
        "p",
        10,
        20,
    )


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [
        (["ttft=500"], "--slo ttft 500: need a duration"),
        (["ttf=500ms"], "--slo ttf: no such limit; there are ttft"),
        (["model=m"], "--slo model=m: need limits"),
        (["prompt=4096,ttft=1s"], "prompt=4096: need token counts"),
        (["ttft=1s", "ttft=1s"], "is given twice"),
        (["ttft"], "--slo: an argument is not NAME=VALUE"),
    ],
)
def test_an_objective_that_cannot_be_read_is_refused(texts: list[str], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        read_slos(texts)
