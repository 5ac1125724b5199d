"""A load that this machine cannot offer is refused before it is sent; what is possible is said."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from tokentape.replay.capacity import Demand, Fit, Machine
from tokentape.replay.options import ReplayOptions
from tokentape.replay.plan import Plan, make_plan
from tokentape.traces.errors import UsageError
from tokentape.traces.writer import TapeWriter

S = 1_000_000_000
MODEST = Demand(
    workers=1,
    requests_per_s=10,
    events_per_s=1_000,
    peak_requests_per_s=50,
    in_flight=100,
    body_bytes=1_000,
)
HOST = Machine(cores=4, files=10_000, files_now=900, ports=28_232, memory_bytes=16 << 30)


def demand(**changes: Any) -> Demand:
    return Demand(**(vars(MODEST) | changes))


def test_a_modest_load_is_possible_and_its_needs_are_said() -> None:
    fit = Fit(MODEST, HOST)
    assert fit.impossible() == []
    assert "0.02 of 4 cores" in fit.text() and "100 connections a worker of 10,000" in fit.text()
    assert "(raised)" not in fit.text()
    assert "(raised)" in Fit(demand(in_flight=1_000), HOST).text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"requests_per_s": 1_000, "events_per_s": 100_000},
            "takes 2.3 cores, 1 worker on 4 cores have 1: about 435 requests/s and 43,478 tokens/s",
        ),
        ({"peak_requests_per_s": 7_000}, "send about 3,333 in a second"),
        ({"in_flight": 10_001}, "10,001 connections in a process"),
        ({"in_flight": 30_000, "workers": 4}, "28,232 local ports"),
        ({"in_flight": 1_000, "body_bytes": 20e6}, "GB of memory, of 17.2"),
    ],
)
def test_what_is_beyond_the_machine_is_said_with_what_it_can_do(
    changes: dict[str, Any], said: str
) -> None:
    (reason,) = Fit(demand(**changes), HOST).impossible()
    assert said in reason


def test_more_workers_carry_what_one_cannot_as_long_as_there_are_cores() -> None:
    heavy = {"requests_per_s": 1_000, "events_per_s": 100_000}
    assert not Fit(demand(workers=3, **heavy), HOST).impossible()
    assert Fit(demand(workers=8, **heavy), Machine(1, None, None, 28_232, 16 << 30)).impossible()


def test_this_machine_is_what_the_kernel_says() -> None:
    here = Machine.here()
    assert here.cores >= 1 and here.memory_bytes > 100 << 20 and 1_000 < here.ports < 65_536
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert (here.files is None) == (hard == resource.RLIM_INFINITY)


def plan_of(folder: Path, requests: int, **options: Any) -> Plan:
    """A plan of that many requests, all within a second."""
    path = folder / f"{requests}.tape"
    if not path.exists():
        writer = TapeWriter.create(path, role="import", command=[], options={}, facts={})
        for n in range(requests):
            row = {"request_id": n.to_bytes(16), "arrival_ns": n * 1_000, "outcome": "ok"}
            writer.append(row | {"input_tokens": 20, "output_tokens": 200})
        writer.close()
    return make_plan(
        ReplayOptions(source=path, to="http://127.0.0.1:1", model="m", **options), offline=True
    )


def test_an_impossible_plan_stops_unless_it_is_forced(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 3_000)  # 600,000 tokens within 4 s: three times what a core does
    with pytest.raises(UsageError, match=r"cannot offer this load: .* tokens/s of this kind"):
        plan.check()
    assert "impossible here: sending it takes 3.2 cores" in plan.text()
    assert json.loads(json.dumps(plan.json()))["capacity"]["impossible"]
    plan_of(tmp_path, 3_000, force=True).check()
    plan_of(tmp_path, 1_000).check()  # a burst that was measured to be possible
    plan_of(tmp_path, 5).check()
