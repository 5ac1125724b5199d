"""Several workers: one plan, one start, one tape, one verdict; and what is said of a lost one."""

import asyncio
import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from subprocess import DEVNULL
from threading import Thread
from typing import Any

import pytest

from replay_server import Script, Seen, Server, Step, engine_like, serve, streamed
from tokentape.replay.options import ReplayOptions
from tokentape.replay.plan import Plan, make_plan
from tokentape.replay.progress import Progress
from tokentape.replay.run import run_plan
from tokentape.replay.sessions import Shard
from tokentape.replay.start import StartAt
from tokentape.traces.check import check
from tokentape.traces.clock import wall_unix_ns
from tokentape.traces.errors import TapeError, TokentapeError
from tokentape.traces.facts import lock
from tokentape.traces.reader import Tape, open_tape
from tokentape.traces.writer import TapeWriter

MS = 1_000_000
SECOND = 1000 * MS
REQUESTS = 60
SLOWLY = Fraction(1, 5)  # in three seconds instead of half of one


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of three requests are in sessions of four turns; half of them have prefix blocks."""
    path = tmp_path_factory.mktemp("crew") / "source.tape"
    writer = TapeWriter.create(path, role="import", command=[], options={}, facts={})
    for number in range(REQUESTS):
        row: dict[str, Any] = {"request_id": number.to_bytes(16), "arrival_ns": number * 10 * MS}
        row |= {"input_tokens": 20 + number, "output_tokens": 3, "outcome": "ok"}
        if number % 3:
            row |= {"session_id": f"s{number // 6}", "turn_index": number % 6}
        if number % 2:
            row |= {"block_tokens": 8, "block_unit": "token", "block_hashes": [number // 6, number]}
        writer.append(row)
    writer.close()
    return path


def planned(source: Path, server: Server, tape: Path, **changes: Any) -> Plan:
    return make_plan(
        ReplayOptions(source=source, to=server.url, tape=tape, namespace="", **changes)
    )


def bodies(server: Server) -> Counter[str]:
    return Counter(hashlib.sha256(s.body).hexdigest() for s in server.generations)


def homes(tape: Tape) -> dict[str, set[str]]:
    """The workers of each session."""
    found: dict[str, set[str]] = {}
    for row in tape.read(["session_id", "worker"]).to_pylist():
        if row["session_id"] is not None:
            found.setdefault(row["session_id"], set()).add(row["worker"])
    return found


def due(tape: Tape) -> dict[bytes, int]:
    """The wall-clock instant at which each request of the source was due."""
    epoch = int(tape.facts["wall_epoch_unix_ns"])
    rows = tape.read(["source_request_id", "scheduled_ns"]).to_pylist()
    return {r["source_request_id"].bytes: epoch + r["scheduled_ns"] for r in rows}


def slow(gap_s: float) -> Script:
    """An engine whose replies take three such gaps; it answers questions at once."""

    def script(seen: Seen) -> Sequence[Step]:
        asked = seen.json.get("max_tokens") if seen.body else None
        return streamed(seen, gap_s=gap_s) if asked not in (None, 1) else engine_like(seen)

    return script


def test_workers_send_what_one_would_at_one_start_to_one_tape(tmp_path: Path, source: Path) -> None:
    with serve() as server:
        assert run_plan(planned(source, server, tmp_path / "one")).rows == REQUESTS
        alone = bodies(server)
        server.seen.clear()
        states: list[Progress] = []
        plan = planned(source, server, tmp_path / "three", workers=3)
        summary = run_plan(plan, states.append)
        together = bodies(server)
    assert together == alone and together.total() == REQUESTS
    assert (summary.rows, summary.sent, summary.not_sent) == (REQUESTS, REQUESTS, 0)
    tape = open_tape(tmp_path / "three")
    assert {s.metadata["worker"] for s in tape.segments} == {"w0", "w1", "w2"}
    assert all(len(workers) == 1 for workers in homes(tape).values())
    times = due(tape)
    first = min(times.values())
    assert {key: t - first for key, t in times.items()} == {
        n.to_bytes(16): n * 10 * MS for n in range(REQUESTS)
    }
    assert len({str(s.anchors[0]) for s in tape.segments}) == 1
    assert check(tape) == []
    run = tape.facts["run"]
    assert run["complete"] and sum(w["rows"] for w in run["workers"].values()) == REQUESTS
    assert all(w["health"]["ticks"] > 0 for w in run["workers"].values())
    assert set(summary.verdict.figures["lag_by_worker_ns"]) == {"w0", "w1", "w2"}
    sizes = ", ".join(str(w["requests"]) for _, w in sorted(run["workers"].items()))
    assert f"  workers: 3, of {sizes} requests" in plan.text()


def test_a_worker_that_is_killed_is_missed_and_nothing_is_sent_again(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(slow(0.3)) as server:
        victims: list[int] = []

        def kill(state: Progress) -> None:
            if not victims:
                victims.append(child_called("w1"))
                os.kill(victims[0], signal.SIGKILL)

        plan = planned(source, server, tmp_path / "run", workers=2, speed=SLOWLY)
        summary = run_plan(plan, kill)
        sent = bodies(server)
    assert "worker w1 died (signal 9)" in capsys.readouterr().err
    assert max(sent.values()) == 1
    tape = open_tape(summary.tape)
    run = tape.facts["run"]
    assert not run["complete"] and run["workers"]["w1"]["died"] == "signal 9"
    assert (
        tape.unsealed_rows == 0 and run["workers"]["w0"]["rows"] == run["workers"]["w0"]["requests"]
    )
    on_tape, planned_rows = (run["workers"]["w1"][name] for name in ("rows", "requests"))
    assert 0 < on_tape < planned_rows and summary.rows == run["workers"]["w0"]["rows"] + on_tape
    assert summary.not_sent == REQUESTS - summary.sent > 0
    assert summary.outcomes.get("cut", 0) > 0
    assert summary.verdict.level == "invalid"
    assert f"worker w1 died (signal 9): {on_tape} of its {planned_rows} " in " ".join(
        summary.verdict.reasons
    )


def child_called(worker: str) -> int:
    """The process of this test's crew that has this worker's segments: by its writer's journal."""
    for pid in children(os.getpid()):
        for fd in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if f"/journal/{worker}-" in fd:
                return pid
    raise AssertionError(worker)


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


def test_ctrl_c_reaches_all_workers_and_each_seals(tmp_path: Path, source: Path) -> None:
    number = signal.SIGINT
    with serve() as server:
        plan = planned(source, server, tmp_path / "run", workers=2, speed=SLOWLY)
        before = signal.getsignal(number)
        summary = run_plan(plan, lambda _: os.kill(os.getpid(), number))
        signal.signal(number, before)
    tape = open_tape(summary.tape)
    assert summary.stopped and 0 < summary.sent == summary.rows == tape.rows < REQUESTS
    assert summary.not_sent == REQUESTS - summary.sent and not summary.losses
    assert {s.metadata["worker"] for s in tape.segments} == {"w0", "w1"}
    assert not tape.facts["run"]["complete"] and children(os.getpid()) == []


@pytest.mark.slow
def test_a_worker_that_hangs_is_killed_at_the_third_signal_and_its_rows_are_kept(
    tmp_path: Path, source: Path
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    told: list[Progress] = []

    def hang(state: Progress) -> None:
        if not told:
            os.kill(child_called("w0"), signal.SIGSTOP)
        told.append(state)
        os.kill(os.getpid(), signal.SIGTERM)

    with serve() as server:
        plan = planned(source, server, tmp_path / "run", workers=2, speed=SLOWLY)
        summary = run_plan(plan, hang)
    signal.signal(signal.SIGTERM, before)
    workers = open_tape(summary.tape).facts["run"]["workers"]
    assert workers["w0"]["died"] == "signal 9" and workers["w0"]["rows"] > 0
    assert "died" not in workers["w1"] and len(told) >= 3 and told[-1].in_flight == 0
    assert {t.total for t in told} == {REQUESTS} and 0 < told[0].sent < REQUESTS
    assert [t.sent for t in told] == sorted(t.sent for t in told)
    assert summary.rows == workers["w0"]["rows"] + workers["w1"]["rows"]
    assert children(os.getpid()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_waits_for_its_start_can_be_stopped(
    tmp_path: Path, source: Path, workers: int
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def interrupt() -> None:
        until(lambda: signal.getsignal(signal.SIGTERM) != before)
        os.kill(os.getpid(), signal.SIGTERM)

    with serve() as server:
        far = {"workers": workers, "start_at_unix_ns": wall_unix_ns() + 3000 * SECOND}
        plan = planned(source, server, tmp_path / "run", **far)
        thread = Thread(target=interrupt)
        thread.start()
        summary = run_plan(plan)
        thread.join()
        assert not server.generations
    signal.signal(signal.SIGTERM, before)
    assert (summary.stopped, summary.sent, summary.not_sent) == (True, 0, REQUESTS)
    assert summary.verdict.level == "invalid" and children(os.getpid()) == []


def test_workers_whose_leader_is_killed_end_and_seal(tmp_path: Path, source: Path) -> None:
    tape = tmp_path / "run"
    with serve() as server:
        command = [sys.executable, "-m", "tokentape", "replay", str(source), "--to", server.url]
        command += ["--tape", str(tape), "--workers", "2", "--speed", "0.1x"]
        with subprocess.Popen(command, stdout=DEVNULL, stderr=DEVNULL) as leader:
            until(lambda: len(server.generations) > 5)
            leader.kill()
        until(lambda: not_locked(tape))
        sent = bodies(server)
    found = open_tape(tape)
    assert found.rows == sent.total() < REQUESTS and found.unsealed_rows == 0
    assert {s.metadata["worker"] for s in found.segments} == {"w0", "w1"}
    assert "run" not in found.facts and not found.losses


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def not_locked(tape: Path) -> bool:
    with contextlib.suppress(TapeError):
        os.close(lock(tape))
        return True
    return False


def test_a_candidate_that_is_gone_is_one_line_and_all_workers_end(
    tmp_path: Path, source: Path
) -> None:
    with serve() as server:
        plan = planned(source, server, tmp_path / "run", workers=2)
    with pytest.raises(TokentapeError, match="takes no connection any more"):
        run_plan(plan)
    tape = open_tape(tmp_path / "run")
    assert tape.rows == 0 and tape.facts["run"] == {"failed": True}
    assert children(os.getpid()) == []


class Killing(StartAt):
    """A start before which a worker is killed."""

    async def prepared(self) -> None:
        os.kill(child_called("w0"), signal.SIGKILL)
        await asyncio.sleep(30)


def test_a_worker_that_dies_before_the_start_ends_the_run_before_anything_is_sent(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokentape.replay.run.StartAt", Killing)
    with serve() as server:
        plan = planned(source, server, tmp_path / "run", workers=2)
        with pytest.raises(TokentapeError, match=r"worker w0 ended before the start \(signal 9\)"):
            run_plan(plan)
        assert not server.generations
    assert children(os.getpid()) == []


@pytest.mark.slow
def test_shards_of_two_hosts_are_the_plan_at_one_instant(tmp_path: Path, source: Path) -> None:
    with serve() as server:
        run_plan(planned(source, server, tmp_path / "whole"))
        alone = bodies(server)
        server.seen.clear()
        at = wall_unix_ns() + 3 * SECOND
        shards = [{"shard": Shard(index, 2), "start_at_unix_ns": at} for index in range(2)]
        plans = [planned(source, server, tmp_path / f"s{n}", **s) for n, s in enumerate(shards)]
        with ThreadPoolExecutor() as hosts:
            summaries = list(hosts.map(run_plan, plans))
        seen: dict[bytes, int] = {}
        for index, plan in enumerate(plans):
            said = f"plan: shard {index}/2: {len(plan)} of the plan's {REQUESTS} requests"
            assert said in plan.text() and 0 < len(plan) < REQUESTS
            assert summaries[index].rows == len(plan)
            tape = open_tape(summaries[index].tape)
            mine = {k: t - at for k, t in due(tape).items()}
            assert not seen.keys() & mine.keys()
            seen |= mine
            start = tape.facts["run"]["start"]
            assert start["t0_unix_ns"] == start["start_at_unix_ns"] == at
            assert abs(start["anchor"]["wall_unix_ns"] - at) < 60 * SECOND
            assert "error against other hosts is not known" in start["clock"]
            assert {s.metadata["worker"] for s in tape.segments} == {f"s{index}w0"}
        assert bodies(server) == alone
    assert seen.keys() == {n.to_bytes(16) for n in range(REQUESTS)}
    for number in range(REQUESTS):  # from one t0, not from the first request of each shard
        assert abs(seen[number.to_bytes(16)] - number * 10 * MS) < MS


def test_a_shard_may_have_workers_too(tmp_path: Path, source: Path) -> None:
    with serve() as server:
        plan = planned(source, server, tmp_path / "run", shard=Shard(1, 2), workers=2)
        assert run_plan(plan).rows == len(plan) < REQUESTS
    assert {s.metadata["worker"] for s in open_tape(tmp_path / "run").segments} == {"s1w0", "s1w1"}
