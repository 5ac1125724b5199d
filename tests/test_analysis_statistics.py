"""Quantiles and their intervals: against numpy, and by how often they hold the truth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokentape.analysis import statistics as stats

RUNS, REQUESTS, LOAD = 150, 3000, 0.7
LEAST_COVERAGE = 0.85  # nominal 95 %
SEED = 7


def queue_times(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(arrival ns, waiting and service ns) of a queue with one server at 70 % load, by Lindley."""
    arrival = np.cumsum(rng.exponential(0.125, n))  # 8 requests/s, as in the measured reference
    service = rng.exponential(0.125 * LOAD, n)
    total = np.empty(n)
    wait = 0.0
    for i in range(n):
        total[i] = wait + service[i]
        gap = arrival[i + 1] - arrival[i] if i + 1 < n else 0.0
        wait = max(0.0, total[i] - gap)
    return (arrival * 1e9).astype(np.int64), total * 1e9


@pytest.mark.parametrize("runs", [50, pytest.param(RUNS, marks=pytest.mark.slow)])
def test_intervals_hold_the_truth_at_70_percent_load(runs: int) -> None:
    rng = np.random.default_rng(SEED)
    # M/M/1: the time in the system is exponential, with the rate of service less that of arrival
    truth = {p: -np.log(1 - p) / (8 / LOAD - 8) * 1e9 for p in (0.5, 0.9)}
    held = dict.fromkeys(truth, 0)
    for _ in range(runs):
        at_ns, values = queue_times(rng, REQUESTS)
        for p, true in truth.items():
            found = stats.estimate(values, at_ns, p)
            assert found.lo is not None and found.hi is not None
            held[p] += found.lo <= true <= found.hi
    coverage = {p: n / runs for p, n in held.items()}
    assert min(coverage.values()) >= LEAST_COVERAGE, coverage


def test_samples_that_hang_together_count_for_fewer() -> None:
    rng = np.random.default_rng(SEED)
    at_ns, queued = queue_times(rng, REQUESTS)
    found = stats.estimate(queued, at_ns, 0.5)
    alone = stats.estimate(rng.permutation(queued), at_ns, 0.5)
    assert found.n_eff is not None and alone.n_eff is not None
    assert 2 * found.n_eff < alone.n_eff


@given(
    st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=60),
    st.sampled_from([0.5, 0.9, 0.99]),
)
def test_a_quantile_is_the_one_of_numpy(values: list[float], p: float) -> None:
    wanted = np.quantile(values, p, method="inverted_cdf")
    assert stats.quantile(np.array(values), p) == wanted


def test_replicates_surround_the_value_and_are_values_that_were_seen() -> None:
    rng = np.random.default_rng(SEED)
    values = rng.exponential(1.0, 5000)
    blocks = np.arange(5000) // 100
    [got] = stats.bootstrap_quantiles(values, blocks, stats.resamples(50), [0.99])
    assert set(got) <= set(values)
    exact = [  # the same draws, sample by sample
        stats.quantile(np.repeat(values, draw[blocks].astype(int)), 0.99)
        for draw in stats.resamples(50)[:20]
    ]
    assert got[:20] == pytest.approx(exact, rel=0.02)


def test_too_few_samples_or_moments_give_no_number() -> None:
    at_ns = np.arange(99) * 10**9
    assert stats.estimate(np.arange(99.0), at_ns, 0.99) == stats.Estimate(
        None, None, None, 99, None
    )
    few = stats.estimate(np.arange(200.0), np.arange(200) * 10**9, 0.99)
    assert few.value == 197 and few.hi is None  # p99 has no upper end below 368 samples
    moment = stats.estimate(np.arange(200.0), np.zeros(200, np.int64), 0.5)
    assert (moment.value, moment.lo, moment.hi) == (99, None, None)
    assert [stats.least_for_interval(p) for p in (0.5, 0.9, 0.99, 0.999)] == [6, 36, 368, 3688]


def test_blocks_are_half_a_minute_and_more_on_long_spans() -> None:
    for span_s, wanted in ((60, 12), (600, 20), (86_400, 200)):
        at_ns = np.linspace(0, span_s * 10**9 - 1, 5000).astype(np.int64)
        blocks, n = stats.blocks_of(at_ns)
        assert n == wanted and set(blocks.tolist()) == set(range(n))
