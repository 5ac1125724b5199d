"""What is sent before a run: apart from it, counted, and no more than was asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from replay_server import Script, Seen, Server, Step, engine_like, plain, serve
from tokentape.replay.asked import Asked
from tokentape.replay.options import ReplayOptions
from tokentape.replay.run import RunSummary, make_plan, run_plan
from tokentape.traces.errors import UsageError
from tokentape.traces.reader import Tape, open_tape
from tokentape.traces.writer import TapeWriter

MS = 1_000_000
BLOCK = {"block_tokens": 4, "block_unit": "token", "block_scope": "tape"}
# Before the window: two that go on from each other, and one by itself. In it: one that goes on
# from the long one, one from the short one, the one by itself again, and one that is new.
HASHES = [[1], [7, 8], [1, 2], [1, 2, 3], [1, 5], [7, 8], [9]]
OUTPUT = 3


def run(
    tmp_path: Path, script: Script = engine_like, rows: Sequence[Any] = HASHES, **changes: Any
) -> tuple[RunSummary, Tape, Server]:
    source = tmp_path / "s.tape"
    writer = TapeWriter.create(source, role="import", command=[], options={}, facts={})
    for n, hashes in enumerate(rows):
        row = BLOCK | {"request_id": n.to_bytes(16), "arrival_ns": n * 10 * MS}
        known = {"block_hashes": hashes, "input_tokens": 4 * len(hashes) + 2}
        writer.append(row | known | {"output_tokens": OUTPUT})
    writer.close()
    with serve(script) as server:
        wanted = ReplayOptions(source=source, to=server.url, tape=tmp_path / "r.tape", **changes)
        summary = run_plan(make_plan(wanted))
    return summary, open_tape(summary.tape), server


def prompts(server: Server, tokens: int, *, stream: bool) -> list[list[int]]:
    """The prompts of requests for so many tokens, in order."""
    posts = [s.json for s in server.seen if s.path.endswith("completions")]
    found = [p for p in posts if p["max_tokens"] == tokens and p["stream"] is stream]
    return [p["prompt"] for p in found]


def test_a_cache_is_primed_with_what_the_window_shares_with_what_came_before(
    tmp_path: Path,
) -> None:
    summary, tape, server = run(tmp_path, window=(30 * MS, None), prime_cache=True)
    new, short, alone, other = prompts(server, OUTPUT, stream=True)
    primed = prompts(server, 1, stream=False)
    assert sorted(primed) == sorted([new[:8], alone[:8]])  # [1] is in it; [7, 8] is whole
    assert short[:4] == new[:4] and short[4:8] != new[4:8] and other not in primed
    assert tape.rows == summary.rows == 4
    kept = tape.facts["beforehand"]["prefixes to prime the cache"]
    assert kept == {"requests": 2, "failed": {}}
    assert tape.facts["plan"]["prefixes_before"] == 2


def test_a_cache_is_not_primed_unasked(tmp_path: Path) -> None:
    _, tape, server = run(tmp_path, window=(30 * MS, None))
    assert prompts(server, 1, stream=False) == [] and "beforehand" not in tape.facts


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": (None, 30 * MS)},
        {"window": (30 * MS, None), "operators": Asked(loop_ns=10**9)},
    ],
)
def test_priming_needs_a_window_that_begins_within_the_tape(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=r"^--prime-cache: is for a --window that begins later"):
        run(tmp_path, prime_cache=True, **changes)


def test_requests_that_warm_up_have_prompts_of_nobody_and_no_row(tmp_path: Path) -> None:
    summary, tape, server = run(tmp_path, warm_up=9)
    sent = prompts(server, OUTPUT, stream=True)
    lengths = [4 * len(hashes) + 2 for hashes in HASHES]
    warm, kept = sent[:9], sent[9:]
    assert sorted(map(len, warm)) == sorted([*lengths, *lengths[:2]])
    assert [len(p) for p in kept] == lengths and tape.rows == summary.rows == 7
    assert not {p[0] for p in warm} & {p[0] for p in kept}
    assert tape.facts["beforehand"] == {"requests to warm up": {"requests": 9, "failed": {}}}
    assert "warm up" not in summary.verdict.text()


def test_what_fails_before_a_run_makes_it_suspect(tmp_path: Path) -> None:
    left = [2]

    def script(seen: Seen) -> Sequence[Step]:
        if seen.path.endswith("completions") and seen.json["max_tokens"] == OUTPUT and left[0]:
            left[0] -= 1
            return plain(503, {})
        return engine_like(seen)

    summary, _, _ = run(tmp_path, script, warm_up=4)
    assert "2 of 4 requests to warm up failed: 2 status 503" in summary.verdict.text()
    assert summary.verdict.level != "valid"
