"""Prefix reuse that arrives: what a candidate's cache finds is what the trace shares, and no more.

The ideal is worked out here from the trace file itself, not by the code that plans.
"""

import json
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from tokentape.replay.asked import Asked
from tokentape.replay.options import ReplayOptions
from tokentape.replay.run import make_plan, run_plan
from tokentape.traces.importers import import_trace
from tokentape.traces.reader import open_tape

DATA = Path(__file__).parent.parent / ".." / "shared" / "data"
MOONCAKE = DATA / "mooncake" / "conversation_trace.jsonl"
BLOCK = 64  # of the candidate, tokens
SERVE = f"""
import sys
from tokentape.replay.engine.profile import Profile
from tokentape.replay.engine.server import serve
profile = Profile(
    frontend_ms=0.2, prefill_tokens_per_s=5e7, step_ms=0.5, step_ms_per_sequence=0.0,
    step_ns_per_kv_token=0.0, max_model_tokens=200_000, max_batched_tokens=1_000_000,
    kv_tokens=int(sys.argv[1]), block_tokens={BLOCK})
serve("127.0.0.1:0", profile, lambda url: print(url, flush=True))
"""
pytestmark = pytest.mark.skipif(not MOONCAKE.exists(), reason=f"{MOONCAKE} is not here")


@contextmanager
def candidate(kv_tokens: int) -> Iterator[str]:
    """The simulated engine with a cache that forgets nothing of so many tokens."""
    command = [sys.executable, "-c", SERVE, str(kv_tokens)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
            process.wait(timeout=20)


def counted(url: str) -> Counter[str]:
    """Prompt tokens looked up in the cache, and found there, so far."""
    with urllib.request.urlopen(f"{url}/metrics") as page:
        lines = page.read().decode().splitlines()
    names = ("prefix_cache_queries_total", "prefix_cache_hits_total")
    return Counter(
        {
            name: int(float(line.split()[-1]))
            for name in names
            for line in lines
            if line.startswith(f"vllm:{name}")
        }
    )


def hit_rate(url: str, source: Path, run: Path, **options: Any) -> float:
    """Of all prompt tokens of a replay."""
    plan = make_plan(ReplayOptions(source=source, to=url, tape=run, **options))
    probed = counted(url)  # what was asked to plan is not part of it
    done = run_plan(plan)
    assert done.outcomes == {"ok": len(plan)}
    found = counted(url) - probed
    queries, hits = (found[f"prefix_cache_{what}_total"] for what in ("queries", "hits"))
    assert queries == pytest.approx(plan.figures["input_tokens"], rel=1e-3)
    return float(hits / queries)


def ideal(rows: list[dict[str, Any]], of: list[bool] | None = None) -> float:
    """Share of the prompt tokens (`of` some rows) that a cache of BLOCK tokens finds.

    It forgets nothing.
    """
    seen: set[int] = set()
    hits = tokens = 0
    for row, counts in zip(rows, of or [True] * len(rows), strict=True):
        ids = row["hash_ids"]
        known = next((k for k, name in enumerate(ids) if name not in seen), len(ids))
        seen.update(ids)
        hits += counts * (min(512 * known, row["input_length"] - 1) // BLOCK * BLOCK)
        tokens += counts * row["input_length"]
    return float(hits / tokens)


def tape_of(rows: list[dict[str, Any]], folder: Path) -> Path:
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    import_trace("mooncake", [folder / "m.jsonl"], folder / "m")
    return folder / "m"


def trace() -> list[dict[str, Any]]:
    return [json.loads(line) for line in MOONCAKE.read_text().splitlines()]


def test_a_cache_that_forgets_nothing_finds_what_a_slice_shares_and_no_more_of_two_copies(
    tmp_path: Path,
) -> None:
    short = [r for r in trace() if r["input_length"] < 3000 and len(r["hash_ids"]) > 1]
    families = Counter(r["hash_ids"][1] for r in short)
    rows = [r | {"output_length": 3} for r in short if families[r["hash_ids"][1]] > 1][:60]
    source = tape_of(rows, tmp_path)
    with candidate(1_000_000) as url:
        once = hit_rate(url, source, tmp_path / "1", speed=Fraction(200))
        doubled = Asked(multiply=Fraction(2))
        twice = hit_rate(url, source, tmp_path / "2", speed=Fraction(200), operators=doubled)
    run = open_tape(tmp_path / "2").read().to_pylist()
    assert len({(r["source_request_id"], r["copy_index"]) for r in run}) == len(run) == 120
    names = [{h for r in run if r["copy_index"] == k for h in r["block_hashes"]} for k in (0, 1)]
    assert len(names[0]) == len(names[1]) and not names[0] & names[1]
    assert ideal(rows) > 0.4  # they share a lot
    assert once == pytest.approx(ideal(rows), abs=0.01)
    assert twice == pytest.approx(ideal(rows), abs=0.01)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_window_has_the_hits_of_its_history_where_the_cache_is_primed_and_run_2_those_of_run_1(
    tmp_path: Path,
) -> None:
    short = [r for r in trace() if r["input_length"] < 3000 and len(r["hash_ids"]) > 1]
    families = Counter(r["hash_ids"][1] for r in short)
    rows = [r | {"output_length": 3} for r in short if families[r["hash_ids"][1]] > 1][:60]
    begins = next(r["timestamp"] for r in rows[30:] if r["timestamp"] > rows[29]["timestamp"])
    source = tape_of(rows, tmp_path)
    window = ((begins - rows[0]["timestamp"]) * 1_000_000, None)

    def hits(name: str, *, prime_cache: bool) -> float:
        to: Any = {"to": url, "tape": tmp_path / name, "speed": Fraction(200)}
        wanted = ReplayOptions(source=source, window=window, prime_cache=prime_cache, **to)
        run_plan(make_plan(wanted))
        run = open_tape(tmp_path / name).read(["cached_tokens", "input_tokens"])
        return float(sum(run["cached_tokens"].to_pylist()) / sum(run["input_tokens"].to_pylist()))

    with candidate(1_000_000) as url:
        cold, again = (hits(f"cold {n}", prime_cache=False) for n in range(2))
        primed, again_primed = (hits(f"primed {n}", prime_cache=True) for n in range(2))
    inside = [r["timestamp"] >= begins for r in rows]
    with_history = ideal(rows, inside)
    without = ideal([r for r, kept in zip(rows, inside, strict=True) if kept])
    assert with_history > without + 0.05  # there is something to prime
    assert (cold, again) == pytest.approx((without, without), abs=0.01)
    assert (primed, again_primed) == pytest.approx((with_history, with_history), abs=0.01)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_first_minute_of_mooncake_at_1x_reaches_the_hit_rate_of_the_trace(
    tmp_path: Path,
) -> None:
    rows = [r for r in trace() if r["timestamp"] < 60_000]
    with candidate(4_000_000) as url:
        found = hit_rate(url, tape_of(rows, tmp_path), tmp_path / "run")
    assert found == pytest.approx(ideal(rows), abs=0.01)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("minutes", "speed", "copies"), [(60, 10, 1), (15, 5, 2)])
def test_the_mooncake_trace_reaches_its_own_hit_rate_and_two_copies_do_not_raise_it(
    tmp_path: Path, minutes: int, speed: int, copies: int
) -> None:
    rows = [r for r in trace() if r["timestamp"] < 60_000 * minutes]
    asked = Asked(multiply=Fraction(copies))
    with candidate(copies * 160_000_000) as url:
        source = tape_of(rows, tmp_path)
        found = hit_rate(url, source, tmp_path / "run", speed=Fraction(speed), operators=asked)
    assert found == pytest.approx(ideal(rows), abs=0.01)
