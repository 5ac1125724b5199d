"""Described loads: their means and bursts, the same rows everywhere, and turns that grow."""

import hashlib
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokentape.replay.options import ReplayOptions
from tokentape.replay.plan import make_plan
from tokentape.traces.arrivals import arrivals_of
from tokentape.traces.check import check
from tokentape.traces.errors import TapeError, UsageError
from tokentape.traces.reader import open_tape
from tokentape.traces.synthetic import (
    Described,
    Empirical,
    Lengths,
    Part,
    Prefixes,
    Turns,
    generate,
)
from tokentape.traces.synthetic.draw import batches, part_starts_ns, random_of

SECOND = 1_000_000_000


def part(process: Any, rate: float, to: float, seconds: float, cv: float = 1.0) -> Part:
    return Part(process, Fraction(rate), Fraction(to), round(seconds * SECOND), cv)


def starts(one: Part, seed: int = 0, size: int = 1000) -> Any:
    return np.concatenate(list(part_starts_ns(one, random_of("a", seed), size)))


def rows(described: Described, path: Path, sessions_at_once: int = 500) -> pa.Table:
    generate(described, path, force=True, sessions_at_once=sessions_at_once)
    return open_tape(path).read()


rates = st.integers(1, 400)


@settings(max_examples=25, deadline=None)
@given(rates, rates, st.sampled_from(["poisson", "gamma"]), st.floats(0.3, 3), st.integers(0, 99))
def test_as_many_arrive_as_the_rates_say_in_each_half_of_a_ramp(
    first: int, last: int, process: str, cv: float, seed: int
) -> None:
    one = part(process, first, last, 100, cv if process == "gamma" else 1.0)
    times = starts(one, seed)
    assert (np.diff(times) >= 0).all()
    assert times[0] >= 0 and times[-1] < one.lasting_ns
    half = np.searchsorted(times, one.lasting_ns // 2)
    mean = (first + last) / 2
    expected = [50 * (first + mean) / 2, 50 * (mean + last) / 2]
    for found, wanted in zip((half, len(times) - half), expected, strict=True):
        assert abs(found - wanted) < 6 * one.cv * wanted**0.5 + 2 * one.cv**2 + 2


@pytest.mark.parametrize("cv", [0.3, 1.0, 2.0, 3.0])
def test_gaps_have_the_cv_that_was_asked_for(cv: float) -> None:
    found = arrivals_of(starts(part("gamma", 200, 200, 200, cv)))
    assert found.cv == pytest.approx(cv, rel=0.06)
    assert found.per_s == pytest.approx(200, rel=0.06)


def test_a_poisson_process_has_cv_and_dispersion_1_and_a_constant_one_0() -> None:
    found = arrivals_of(starts(part("poisson", 100, 100, 400)))
    assert found.cv == pytest.approx(1, rel=0.03)
    assert found.dispersion == pytest.approx(1, rel=0.3)  # 400 windows: 3 x 0.07
    even = starts(part("constant", 10, 10, 3))
    assert even.tolist() == [k * SECOND // 10 for k in range(30)]


@settings(max_examples=20, deadline=None)
@given(st.floats(20, 5000), st.floats(0, 1.5), st.integers(0, 99))
def test_lengths_have_the_mean_and_the_spread_that_were_asked_for(
    mean: float, cv: float, seed: int
) -> None:
    load = Described((part("constant", 1000, 1000, 20),), Lengths(mean, cv), Lengths(5), seed=seed)
    tokens = np.concatenate([b.columns["input_tokens"].to_numpy() for b in batches(load)])
    assert len(tokens) == 20_000
    assert abs(tokens.mean() - mean) < 6 * mean * cv / 20_000**0.5 + 0.6
    assert tokens.std() == pytest.approx(mean * cv, rel=0.25, abs=0.6)


TALK = Described(
    (part("poisson", 5, 20, 20), part("gamma", 20, 20, 10, 2.0)),
    Lengths(300, 1.0, most=4000),
    Lengths(80, 0.7),
    Prefixes(3, 1000, Fraction(1, 2)),
    Turns(2.5, 9),
    context_tokens=6000,
    chat=Fraction(1, 4),
    seed=4,
)


def test_a_description_and_a_seed_make_the_same_rows_however_they_are_drawn(tmp_path: Path) -> None:
    one, two = rows(TALK, tmp_path / "a", 100), rows(TALK, tmp_path / "b", 8000)
    assert one.equals(two)
    names = ("scheduled_ns", "input_tokens", "output_tokens", "think_ns", "block_hashes")
    columns = {name: one[name].to_pylist() for name in names}
    digest = hashlib.sha256(json.dumps(columns).encode()).hexdigest()
    assert one.num_rows == 1176
    assert digest == "1d9fd5de844bc5c696b5c48954be3ae0d37e4f649b5bea3b7858a084302920ce"
    other = rows(Described(**{**vars_of(TALK), "seed": 5}), tmp_path / "c")
    assert not one["scheduled_ns"].equals(other["scheduled_ns"])


def vars_of(described: Described) -> dict[str, Any]:
    return {name: getattr(described, name) for name in Described.__dataclass_fields__}


def test_a_described_tape_is_sound_in_order_and_says_that_nobody_recorded_it(
    tmp_path: Path,
) -> None:
    done = generate(TALK, tmp_path / "t")
    tape = open_tape(tmp_path / "t")
    assert not list(check(tape))
    assert tape.role == "simulation" and "none was recorded" in tape.facts["source"]["drawn"]
    table = tape.read()
    assert (np.diff(table["arrival_ns"].to_numpy()) >= 0).all()
    assert table["outcome"].null_count == table["end_ns"].null_count == table.num_rows
    assert done.requests == table.num_rows
    kinds = {r["session_id"]: r["operation"] for r in table.to_pylist()}
    assert all(kinds[r["session_id"]] == r["operation"] for r in table.to_pylist())
    chats = sum(kind == "chat" for kind in kinds.values())
    assert abs(chats - len(kinds) / 4) < 6 * (len(kinds) * 3 / 16) ** 0.5
    assert done.sessions == len(set(table["session_id"].to_pylist()))
    assert done.input_tokens == sum(table["input_tokens"].to_pylist())


def test_a_turn_holds_all_that_was_said_before_and_waits_for_reply_and_thought(
    tmp_path: Path,
) -> None:
    table = rows(TALK, tmp_path / "t").to_pylist()
    by_id = {row["request_id"]: row for row in table}
    later = [row for row in table if row["turn_index"]]
    assert len(later) > 300
    for row in later:
        (parent,) = (by_id[name] for name in row["parents"])
        assert parent["session_id"] == row["session_id"]
        assert parent["turn_index"] == row["turn_index"] - 1
        replied = SECOND // 2 + SECOND // 50 * parent["output_tokens"]
        assert row["arrival_ns"] == parent["arrival_ns"] + replied + row["think_ns"]
        assert row["input_tokens"] > parent["input_tokens"] + parent["output_tokens"]
        known = parent["block_hashes"]
        assert row["block_hashes"][: len(known)] == known
    for row in table:
        assert len(row["block_hashes"]) == row["input_tokens"] // 128
        assert row["prefix_partial"] == row["input_tokens"] % 128
        assert row["input_tokens"] + row["output_tokens"] <= 6000
    firsts = [row["block_hashes"] for row in table if not row["turn_index"]]
    long = [h[:7] for h in firsts if len(h) >= 7]
    common = {tuple(h) for h in long if long.count(h) > 1}
    assert len(common) == 3  # 1000 tokens: seven whole blocks
    eighth = [h[7] for h in firsts if len(h) > 7]
    assert len(set(eighth)) == len(eighth)
    begun = sum(tuple(h[:7]) in common for h in firsts)
    assert abs(begun - len(firsts) / 2) < 6 * (len(firsts) / 4) ** 0.5


def test_turns_have_the_mean_that_was_asked_for_and_the_last_is_cut_off() -> None:
    load = Described(
        (part("constant", 1000, 1000, 10),), Lengths(1), Lengths(1), turns=Turns(4, 30)
    )
    turns = np.concatenate([b.columns["turn_index"].to_numpy() for b in batches(load)])
    assert len(turns) / np.count_nonzero(turns == 0) == pytest.approx(4, rel=0.06)
    assert turns.max() == 29


def test_lengths_of_another_tape_are_drawn_in_pairs_as_often_as_they_are_there(
    tmp_path: Path,
) -> None:
    source = Described((part("poisson", 20, 20, 20),), Lengths(500, 1.0), Lengths(50, 1.0))
    generate(source, tmp_path / "source")
    like = Empirical(tmp_path / "source")
    load = Described((part("constant", 500, 500, 20),), like, like)
    pairs = rows(load, tmp_path / "t").select(["input_tokens", "output_tokens"]).to_pylist()
    known = {tuple(p) for p in like.pairs.tolist()}
    assert {tuple(p.values()) for p in pairs} <= known
    assert len({tuple(p.values()) for p in pairs}) > 0.99 * len(known)
    mean = np.mean([p["input_tokens"] for p in pairs])
    assert mean == pytest.approx(like.pairs[:, 0].mean(), rel=0.06)


def test_a_described_tape_replays_with_the_same_bodies_wherever_it_was_made(tmp_path: Path) -> None:
    bodies = []
    for name in ("a", "b"):
        generate(TALK, tmp_path / name)
        options = ReplayOptions(
            source=tmp_path / name, to="http://127.0.0.1:1", model="m", namespace="both"
        )
        plan = make_plan(options, offline=True)
        bodies.append([plan.outgoing(n).body for n in range(20)])
        assert plan.figures["requests"] == len(plan.source)
        assert plan.figures["prefix_blocks_repeated"] > 0
    assert bodies[0] == bodies[1]


def test_what_cannot_be_meant_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing would arrive"):
        part("poisson", 0, 0, 10)
    with pytest.raises(UsageError, match=r"cv 90: give one from 0\.05 to 20"):
        part("gamma", 1, 1, 10, 90)
    with pytest.raises(UsageError, match=r"about 1,000,000,000 requests are more than"):
        Described((part("poisson", 10**6, 10**6, 1000),), Lengths(1), Lengths(1))
    with pytest.raises(TapeError, match=r"nothing was drawn: .*; no tape made"):
        generate(Described((part("gamma", 1, 1, 1e-6),), Lengths(9), Lengths(9)), tmp_path / "t")
    assert not (tmp_path / "t").exists()
    tiny = Described((part("constant", 1, 1, 2),), Lengths(9), Lengths(9))
    generate(tiny, tmp_path / "t")
    with pytest.raises(TapeError, match="exists"):
        generate(tiny, tmp_path / "t")


MILLION = """
import resource, sys
from fractions import Fraction
from pathlib import Path
from tokentape.traces.synthetic import Described, Lengths, Part, Prefixes, Turns, generate
S = 10**9
load = Described(
    (Part("poisson", Fraction(100), Fraction(900), int(sys.argv[2]) * S),),
    Lengths(800, 1.2, most=8000), Lengths(200, 1.0, most=2000),
    Prefixes(20, 2048, Fraction(4, 5)), Turns(2))
done = generate(load, Path(sys.argv[1]))
usage = resource.getrusage(resource.RUSAGE_SELF)
print(done.requests, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_million_requests_take_less_than_30_s_and_memory_does_not_grow_with_them(
    tmp_path: Path,
) -> None:
    found = []
    for seconds in (250, 1000):
        command = [sys.executable, "-c", MILLION, str(tmp_path / str(seconds)), str(seconds)]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append([float(word) for word in ran.stdout.split()])
    (few, _, few_kib), (many, many_s, many_kib) = found
    assert few == pytest.approx(250_000, rel=0.02) and many == pytest.approx(1_000_000, rel=0.02)
    assert many_s < 30
    assert many_kib < few_kib + 60_000
