"""One replica's share: every request goes to one replica, by the rule that was asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokentape.replay.asked import Asked
from tokentape.replay.operators import Kin, Selected
from tokentape.replay.options import ReplayOptions
from tokentape.replay.plan import make_plan
from tokentape.replay.replica import APART_RATIO, APART_REQUESTS, ROUTINGS, Replica, Routing
from tokentape.traces.errors import UsageError
from tokentape.traces.importers import import_trace

DATA = Path(__file__).parent.parent / ".." / "shared" / "data"
MOONCAKE = DATA / "mooncake" / "conversation_trace.jsonl"

Requests = list[tuple[int, int, list[int]]]  # gap, duration, blocks


requests = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.integers(1, 30),
        st.tuples(st.integers(0, 2), st.integers(0, 6), st.booleans()),
    ),
    min_size=1,
    max_size=60,
).map(
    lambda some: [
        (gap, lasts, [10 * which + n for n in range(known)] + [1000 + k] * own)
        for k, (gap, lasts, (which, known, own)) in enumerate(some)
    ]
)


def homes(some: Requests, count: int, routing: Routing) -> list[int]:
    """The replica of each request, by asking each replica what it gets."""
    n = len(some)
    time_ns = np.cumsum([gap for gap, *_ in some]).astype(np.int64)
    chosen = Selected(time_ns, np.arange(n, dtype=np.int32), np.zeros(n, dtype=np.int16))

    def prefixes(asked: Selected) -> Any:
        for part in np.array_split(asked.row, 3):
            blocks = [some[row][2] for row in part.tolist()]
            names = np.array([b for one in blocks for b in one], dtype=np.uint64)
            yield np.array([len(b) for b in blocks], dtype=np.int64), names

    nobody = Kin.nobody(n)
    durations = np.array([lasts for _, lasts, _ in some], dtype=np.int64)
    kin = Kin(nobody.number, nobody.digest, durations, prefixes)
    found = [-1] * n
    for index in range(count):
        for row in Replica(index, count, routing, 0).apply(chosen, kin).row.tolist():
            assert found[row] == -1
            found[row] = index
    assert -1 not in found
    return found


@given(requests, st.integers(1, 5))
def test_round_robin_deals_requests_out_in_turn(some: Requests, count: int) -> None:
    assert homes(some, count, "round-robin") == [k % count for k in range(len(some))]


@given(requests, st.integers(1, 5))
def test_the_least_loaded_replica_had_no_more_open_than_any_other(
    some: Requests, count: int
) -> None:
    found = homes(some, count, "least-loaded")
    now = np.cumsum([gap for gap, *_ in some])
    for k, home in enumerate(found):
        loads = [0] * count
        for j in range(k):
            loads[found[j]] += now[j] + some[j][1] > now[k]
        assert loads[home] == min(loads)


@given(requests, st.integers(1, 5))
def test_a_known_prefix_goes_to_the_least_loaded_that_has_most_of_it(
    some: Requests, count: int
) -> None:
    if not any(blocks for *_, blocks in some):
        with pytest.raises(UsageError, match="knows no prefix blocks"):
            homes(some, count, "prefix")
        return
    found = homes(some, count, "prefix")
    now = np.cumsum([gap for gap, *_ in some])
    for k, home in enumerate(found):
        loads, matches = [0] * count, [0] * count
        blocks = some[k][2]
        for replica in range(count):
            mine = [j for j in range(k) if found[j] == replica]
            loads[replica] = sum(now[j] + some[j][1] > now[k] for j in mine)
            seen = {b for j in mine for b in some[j][2]}
            matches[replica] = next((n for n, b in enumerate(blocks) if b not in seen), len(blocks))
        best = max(matches)
        apart = max(loads) - min(loads) > APART_REQUESTS and max(loads) > APART_RATIO * min(loads)
        if blocks and 2 * best >= len(blocks) and best and not apart:
            assert matches[home] == best
            assert loads[home] == min(
                load for load, match in zip(loads, matches, strict=True) if match == best
            )
        else:
            assert loads[home] == min(loads)


def test_a_prefix_does_not_pile_up_on_one_replica_while_the_others_idle() -> None:
    some: Requests = [(0, 1000, [1, 2, 3]) for _ in range(200)]
    found = homes(some, 2, "prefix")
    assert found[: APART_REQUESTS + 1] == [0] * (APART_REQUESTS + 1)
    assert 60 <= sum(found) <= 100


@pytest.mark.skipif(not MOONCAKE.exists(), reason=f"{MOONCAKE} is not here")
def test_a_replica_of_a_fleet_is_not_what_thinning_makes_of_it(tmp_path: Path) -> None:
    lines = MOONCAKE.read_text().splitlines()[:3000]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    import_trace("mooncake", [tmp_path / "m.jsonl"], tmp_path / "m")
    shapes = {}
    for routing in ROUTINGS:
        asked = Asked(spread=True, replica=(1, 8), routing=routing)
        options = ReplayOptions(
            source=tmp_path / "m", to="http://127.0.0.1:1", model="m", operators=asked
        )
        plan = make_plan(options, offline=True)
        assert plan.shapes is not None
        *_, shapes[routing], thinned = plan.shapes.found
        assert thinned.load == "(thin 12.5% instead)"
        assert plan.figures["requests"] == shapes[routing].requests
        assert (routing == "round-robin") != any("simulated" in n for n in plan.warnings())
    assert thinned.gap_cv and thinned.reuse
    for found in shapes.values():
        assert found.requests == pytest.approx(375, abs=40)
        assert found.gap_cv and found.gap_cv < 0.8 * thinned.gap_cv
    assert shapes["prefix"].reuse and shapes["prefix"].reuse > 2 * thinned.reuse
    assert shapes["round-robin"].requests == 375
