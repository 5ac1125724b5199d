"""Operators: sessions whole, exact under a seed, and each effect measured and said."""

import json
from collections import defaultdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokentape.replay.asked import Asked
from tokentape.replay.operators import (
    Kin,
    Loop,
    Multiply,
    Operator,
    Selected,
    Spread,
    Thin,
    operate,
)
from tokentape.replay.options import ReplayOptions
from tokentape.replay.plan import Plan, make_plan
from tokentape.replay.sessions import mixed
from tokentape.traces.errors import UsageError
from tokentape.traces.importers import import_trace
from tokentape.traces.reader import open_tape
from tokentape.traces.writer import TapeWriter

SECOND = 1_000_000_000
DATA = Path(__file__).parent.parent / ".." / "shared" / "data"
WEKA = DATA / "weka-agentic"
MOONCAKE = DATA / "mooncake" / "conversation_trace.jsonl"

times = st.lists(st.integers(0, 10**15), min_size=1, max_size=40).map(sorted)
seeds = st.integers(0, 2**64)
shares = st.fractions(Fraction(1, 100), 1, max_denominator=100)


def load(time_ns: list[int], sessions: list[int]) -> tuple[Selected, Kin]:
    n = len(time_ns)
    number = np.array(sessions, dtype=np.int32)
    chosen = Selected(
        np.array(time_ns, dtype=np.int64), np.arange(n, dtype=np.int32), np.zeros(n, np.int16)
    )
    return chosen, Kin(number, mixed(number.astype(np.uint64)))


@st.composite
def loads(draw: st.DrawFn) -> tuple[Selected, Kin]:
    time_ns = draw(times)
    n = len(time_ns)
    return load(time_ns, draw(st.lists(st.integers(-1, 6), min_size=n, max_size=n)))


def sessions(chosen: Selected, kin: Kin) -> dict[tuple[int, int, int], list[tuple[int, int]]]:
    """(row, time) of each session of each copy; a request without a session is one by itself."""
    found = defaultdict(list)
    for row, copy, at in zip(chosen.row, chosen.copy, chosen.time_ns, strict=True):
        number = int(kin.number[row])
        alone = int(row) if number < 0 else -1
        found[number, alone, int(copy)].append((int(row), int(at)))
    return found


def gaps(turns: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Rows with the time since the first of them."""
    return [(row, at - turns[0][1]) for row, at in turns]


@given(loads(), shares, shares, seeds)
def test_thinning_keeps_sessions_whole_and_a_smaller_share_is_part_of_a_larger(
    given_load: tuple[Selected, Kin], one: Fraction, two: Fraction, seed: int
) -> None:
    chosen, kin = given_load
    before = sessions(chosen, kin)
    small, large = (
        sessions(Thin(share, seed).apply(chosen, kin), kin) for share in sorted((one, two))
    )
    assert all(before[name] == turns for name, turns in large.items())
    assert set(small) <= set(large)
    assert sessions(Thin(Fraction(1), seed).apply(chosen, kin), kin) == before


@given(loads(), shares, seeds, st.integers(0, 40), st.integers(0, 40))
def test_a_window_is_thinned_as_the_whole_tape_is(
    given_load: tuple[Selected, Kin], share: Fraction, seed: int, first: int, width: int
) -> None:
    chosen, kin = given_load
    inside = (chosen.row >= first) & (chosen.row < first + width)
    kept = set(Thin(share, seed).apply(chosen, kin).row.tolist())
    window = Thin(share, seed).apply(chosen.only(inside), kin).row.tolist()
    assert window == sorted(kept & set(chosen.row[inside].tolist()))


def test_thinning_keeps_about_its_share_and_follows_the_seed() -> None:
    n = 20_000
    chosen, kin = load(list(range(n)), [k // 2 for k in range(n)])
    kept = [len(Thin(Fraction(3, 10), seed).apply(chosen, kin)) for seed in range(8)]
    assert all(abs(k - 0.3 * n) < 5 * 2 * (n / 2 * 0.3 * 0.7) ** 0.5 for k in kept)
    assert len(set(kept)) > 4
    assert kept[0] == len(Thin(Fraction(3, 10), 0).apply(chosen, kin))


@given(loads(), st.fractions(1, 5, max_denominator=4), seeds)
def test_multiplied_sessions_are_whole_with_all_their_gaps_and_copy_0_is_the_tape(
    given_load: tuple[Selected, Kin], factor: Fraction, seed: int
) -> None:
    chosen, kin = given_load
    made = Multiply(factor, seed).apply(chosen, kin)
    assert (np.diff(made.time_ns) >= 0).all()
    first = made.only(made.copy == 0)
    assert first.time_ns.tolist() == chosen.time_ns.tolist()
    assert first.row.tolist() == chosen.row.tolist()
    before, after = sessions(chosen, kin), sessions(made, kin)
    for (number, alone, _), turns in after.items():
        assert gaps(turns) == gaps(before[number, alone, 0])
    whole = int(factor)
    assert {c for *_, c in after} >= set(range(whole))
    for copy in range(whole):
        assert len([1 for *_, c in after if c == copy]) == len(before)
    if factor == whole:
        assert len(made) == whole * len(chosen)


@given(loads(), st.integers(2, 5), seeds)
def test_copies_begin_within_the_period_and_no_two_of_a_session_come_together(
    given_load: tuple[Selected, Kin], factor: int, seed: int
) -> None:
    chosen, kin = given_load
    made = Multiply(Fraction(factor), seed).apply(chosen, kin)
    period, origin = chosen.period_ns, int(chosen.time_ns[0])
    starts = defaultdict(list)
    for (number, alone, _), turns in sessions(made, kin).items():
        starts[number, alone].append(turns[0][1] - origin)
        assert 0 <= starts[number, alone][-1] < period
    for found in starts.values():
        apart = np.diff([*sorted(found), min(found) + period])
        assert apart.min() >= period // (2 * factor) - factor


@given(loads(), st.fractions(1, 6, max_denominator=5))
def test_each_pass_of_a_loop_is_the_first_one_a_period_later(
    given_load: tuple[Selected, Kin], passes: Fraction
) -> None:
    chosen, kin = given_load
    made = Loop(passes=passes).apply(chosen, kin)
    assert (np.diff(made.time_ns) >= 0).all()
    origin, period = int(chosen.time_ns[0]), chosen.period_ns
    for number in range(-(-passes.numerator // passes.denominator)):
        one = made.only(made.copy == number)
        n = len(one)
        assert one.row.tolist() == chosen.row[:n].tolist()
        assert (one.time_ns - chosen.time_ns[:n] == number * period).all()
        if number < int(passes):
            assert n == len(chosen)
    assert made.time_ns[-1] - origin < passes * period


def test_a_loop_lasts_as_long_as_the_run_shall_at_its_speed() -> None:
    chosen, kin = load([k * SECOND for k in range(10)], [-1] * 10)
    made = Loop(run_ns=20 * SECOND, speed=Fraction(2)).apply(chosen, kin)
    assert len(made) == 40 and made.time_ns[-1] == 39 * SECOND
    assert np.diff(made.time_ns).tolist() == [SECOND] * 39  # no seam to be seen
    with pytest.raises(UsageError, match=r"shorter than the 5\.0 s .* --window"):
        Loop(run_ns=4 * SECOND, speed=Fraction(2)).apply(chosen, kin)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60).map(sorted), seeds)
def test_spread_arrivals_stay_in_order_and_within_their_step(ticks: list[int], seed: int) -> None:
    step = 3 * SECOND
    chosen, kin = load([t * step for t in ticks], [-1] * len(ticks))
    made = Spread(step, seed).apply(chosen, kin)
    assert made.row.tolist() == chosen.row.tolist()
    assert (made.time_ns // step).tolist() == ticks


def test_spread_arrivals_are_uniform_within_their_step() -> None:
    n, step = 20_000, 3 * SECOND
    chosen, kin = load([k // 5 * step for k in range(n)], [-1] * n)
    within = Spread(step, 1).apply(chosen, kin).time_ns % step / step
    counts = np.histogram(within, bins=10, range=(0, 1))[0]
    assert ((counts - n / 10) ** 2 / (n / 10)).sum() < 27.9  # chi square, 9 degrees, alpha 0.001


def test_operators_draw_the_same_on_every_host() -> None:
    chosen, kin = load([k * SECOND for k in range(12)], [0, 0, 1, 1, 2, 2, 3, 3, 4, -1, -1, -1])
    steps: list[Operator] = [
        Spread(SECOND, 7),
        Thin(Fraction(1, 2), 7),
        Multiply(Fraction(3, 2), 7),
        Loop(passes=Fraction(3, 2)),
    ]
    seen: list[tuple[str, int]] = []
    made, gone = operate(chosen, steps, kin, lambda name, now: seen.append((name, len(now))))
    names = ["tape", "spread over 1 s", "thin 50%", "multiply 1.5x", "loop 1.5x"]
    assert [name for name, _ in seen] == names
    assert {reason: rows.tolist() for reason, rows in gone.items()} == {
        "not in thin 50%": [2, 3, 8, 9, 10, 11]
    }
    pinned = list(zip(made.row.tolist(), made.copy.tolist(), made.time_ns.tolist(), strict=True))
    assert pinned == [
        (0, 0, 134843202),
        (1, 0, 1711857933),
        (6, 1, 2514165869),
        (7, 1, 3760717312),
        (4, 0, 4897128197),
        (5, 0, 5121857836),
        (0, 1, 5274008660),
        (6, 0, 6454748497),
        (1, 1, 6851023391),
        (7, 0, 7701299940),
        (0, 2, 8542017356),
        (1, 2, 10119032087),
        (6, 3, 10921340023),
        (7, 3, 12167891466),
    ]


def test_what_cannot_be_made_is_refused_in_a_line() -> None:
    chosen, kin = load(list(range(1000)), [-1] * 1000)
    with pytest.raises(UsageError, match=r"--thin 0%: nothing would be left"):
        Asked(thin=Fraction(0)).operators(0, Fraction(1), None)
    with pytest.raises(UsageError, match=r"--multiply 0\.5: .*--thin 50%"):
        Asked(multiply=Fraction(1, 2)).operators(0, Fraction(1), None)
    with pytest.raises(UsageError, match=r"--spread: the tape does not say"):
        Asked(spread=True).operators(0, Fraction(1), None)
    with pytest.raises(UsageError, match=r"--multiply 1e\+06: would make 1,000,000,000 requests"):
        Multiply(Fraction(1_000_000), 0).apply(chosen, kin)
    with pytest.raises(UsageError, match=r"--loop: would make .* copies"):
        Loop(passes=Fraction(40_000)).apply(chosen, kin)


def tape(path: Path, rows: list[dict[str, Any]], **facts: Any) -> Path:
    writer = TapeWriter.create(path, role="capture", command=[], options={}, facts=facts)
    for number, row in enumerate(rows):
        known = {"request_id": number.to_bytes(16), "arrival_ns": number * SECOND, "outcome": "ok"}
        writer.append(known | {"input_tokens": 32, "output_tokens": 5} | row)
    writer.close()
    return path


def plan_of(source: Path, **changes: Any) -> Plan:
    options = ReplayOptions(source=source, to="http://127.0.0.1:1", model="m", **changes)
    return make_plan(options, offline=True)


def test_a_plan_states_what_each_step_does_before_and_after(tmp_path: Path) -> None:
    blocks = {"block_tokens": 16, "block_unit": "token", "block_scope": "trace"}
    rows: list[dict[str, Any]] = [
        {"session_id": f"s{n % 20}", "block_hashes": [1, 2 + n % 20], **blocks} for n in range(200)
    ]
    source = tape(tmp_path / "t", rows, arrival_resolution_ns=SECOND)
    asked = Asked(thin=Fraction(1, 2), multiply=Fraction(2), loop_passes=Fraction(2))
    plan = plan_of(source, operators=asked, speed=Fraction(4))
    loads = json.loads(json.dumps(plan.json()))["loads"]
    kept = loads[1]["sessions"]
    names = ["tape", "thin 50%", "multiply 2x", "loop 2x", "speed 4x"]
    assert [one["load"] for one in loads] == names
    assert [one["sessions"] for one in loads] == [20, kept, 2 * kept, 4 * kept, 4 * kept]
    assert [one["requests"] for one in loads] == [200, *(kept * 10 * k for k in (1, 2, 4, 4))]
    assert [one["turn_gap_ns"] for one in loads] == [20 * SECOND] * 4 + [5 * SECOND]
    distinct = kept + 1  # of one copy: the common block, and one of each session
    reuse = (20 * kept - distinct) / (20 * kept)
    assert [one["reuse"] for one in loads[1:]] == pytest.approx([reuse] * 4, abs=1e-4)
    assert loads[0]["gap_cv"] == 0 and loads[0]["dispersion_60s"] == 0
    text = plan.text()
    assert "what each step makes of the load" in text and "no prefix is shared" in text
    assert f"left out: {200 - 10 * kept} not in thin 50%" in text
    assert plan.shapes and all(len(line) <= 100 for line in plan.shapes.lines())


@pytest.mark.parametrize(
    ("scaled", "said"), [(True, "think time too, are divided"), (False, "stays as recorded")]
)
def test_what_a_speed_does_to_think_time_is_said(
    tmp_path: Path, *, scaled: bool, said: str
) -> None:
    plan = plan_of(tape(tmp_path / "t", [{}] * 3), speed=Fraction(2), scaled_think=scaled)
    assert plan.shapes and said in plan.shapes.found[-1].distorts


def test_sessions_and_copies_stay_whole_in_shards_and_one_worker(tmp_path: Path) -> None:
    source = tape(tmp_path / "t", [{"session_id": f"s{n % 7}"} for n in range(70)])
    plan = plan_of(source, operators=Asked(multiply=Fraction(3)), workers=3)
    homes = defaultdict(set)
    for number, worker in enumerate(plan.worker_of_each.tolist()):
        homes[plan.outgoing(number).row["session_id"]].add(worker)
    assert len(homes) == 21 and all(len(home) == 1 for home in homes.values())


def test_a_tape_without_sessions_is_told_that_thinning_cuts_them(tmp_path: Path) -> None:
    source = tape(tmp_path / "t", [{} for _ in range(20)])
    notes = plan_of(source, operators=Asked(thin=Fraction(1, 2))).warnings()
    assert any("knows no sessions" in note for note in notes)


def test_a_thinning_that_leaves_nothing_says_so(tmp_path: Path) -> None:
    source = tape(tmp_path / "t", [{}])
    with pytest.raises(UsageError, match=r"nothing to replay \(1 not in thin 0\.001%\)"):
        plan_of(source, operators=Asked(thin=Fraction(1, 100_000)))


@pytest.mark.skipif(not MOONCAKE.exists(), reason=f"{MOONCAKE} is not here")
def test_the_mooncake_trace_shares_no_more_when_it_is_doubled(tmp_path: Path) -> None:
    lines = MOONCAKE.read_text().splitlines()[:3000]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    import_trace("mooncake", [tmp_path / "m.jsonl"], tmp_path / "m")
    asked = Asked(multiply=Fraction(2), spread=True)
    shapes = plan_of(tmp_path / "m", operators=asked).shapes
    assert shapes is not None
    before, spread, doubled = shapes.found
    assert (before.requests, doubled.requests) == (3000, 6000)
    assert before.reuse and spread.reuse == before.reuse == doubled.reuse
    assert before.dispersion_1s and before.dispersion_1s > 5  # volleys every three seconds
    assert spread.dispersion_1s and spread.dispersion_1s < 1.2


@pytest.mark.skipif(not WEKA.exists(), reason=f"{WEKA} is not here")
def test_agents_and_their_subagents_stay_together_at_their_distances(tmp_path: Path) -> None:
    import_trace("weka", [WEKA], tmp_path / "w")
    asked = Asked(thin=Fraction(3, 4), multiply=Fraction(5, 2))
    plan = plan_of(tmp_path / "w", operators=asked, seed=0)
    schedule, source = plan.schedule, plan.source
    rows, copies = schedule.source_index.tolist(), schedule.copy_index.tolist()
    due = dict(zip(zip(rows, copies, strict=True), schedule.due_ns.tolist(), strict=True))
    table = open_tape(tmp_path / "w").read(["arrival_ns", "session_id"])
    arrival, name = table["arrival_ns"].to_pylist(), table["session_id"].to_pylist()
    links = list(zip(source.links.child.tolist(), source.links.parent.tolist(), strict=True))
    followed = dict.fromkeys(range(3), 0)
    for (row, copy), at in due.items():
        for parent in (p for c, p in links if c == row):
            assert at - due[parent, copy] == arrival[row] - arrival[parent]
            followed[copy] += name[row] != name[parent]
    assert followed[0] == followed[1] > 0  # links from one session to another
