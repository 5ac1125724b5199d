"""What a tape holds: figures against slow and plain counts, facts of the real traces."""

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import mean, pvariance
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rows import make_tape, streamed_row
from tokentape.traces.arrivals import arrivals_of
from tokentape.traces.importers import import_trace
from tokentape.traces.reader import open_tape
from tokentape.traces.summary import BlockIds, Summary, summarize

DATA = Path(__file__).parents[2] / "shared/data"
S = 10**9


def summary(folder: Path, *rows: dict[str, Any]) -> Summary:
    made = [streamed_row(n, **row) for n, row in enumerate(rows)]
    return summarize(open_tape(make_tape(folder / "t.tape", made)))


def of_trace(form: str, path: Path, tape: Path) -> Summary:
    if not path.exists():
        pytest.skip(f"{path.name} is not beside this checkout")
    return summarize(open_tape(import_trace(form, [path], tape).tape))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 60 * S), min_size=2, max_size=60))
def test_arrivals_agree_with_plain_counting(times: list[int]) -> None:
    found = arrivals_of(np.array(times, dtype=np.int64))
    ordered = sorted(times)
    gaps = [b - a for a, b in pairwise(ordered)]
    assert found.instants == len(set(times))
    assert found.most_per_s == max(sum(t <= u < t + S for u in ordered) for t in ordered)
    if ordered[0] == ordered[-1]:
        assert (found.per_s, found.cv) == (None, None)
        return
    assert found.per_s == pytest.approx(len(gaps) * S / (ordered[-1] - ordered[0]))
    assert found.cv == pytest.approx(math.sqrt(pvariance(gaps)) / mean(gaps))
    assert found.longest_gap_ns == max(gaps)
    assert found.step_ns == math.gcd(*gaps)
    windows = (ordered[-1] - ordered[0]) // S
    if windows >= 2:
        each = Counter((t - ordered[0]) // S for t in ordered)
        counts = [each[w] for w in range(windows)]
        assert found.dispersion == pytest.approx(pvariance(counts) / mean(counts))


def test_poisson_arrivals_have_cv_and_dispersion_of_one() -> None:
    """100,000 gaps of seed 1: the standard errors are 0.3 % and 1.4 %; five of them are allowed."""
    times = np.cumsum(np.random.default_rng(1).exponential(S / 10, 100_000)).astype(np.int64)
    found = arrivals_of(times)
    assert found.cv == pytest.approx(1, abs=5 * 0.0032)
    assert found.dispersion == pytest.approx(1, abs=5 * 0.0142)
    assert found.quantised is False


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=50), max_size=6))
def test_few_block_ids_are_counted_exactly(parts: list[list[int]]) -> None:
    ids = BlockIds(most=1_000)
    for part in parts:
        ids.add(np.array(part, dtype=np.int64))
    every = [one for part in parts for one in part]
    found = ids.prefixes(0, {})
    assert (found.blocks, found.followed) == (len(every), 1)
    expected = 1 - len(set(every)) / len(every) if every else None
    assert found.ideal_reuse == pytest.approx(expected) if every else found.ideal_reuse is None


def test_many_block_ids_are_estimated_in_bounded_memory_and_it_says_so() -> None:
    """400,000 ids, each twice but a tenth; about 1,500 are followed: within 5 standard errors."""
    ids = BlockIds(most=2_000)
    for _ in range(2):
        for part in np.array_split(np.arange(200_000, dtype=np.int64), 40):
            ids.add(part)
    ids.add(np.arange(200_000, 240_000, dtype=np.int64))
    found = ids.prefixes(0, {})
    assert found.blocks == 440_000
    assert found.followed <= 1 / 64
    assert found.ideal_reuse == pytest.approx(200_000 / 440_000, abs=5 * 0.012)


def test_lengths_sessions_and_words_are_counted(tmp_path: Path) -> None:
    rows = [
        {"input_tokens": n, "session_id": f"s{n % 2}" if n else None, "model": "m"}
        for n in range(5)
    ]
    rows[4]["outcome"] = "http_error"
    rows[3]["output_tokens"] = None
    found = summary(tmp_path, *rows)
    assert (found.requests, found.streamed, found.events) == (5, 5, 15)
    assert found.input_tokens.quantiles == {"p50": 2, "p90": 4, "p99": 4}
    assert (found.output_tokens.known, found.output_tokens.total) == (4, 12)
    assert (found.sessions.sessions, found.sessions.requests) == (2, 4)
    assert found.sessions.turns == {"p50": 2, "p90": 2, "p99": 2}
    assert found.words["outcome"] == {"ok": 4, "http_error": 1}
    assert "prefixes: a replay shares none" in found.lacks
    assert not any(lack.startswith("output lengths") for lack in found.lacks)


def test_an_empty_tape_lacks_everything(tmp_path: Path) -> None:
    found = summary(tmp_path)
    assert (found.requests, found.arrivals.per_s, found.input_tokens.quantiles) == (0, None, None)
    assert len(found.lacks) > 8


def test_ids_of_a_session_are_not_those_of_another(tmp_path: Path) -> None:
    blocks = {"block_hashes": [1, 2], "block_tokens": 5, "block_unit": "token"}
    names = ("a", "a", "b")
    rows = [blocks | {"block_scope": "session", "session_id": name} for name in names]
    assert summary(tmp_path, *rows).prefixes.ideal_reuse == pytest.approx(2 / 6)


def test_mooncake_s_known_facts(tmp_path: Path) -> None:
    found = of_trace("mooncake", DATA / "mooncake/conversation_trace.jsonl", tmp_path / "m.tape")
    assert (found.requests, found.arrivals.instants) == (12_031, 1_180)
    assert found.arrivals.quantised is True
    assert found.arrivals.usual_gap_ns == 3 * S
    assert found.prefixes.ideal_reuse == pytest.approx(0.366, abs=0.0005)
    assert found.prefixes.block_sizes == {"512 token": 12_031}
    assert found.input_tokens.quantiles is not None
    assert (found.input_tokens.quantiles["p50"], found.input_tokens.most) == (6_909, 126_195)
    assert found.output_tokens.least == 1


def test_azure_s_known_facts(tmp_path: Path) -> None:
    path = DATA / "azure/AzureLLMInferenceTrace_code.csv"
    found = of_trace("azure", path, tmp_path / "a.tape")
    assert (found.requests, found.arrivals.quantised) == (8_819, False)
    assert found.arrivals.last_ns is not None
    assert 56 < found.arrivals.last_ns / (60 * S) < 58


def test_weka_s_known_facts(tmp_path: Path) -> None:
    found = of_trace("weka", DATA / "weka-agentic", tmp_path / "w.tape")
    assert (found.requests, found.sessions.sessions) == (307, 12 + 3)
    assert found.sessions.waiting > 250
    assert found.prefixes.ideal_reuse is not None
    assert found.prefixes.ideal_reuse > 0.9
