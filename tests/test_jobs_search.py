"""capacity and sweep against real servers: what is kept, what ends them, and how it is said."""

import asyncio
import inspect
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from replay_server import Seen, Server, Step, engine_like, plain, serve
from test_docs import serving
from test_replay_run import source
from tokentape.analysis.slo import Slo
from tokentape.cli import asking, drive, search
from tokentape.cli.grammar import parse_and_call
from tokentape.jobs.capacity import Capacity, capacity
from tokentape.jobs.probes import Done, Probes, StoppedEarlyError
from tokentape.jobs.sweep import order, sweep
from tokentape.replay.idle import Idle
from tokentape.replay.run import Progress, ReplayOptions, make_plan
from tokentape.traces.errors import CannotKeepUp, GateNotMet, TapeError, TokentapeError
from tokentape.traces.facts import read_facts
from tokentape.traces.reader import open_tape

MS = 1_000_000
ONE, TWO = Fraction(1), Fraction(2)


class Heard:
    """Probes of a short tape, and what they said."""

    def __init__(self, folder: Path, to: str, **changed: Any) -> None:
        self.said: list[str] = []
        self.plans = 0
        self.watch: Callable[[Progress], None] = lambda _: None
        self.folder = folder
        rows = changed.pop("rows", [{}] * 10)
        if not (folder / "source.tape").exists():
            source(folder / "source.tape", rows)
        options = ReplayOptions(source=folder / "source.tape", to=to, **changed)
        self.probes = Probes(folder / "runs", options, self.said.append, self._watched, self._seen)
        self.probes.accept_invalid = True  # tests share their machine

    def _seen(self, _: object) -> None:
        self.plans += 1

    @contextmanager
    def _watched(self, _: int) -> Iterator[Callable[[Progress], None]]:
        yield self.watch

    def capacity(self, limit_ns: int, **ends: Fraction) -> Capacity:
        found = Capacity(attain=0.5)
        spans = {"first": ONE, "least": ONE, "most": TWO} | ends
        capacity(self.probes, [Slo("ttft", {"ttft": limit_ns})], found, tolerance=0.05, **spans)
        return found


def test_the_verbs_that_make_runs_ask_a_candidate_by_the_same_options() -> None:
    def options(verb: Callable[..., None]) -> dict[str, object]:
        return {name: p.annotation for name, p in inspect.signature(verb).parameters.items()}

    shared = {n for n, kind in options(drive.replay).items() if kind in vars(asking).values()}
    assert {"prompt", "tokenizer", "warm_up", "aborts", "map_model", "body"} <= shared
    for verb in (search.capacity, search.sweep):
        assert {n: options(verb).get(n) for n in shared} == {
            n: options(drive.replay)[n] for n in shared
        }


def test_a_sweep_by_command_asks_as_told_and_lets_no_session_hide_that_it_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six turns 20 ms apart, and a candidate that takes 60 ms for each."""
    before = [{"parents": [n.to_bytes(16)], "think_ns": 10 * MS} for n in range(5)]
    rows = [{}, *before]
    source(tmp_path / "source.tape", rows)

    def script(seen: Seen) -> Sequence[Step]:
        return (
            [0.06, *engine_like(seen)] if seen.path.endswith("completions") else engine_like(seen)
        )

    folder = tmp_path / "runs"
    with serve(script) as server:
        words = ["sweep", str(tmp_path / "source.tape"), "--to", server.url, "--speed", "1x"]
        words += ["--folder", str(folder), "--prompt", "text", "--warm-up", "2", "--aborts"]
        words += ["ignore", "--body", "priority=3", "--seed", "7", "--accept-invalid"]
        assert parse_and_call(words) == 0
        runs = [s for s in server.generations if s.json["priority"] == 3]
    assert len(runs) == 8 and all(" " in s.json["prompt"] for s in runs)  # two to warm up
    asked = read_facts(folder / "1x.tape")["options"]
    told = {"prompt": "text", "warm_up": 2, "aborts": "ignore", "seed": 7, "turns": "open"}
    assert {name: asked[name] for name in told} == told
    sent = open_tape(folder / "1x.tape").read().to_pylist()
    assert len(sent) == 6 and "predecessor" not in {row["late_cause"] for row in sent}
    capsys.readouterr()


def test_candidates_take_turns_at_each_speed() -> None:
    names = [name for name, _, _ in order(["http://a", "http://b"], [ONE, TWO], 2)]
    assert names == ["A-1x-1", "B-1x-1", "A-1x-2", "B-1x-2", "A-2x-1", "B-2x-1", "A-2x-2", "B-2x-2"]
    assert [name for name, _, _ in order(["http://a"], [Fraction(1, 2)], 1)] == ["0.5x"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Heard, Server, list[Done]]]:
    """Runs at 1x and 2x of one candidate."""
    with serve() as server:
        heard = Heard(tmp_path_factory.mktemp("swept"), server.url)
        done: list[Done] = []
        assert sweep(heard.probes, order([server.url], [ONE, TWO], 1), done) == []
        yield heard, server, done


def test_a_sweep_that_is_repeated_makes_no_run_twice_and_takes_none_of_other_options(
    swept: tuple[Heard, Server, list[Done]],
) -> None:
    heard, server, done = swept
    runs = order([server.url], [ONE, TWO], 1)
    assert [(d.name, d.requests, d.kept) for d in done] == [("1x", 10, False), ("2x", 10, False)]
    assert len(server.generations) == 20
    again: list[Done] = []
    sweep(heard.probes, runs, again)
    assert [d.kept for d in again] == [True, True] and len(server.generations) == 20
    other = Heard(heard.folder, server.url, model="other")
    with pytest.raises(TapeError, match="was made with another model; choose another --folder"):
        sweep(other.probes, runs, [])


def test_an_slo_that_every_speed_meets_and_one_that_none_meets_are_one_line_each(
    swept: tuple[Heard, Server, list[Done]],
) -> None:
    heard, server, _ = swept
    found = heard.capacity(60_000 * MS)
    assert found.answer().startswith("capacity: at least 2x, ")
    assert "! runs of 0.09 s: a server that falls behind slowly" in found.text()
    assert [j["speed"] for j in found.as_dict()["probes"]] == [1.0, 2.0]
    with pytest.raises(GateNotMet, match="capacity: none: the SLO is not met down to 1x"):
        heard.capacity(1)
    assert len(server.generations) == 20  # both searches found the runs of the sweep


def test_a_load_that_this_machine_cannot_offer_ends_the_search_with_what_is_known(
    tmp_path: Path,
) -> None:
    with serve() as server:
        heard = Heard(tmp_path, server.url, rows=[{"arrival_ns": n * MS} for n in range(9000)])
        with pytest.raises(
            CannotKeepUp, match=r"2000x: this machine cannot offer it: .*capacity: none"
        ):
            heard.capacity(60_000 * MS, first=Fraction(2000), most=Fraction(2000))
        assert server.generations == []


@pytest.mark.slow
def test_a_candidate_that_dies_ends_the_sweep_and_its_run_is_made_again(tmp_path: Path) -> None:
    alive = [True]

    def script(seen: Seen) -> Sequence[Step]:
        if seen.path.endswith("completions") and len(server.generations) > 15 and alive[0]:
            alive[0] = False
        return engine_like(seen) if alive[0] else [None]

    with serve(script) as server:
        heard = Heard(tmp_path, server.url)
        runs = order([server.url], [TWO, Fraction(4)], 1)
        done: list[Done] = []
        with pytest.raises(TokentapeError, match=r"the candidate died during 4x.tape .*repeat"):
            sweep(heard.probes, runs, done)
        assert [d.name for d in done] == ["2x"]
        assert read_facts(tmp_path / "runs" / "4x.tape")["run"]["candidate_died"] is True
    with serve() as server:
        revived = Heard(tmp_path, server.url)
        runs = order([server.url], [TWO, Fraction(4)], 1)
        done = []
        with pytest.raises(TapeError, match="another candidate"):  # it has another port
            sweep(revived.probes, runs, done)
        sweep(revived.probes, runs[1:], done)
    assert [d.tape.name for d in done] == ["4x-try2.tape"]


@pytest.mark.slow
def test_ctrl_c_keeps_the_runs_before_and_says_where_it_was(tmp_path: Path) -> None:
    rows = [{"arrival_ns": 0}, {"arrival_ns": 3_600_000 * MS}]
    with serve() as server:
        heard = Heard(tmp_path, server.url, rows=rows)
        heard.watch = lambda _: os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(StoppedEarlyError, match=r"1x\.tape"):
            heard.capacity(60_000 * MS)
    assert read_facts(tmp_path / "runs" / "1x.tape")["run"]["stopped"] is True


@pytest.mark.parametrize("pages", [True, False], ids=["metrics", "short requests"])
def test_a_busy_candidate_is_waited_for_by_what_it_says_or_by_how_fast_it_is(
    tmp_path: Path, *, pages: bool
) -> None:
    left = [0]

    def script(seen: Seen) -> Sequence[Step]:
        if seen.path == "/metrics":
            left[0] -= 1
            body = f"vllm:num_requests_waiting {max(0, left[0])}\n"
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n"
            return [(head + body).encode()] if pages else plain(404, {})
        wait = 0.1 if left[0] > 0 and not pages and seen.path.endswith("completions") else 0.0
        left[0] -= wait > 0
        return [wait, *engine_like(seen)]

    with serve(script) as server:
        options = ReplayOptions(source(tmp_path / "s.tape", [{}] * 3), server.url)
        idle = Idle(make_plan(options).target, timeout_s=30)
        told = "/metrics" if pages else "short requests"
        assert asyncio.run(idle.wait()) == told  # the first, which finds how fast it is
        left[0] = 3
        assert asyncio.run(idle.wait()) == told and left[0] <= 0
        left[0] = 1000
        idle.timeout_s = 0.1
        with pytest.raises(TokentapeError, match=r"not idle after 0 s .*--drain-timeout"):
            asyncio.run(idle.wait())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_capacity_of_an_engine_is_the_one_that_follows_from_its_profile(tmp_path: Path) -> None:
    # 8 seats, 50 steps of 10 ms each: 16 requests/s. Offered s x 8/s for T seconds, a request that
    # arrives at t waits (s / 2 - 1) t, and at most 5 % may wait for longer than the limit.
    profile = tmp_path / "engine.toml"
    profile.write_text(
        "step_ms = 10.0\nstep_ms_per_sequence = 0.0\nstep_ns_per_kv_token = 0.0\n"
        "step_jitter = 0.0\nprefill_tokens_per_s = 1e9\nfrontend_ms = 0.0\nmax_sequences = 8\n"
    )
    rows = [{"arrival_ns": n * 125 * MS, "output_tokens": 50} for n in range(200)]
    limit_s, lasting_s = 0.2, 6.0
    exact = 2 * (1 + limit_s / (0.95 * lasting_s))
    with serving(f"tokentape engine --profile {profile}", tmp_path) as engine:
        heard = Heard(tmp_path, engine, rows=rows)
        heard.probes.duration_ns = int(lasting_s * 1e9)
        found = Capacity(attain=0.95)
        ends = {"first": Fraction(1), "least": Fraction(1, 2), "most": Fraction(4)}
        slos = [Slo("ttft", {"ttft": int(limit_s * 1e9)})]
        capacity(heard.probes, slos, found, tolerance=0.05, **ends)
    low, high = found.bracket.interval()
    assert low is not None and high is not None
    assert low <= exact * 1.02 and exact * 0.95 <= high, found.text()
    assert found.bracket.met is not None and 1.85 <= found.bracket.met.speed <= exact * 1.02
