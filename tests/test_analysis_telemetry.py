"""Telemetry in SQL: counters over a run, load over time, phases beside a server's own sums."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelined_engine import Load, simulate
from rows import MS, make_tape, streamed_row
from tokentape.analysis import report
from tokentape.analysis.session import connect
from tokentape.traces import pages
from tokentape.traces.schema import TELEMETRY

RECORDED = Path(__file__).parent / ".." / ".." / "shared" / "data" / "vllm-h100"
URL = "http://e/metrics"
S = 1000 * MS


def add_samples(tape: Path, samples: list[tuple[int, str, str, float]]) -> Path:
    rows = [
        {"ts_ns": t, "end_ns": t, "source": URL, "name": n, "labels": labels, "value": v}
        for t, n, labels, v in samples
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=TELEMETRY), tape / "telemetry" / "m.parquet")
    return tape


def test_a_counter_that_begins_anew_keeps_what_it_had_counted(tmp_path: Path) -> None:
    values = [(0, 5.0), (1, 8.0), (2, 2.0), (3, 3.0)]  # 3 more, a restart, 2 and 1
    tape = add_samples(
        make_tape(tmp_path / "t", [streamed_row()]),
        [(t * S, "asked_total", "{}", v) for t, v in values],
    )
    with connect([tape]) as session:
        [found] = session.table("FROM counters").to_pylist()
    assert (found["samples"], found["increase"], found["increase_per_s"]) == (4, 6.0, 2.0)


def test_load_over_time_adds_up_the_engines_of_a_page(tmp_path: Path) -> None:
    samples = [
        (t * S, f"vllm:{name}", json.dumps({"engine": str(e)}), value * (t + 1))
        for t in range(2)
        for e in range(2)
        for name, value in (
            ("num_requests_running", 3.0),
            ("num_requests_waiting", float(e)),
            ("kv_cache_usage_perc", 0.2),
        )
    ]
    tape = add_samples(make_tape(tmp_path / "t", [streamed_row()]), samples)
    with connect([tape]) as session:
        found = session.sql("SELECT running, waiting, kv_used FROM servers_load ORDER BY ts_ns")
        assert found.fetchall() == [(6.0, 1.0, 0.2), (12.0, 2.0, 0.4)]


def test_acceptance_of_drafts_is_of_the_run_and_adds_up_engines(tmp_path: Path) -> None:
    names = ("drafts", "draft_tokens", "accepted_tokens", "accepted_tokens_per_pos")
    ends = ((100.0, 400.0, 300.0, 9.0), (110.0, 440.0, 310.0, 99.0))
    samples = [
        (t * S, f"vllm:spec_decode_num_{name}_total", json.dumps({"engine": engine}), value)
        for t, values in enumerate(ends)
        for engine in ("0", "1")
        for name, value in zip(names, values, strict=True)
    ]
    tape = add_samples(make_tape(tmp_path / "t", [streamed_row()]), samples)
    with connect([tape]) as session:
        [found] = session.table("FROM speculation").to_pylist()
        shown = report.report(session)
    told = (found["drafts"], found["draft_tokens"], found["accepted_tokens"])
    assert told == (20, 80, 20)
    assert (found["acceptance"], found["tokens_per_draft"]) == (0.25, 2.0)
    assert shown.as_dict()["speculation"] == [found]
    [line] = [x for x in shown.text().splitlines() if URL in x]
    assert line.split() == ["t", URL, "20", "80", "25.00", "%", "2.00"]


@pytest.mark.slow
def test_the_report_puts_estimated_phases_beside_the_servers_histograms(tmp_path: Path) -> None:
    run = simulate(Load(4, 30))
    truth = {"queue": sum(run.queue_ns) / 1e9, "prefill": sum(run.prefill_ns) / 1e9}
    samples = [
        (t, f"vllm:request_{phase}_time_seconds_{part}", "{}", value)
        for t in (0, 60 * S)
        for phase, total in truth.items()
        for part, value in (("sum", 1 + total * (t > 0)), ("count", 7 + len(run.rows) * (t > 0)))
    ]
    tape = add_samples(make_tape(tmp_path / "t", run.rows), samples)
    with connect([tape]) as session:
        found = report.report(session, phases=True)
    rows = {row["phase"]: row for row in found.calibration or []}
    assert rows.keys() == truth.keys()
    assert rows["prefill"]["server_s"] == pytest.approx(truth["prefill"])
    assert rows["prefill"]["server_requests"] == rows["prefill"]["requests"] == len(run.rows)
    assert rows["prefill"]["tape_over_server"] == pytest.approx(1, abs=0.15)
    [line] = [x for x in found.text().splitlines() if " prefill " in x and "stream" in x]
    assert str(len(run.rows)) in line


def test_histogram_sums_of_a_real_vllm_are_the_difference_of_its_pages(tmp_path: Path) -> None:
    path = RECORDED / "low.metrics.jsonl.gz"
    if not path.exists():
        pytest.skip("no recordings of a real vLLM beside this checkout")
    with gzip.open(path, "rt") as lines:
        scrapes = [json.loads(line) for line in lines]
    ends = [(ns, pages.parse(text)) for ns, _, text in (scrapes[0], scrapes[-1])]
    tape = add_samples(
        make_tape(tmp_path / "t", [streamed_row()]),
        [(ns, name, labels, value) for ns, page in ends for name, labels, value in page],
    )
    with connect([tape]) as session:
        rows = session.table("FROM counters_histograms").to_pylist()
    found = {row["name"]: row for row in rows}
    assert found["vllm:request_queue_time_seconds"]["observations"] == 166
    assert found["vllm:request_generation_tokens"]["total"] == 27_435
    assert found["vllm:request_prompt_tokens"]["total"] == 163_888
