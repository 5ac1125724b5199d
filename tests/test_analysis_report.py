"""The report: what it shows, what it does not show, and its plain data."""

import json
from pathlib import Path
from typing import Any

import pytest

from rows import MS, make_tape, streamed_row
from tokentape.analysis.report import Report, report
from tokentape.analysis.session import connect
from tokentape.analysis.slo import Slo

VERDICT = {"level": "suspect", "reasons": ["suspect: schedule lag p99 3.0 ms"]}


def rows(n: int, **columns: Any) -> list[dict[str, Any]]:
    return [streamed_row(i * 10, 4, model="tiny", **columns) for i in range(n)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    failed = streamed_row(1200, 0, outcome="http_error", http_status=503, send_ns=1201 * MS)
    clocks = [
        streamed_row(1210, 4, event_clock="kernel", lag_max_us=250, coalesced_reads=2),
        streamed_row(1220, 4, model="large"),
    ]
    make_tape(
        folder / "a.tape",
        [*rows(100), failed, *clocks],
        wall_epoch_unix_ns=1_700_000_000_000_000_000,
        losses={"w0": {"disk full": 3}},
    )
    late = {"scheduled_ns": 0, "late_cause": "predecessor", "last_content_ns": 900 * MS}
    make_tape(folder / "b.tape", rows(5, **late), role="replay", verdict=VERDICT)
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> Report:
    with connect([folder / "a.tape"]) as session:
        return report(session)


@pytest.fixture(scope="module")
def two(folder: Path) -> Report:
    with connect([folder / "a.tape", folder / "b.tape"]) as session:
        return report(session)


def line(found: Report, start: str) -> list[str]:
    """Words of the line that begins so."""
    [text] = [text for text in found.text().splitlines() if text.startswith(start)]
    return text.removeprefix(start).split()


def test_the_first_table_says_what_each_tape_is(one: Report) -> None:
    assert " ".join(line(one, "a.tape  tiny")) == (
        "+1 capture 2023-11-14 22:13:20Z 1.23 s 103 408 97.16 %"
    )


def test_what_a_tape_lost_is_said_at_once(one: Report) -> None:
    assert "! a.tape: 3 requests were seen and are lost" in one.text().splitlines()


def test_failures_are_counted_and_listed(one: Report) -> None:
    assert line(one, "outcomes") == ["ok", "http_error", "lost"]
    assert "! a.tape: 1 x http_error, status 503" in one.text().splitlines()


def test_latency_shows_quantiles_with_their_n_and_no_more_than_it_knows(one: Report) -> None:
    assert line(one, "TTFT from send") == [
        *("1.00", "ms") * 3, "too", "few", "1.00", "ms", "102", "requests",
    ]  # fmt: skip
    assert line(one, "ICL") == [*("1.00", "ms") * 3, "too", "few", "1.00", "ms", "306", "events"]


def test_metrics_without_a_value_are_named_instead_of_shown(one: Report) -> None:
    assert "no values: send after plan" in one.text().splitlines()
    assert (
        "no values: TTFA from send, TTFA from arrival, queue, prefill, decode"
        in one.text().splitlines()
    )


def test_stamps_name_their_clocks_and_what_spoils_them(one: Report) -> None:
    words = " ".join(line(one, "a.tape  callback"))
    assert words == "- callback 102, kernel 1 250 us 2 - -"


def test_two_tapes_are_shown_together_with_their_ratio(two: Report) -> None:
    text = two.text().splitlines()
    at = next(i for i, one in enumerate(text) if one.startswith("E2E to last content"))
    assert text[at].split()[4:6] == ["a.tape", "4.00"]
    assert text[at + 1].split()[:3] == ["b.tape", "879", "ms"]
    assert text[at + 2].split()[:4] == ["#2", "/", "#1", "220x"]


def test_a_replay_shows_its_lateness_its_causes_and_its_verdict(two: Report) -> None:
    text = two.text()
    assert "verdict of b.tape: suspect\n  suspect: schedule lag p99 3.0 ms" in text
    assert line(two, "b.tape         predecessor")[0] == "5"


def test_no_line_is_wider_than_asked_for(two: Report, folder: Path) -> None:
    assert max(map(len, two.text(100).splitlines())) <= 100
    name = "a-very-long-name-of-a-tape-that-nobody-would-give-but-somebody-will.tape"
    make_tape(folder / name, rows(3))
    with connect([folder / name]) as session:
        text = report(session).text(100)
    assert max(map(len, text.splitlines())) <= 100 and "…" in text


def test_an_empty_tape_is_reported_without_a_number(tmp_path: Path) -> None:
    with connect([make_tape(tmp_path / "empty", [])]) as session:
        text = report(session).text()
    assert "empty" in text and "no values: TTFT from send, TTFT from arrival" in text
    assert "nan" not in text and "inf" not in text.replace("in flight", "")


def test_plain_data_is_json_with_stable_keys(one: Report, two: Report) -> None:
    found = json.loads(json.dumps(two.as_dict(), allow_nan=False))
    keys = ["tapes", "metrics", "clocks", "quality", "errors", "late_causes"]
    assert list(found) == [
        *keys,
        "goodput",
        "steady",
        "stalls",
        "prefixes",
        "speculation",
        "phases",
        "interference",
        "calibration",
    ]
    assert [t["run"] for t in found["tapes"]] == ["a.tape", "b.tape"]
    assert found["tapes"][1]["facts"]["verdict"] == VERDICT
    named = [(r["metric"], r["stat"]) for r in one.as_dict()["metrics"]]
    assert [(r["metric"], r["stat"]) for r in found["metrics"] if r["run"] == "b.tape"] == named
    assert set(found["metrics"][0]) == {
        "run", "metric", "stat", "weight", "value", "unit", "n", "attempted", "coverage",
    }  # fmt: skip


def test_what_is_asked_apart_has_the_rows_of_metrics_long(folder: Path) -> None:
    slos = [Slo("a", {"ttft": MS}), Slo("b", {"e2e": 1})]
    for given in (slos, []):
        with connect([folder / "a.tape", folder / "b.tape"], slos=given) as session:
            found = report(session).metrics
            long = session.table("FROM metrics_long").to_pylist()

        def ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return sorted(rows, key=lambda r: (r["run"], r["metric"], r["stat"]))

        assert ordered(found) == ordered(long)
