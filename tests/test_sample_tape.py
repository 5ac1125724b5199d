"""The sample tapes of a real vLLM say what its own counters said (docs/first-contact.md)."""

import json
import subprocess
import sys

import pytest

import tokentape
from tokentape.jobs.demo import sample_tapes
from tokentape.traces.check import check
from tokentape.traces.reader import open_tape

CAPTURE, RUN = sample_tapes()
# vLLM's counters over the capture, last scrape minus first.
ENGINE = {"requests": 467, "prompt": 2_659_011, "generation": 132_640, "prefix hits": 227_776}


def test_both_tapes_are_sound_and_lost_nothing() -> None:
    for path, rows in ((CAPTURE, 626), (RUN, 467)):
        tape = open_tape(path)
        assert check(tape) == []
        assert (tape.rows, tape.losses) == (rows, {})


def test_the_capture_equals_the_engines_counters() -> None:
    counted = (
        tokentape.open(CAPTURE)
        .sql(
            "select count(*), sum(input_tokens), sum(output_tokens), sum(cached_tokens)"
            " from requests where http_status = 200 and operation = 'text_completion'"
        )
        .fetchall()
    )
    assert counted == [tuple(ENGINE.values())]


def test_every_streamed_row_has_as_many_event_tokens_as_usage_said() -> None:
    for path in (CAPTURE, RUN):
        rows = open_tape(path).read(["stream", "outcome", "ntok", "output_tokens"]).to_pylist()
        streamed = [r for r in rows if r["stream"] and r["outcome"] == "ok"]
        assert len(streamed) == 467
        assert all(sum(r["ntok"]) == r["output_tokens"] for r in streamed)


def test_the_replay_asked_for_the_same_tokens_as_the_capture() -> None:
    columns = ["request_id", "source_request_id", "input_tokens", "output_tokens"]
    sources = {r["request_id"]: r for r in open_tape(CAPTURE).read(columns).to_pylist()}
    for row in open_tape(RUN).read(columns).to_pylist():
        source = sources[row["source_request_id"]]
        assert row["input_tokens"] == source["input_tokens"]
        assert row["output_tokens"] == source["output_tokens"]


def test_the_replay_reproduces_the_captured_latency() -> None:
    medians = [
        tokentape.open(path).sql("select median(tpot_ns) from tpot").fetchall()[0][0]
        for path in (CAPTURE, RUN)
    ]
    assert medians[1] == pytest.approx(medians[0], rel=0.01)


def test_demo_sample_reports_on_both() -> None:
    command = [sys.executable, "-m", "tokentape", "demo", "--sample", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [t["run"] for t in json.loads(done.stdout)["tapes"]] == ["capture.tape", "run.tape"]
