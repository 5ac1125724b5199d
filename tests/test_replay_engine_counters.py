"""The /metrics page has vLLM's names, labels and buckets, and adds up."""

import gzip
import json
import re
from pathlib import Path

import pytest

from tokentape.replay.engine.batching import Batch, Sequence
from tokentape.replay.engine.counters import Counters, Histogram
from tokentape.replay.engine.profile import Profile

RECORDED = Path(__file__).parent / ".." / ".." / "shared" / "data" / "vllm-h100"
SAMPLE = re.compile(
    r'^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-z_]+="(?:[^"\\]|\\.)*",?)*)\})? (\S+)$'
)


def samples(page: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of a page by name and labels; fails on a line that is none."""
    found = {}
    for line in page.splitlines():
        if line.startswith("#"):
            continue
        match = SAMPLE.match(line)
        assert match is not None, line
        labels = frozenset(re.findall(r'([a-z_]+)="((?:[^"\\]|\\.)*)"', match[2] or ""))
        found[match[1], labels] = float(match[3])
    return found


def test_each_vllm_series_of_the_page_is_one_that_a_real_vllm_serves() -> None:
    path = RECORDED / "low.metrics.jsonl.gz"
    if not path.exists():
        pytest.skip("no recordings of a real vLLM beside this checkout")
    with gzip.open(path, "rt") as lines:
        *_, last = map(json.loads, lines)
    theirs = {series for series in samples(last[2]) if series[0].startswith("vllm:")}
    profile = Profile(model="m")
    page = Counters().page(Batch(profile), profile)
    ours = {series for series in samples(page) if series[0].startswith("vllm:")}
    config = {series for series in ours if series[0] == "vllm:cache_config_info"}
    assert ours - config <= theirs
    assert {name for name, _ in config} <= {name for name, _ in theirs}
    for name in {name for name, _ in ours if name.endswith("_bucket")}:
        assert {s for s in ours if s[0] == name} == {s for s in theirs if s[0] == name}


def test_a_model_name_cannot_break_the_page() -> None:
    profile = Profile(model='a"b\\c\nd')
    page = Counters().page(Batch(profile), profile)
    assert ("model_name", r"a\"b\\c\nd") in {
        label for _, labels in samples(page) for label in labels
    }


def test_buckets_are_cumulative_and_hold_their_upper_bound() -> None:
    histogram = Histogram((1, 2.5))
    for value in (0.5, 1.0, 1.1, 2.5, 9.0):
        histogram.add(value)
    histogram.add(2.0, 3)
    assert histogram.lines("x", "") == [
        'x_bucket{le="1.0"} 2.0',
        'x_bucket{le="2.5"} 7.0',
        'x_bucket{le="+Inf"} 8.0',
        "x_count 8.0",
        "x_sum 20.1",
    ]


def test_steps_and_requests_are_counted_with_their_simulated_times() -> None:
    profile = Profile(step_ms=100.0, step_ms_per_sequence=0.0, step_ns_per_kv_token=0.0,
                      prefill_tokens_per_s=1e12, step_jitter=0.0)  # fmt: skip
    batch, counters = Batch(profile), Counters()
    sequence = Sequence(list(range(30)), 20, arrived_ns=0)
    batch.arrive(sequence, 50_000_000)
    now_ns = 50_000_000
    while not sequence.finished:
        step = batch.begin(now_ns)
        assert step is not None
        counters.count_step(step, batch.end(), late_ns=2_000_000)
        now_ns = step.end_ns
    counters.count_finished(sequence, "length")
    found = {name: value for (name, labels), value in samples(counters.page(batch, profile)).items()
             if not any(key in ("le", "finished_reason") for key, _ in labels)}  # fmt: skip
    assert found["vllm:prompt_tokens_total"] == 20
    assert found["vllm:generation_tokens_total"] == 10
    assert found["vllm:time_to_first_token_seconds_sum"] == pytest.approx(0.15)
    assert found["vllm:inter_token_latency_seconds_count"] == 9
    assert found["vllm:inter_token_latency_seconds_sum"] == pytest.approx(0.9)
    assert found["vllm:e2e_request_latency_seconds_sum"] == pytest.approx(1.05)
    assert found["vllm:request_queue_time_seconds_sum"] == 0
    assert found["vllm:request_prefill_time_seconds_sum"] == pytest.approx(0.1)
    assert found["vllm:request_decode_time_seconds_sum"] == pytest.approx(0.9)
    assert found["vllm:iteration_tokens_total_sum"] == 29
    assert found["tokentape_engine_step_lateness_seconds_sum"] == pytest.approx(0.02)
