"""RAGPulse traces: string seconds, parts of known length laid end to end become blocks."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokentape.traces.errors import TapeError
from tokentape.traces.importers import ImportSummary, import_trace
from tokentape.traces.importers.ragpulse import TABLES, Parts
from tokentape.traces.reader import open_tape

REAL = Path(__file__).parents[2] / "shared/data/ragpulse"
KINDS = ("sys_prompt", "passages_ids", "history", "web_search", "user_input")
LENGTHS = {1: 64, 2: 30, 3: 100, 4: 34, 5: 64}


def row(t_s: str, *parts: int, n_in: int = 300, session: str = "s1") -> str:
    ids: dict[str, list[int]] = {kind: [] for kind in KINDS} | {"sys_prompt": list(parts)}
    record = {"timestamp": t_s, "input_length": n_in, "output_length": 5, "hash_ids": ids}
    return json.dumps(record | {"session_id": session})


def imported(
    folder: Path, *lines: str, lengths: dict[int, int] | None = None, end: str = "\n\n"
) -> tuple[ImportSummary, list[dict[str, Any]]]:
    path = folder / "0_trace.jsonl"
    path.write_text("\n".join(lines) + end)
    for name, key in TABLES.items() if lengths else ():
        table = [{key: part, "token_length": n} for part, n in (lengths or {}).items()]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, table)))
    summary = import_trace("ragpulse", [path], folder / "r.tape", force=True)
    return summary, open_tape(summary.tape).read().to_pylist()


def test_text_seconds_one_inversion_and_a_blank_last_line_are_read(tmp_path: Path) -> None:
    summary, rows = imported(tmp_path, row("82"), row("93", session="s2"), row("90"))
    assert (summary.read, summary.written, summary.dropped) == (3, 3, {})
    assert [r["arrival_ns"] for r in rows] == [0, 8 * 10**9, 11 * 10**9]
    assert [(r["session_id"], r["turn_index"]) for r in rows] == [("s1", 0), ("s1", 1), ("s2", 0)]
    assert open_tape(summary.tape).facts["arrival_resolution_ns"] == 3 * 10**9


def test_without_the_tables_no_prefix_is_known(tmp_path: Path) -> None:
    summary, (one,) = imported(tmp_path, row("82", 1, 2))
    assert (one["block_hashes"], one["block_tokens"]) == (None, None)
    (file,) = open_tape(summary.tape).facts["source"]["files"]
    assert file["rows_without_prefix"] == 1
    assert "companions" not in file


def test_parts_become_blocks_and_the_tables_digests_are_kept(tmp_path: Path) -> None:
    summary, (one, other) = imported(
        tmp_path, row("82", 1, 2, 3, 4), row("83", 1, 2, 4, 3), lengths=LENGTHS
    )
    assert [len(r["block_hashes"]) for r in (one, other)] == [3, 3]
    assert one["block_hashes"][0] == other["block_hashes"][0]
    assert one["block_hashes"][1] != other["block_hashes"][1]
    assert one["block_hashes"][2] != other["block_hashes"][2], "a hash stands for all before it"
    assert one["prefix_partial"] == 300 - 3 * 64
    (file,) = open_tape(summary.tape).facts["source"]["files"]
    assert sorted(file["companions"]) == [f"{name}.jsonl" for name in sorted(TABLES)]


def test_parts_longer_than_the_input_or_without_a_length_are_no_prefix(tmp_path: Path) -> None:
    _, rows = imported(tmp_path, row("1", 1, n_in=9), row("2", 99), lengths=LENGTHS)
    assert [r["block_hashes"] for r in rows] == [None, None]


def tokens_of(parts: list[int]) -> Iterator[tuple[int, int]]:
    for part in parts:
        yield from ((part, at) for at in range(LENGTHS[part]))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(list(LENGTHS)), max_size=8), st.data())
def test_two_prompts_share_a_block_exactly_when_they_share_its_tokens(
    parts: list[int], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(parts)))
    other = parts[:cut] + data.draw(st.lists(st.sampled_from(list(LENGTHS)), max_size=4))
    table = Parts(LENGTHS)
    lists = [table.blocks(ids, 10_000) or [] for ids in (parts, other)]
    prompts = [list(tokens_of(ids)) for ids in (parts, other)]
    for number, pair in enumerate(zip(*lists, strict=False), 1):
        alike = prompts[0][: number * 64] == prompts[1][: number * 64]
        assert (pair[0] == pair[1]) == alike
    assert [len(hashes) for hashes in lists] == [len(prompt) // 64 for prompt in prompts]


@pytest.mark.parametrize("text", ["8.5", "-1", "", "1757476916", "12s"])
def test_a_time_that_is_no_whole_second_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(TapeError, match=r"line 2: timestamp is .*, not whole seconds"):
        imported(tmp_path, row("1"), row(text))


def test_the_first_3000_real_rows_are_imported_whole(tmp_path: Path) -> None:
    if not REAL.exists():
        pytest.skip("the RAGPulse trace is not beside this checkout")
    summary = import_trace("ragpulse", [REAL], tmp_path / "r.tape")
    assert (summary.read, summary.written, summary.dropped) == (3_000, 3_000, {})
    tape = open_tape(summary.tape)
    (file,) = tape.facts["source"]["files"]
    assert file["rows_without_prefix"] == 0
    rows = tape.read().to_pylist()
    assert tape.facts["wall_epoch_unix_ns"] == 82 * 10**9
    assert rows[-1]["arrival_ns"] == (444_754 - 82) * 10**9
    assert len({r["session_id"] for r in rows}) == 1_763
    assert all(r["prefix_partial"] + 64 * len(r["block_hashes"]) == r["input_tokens"] for r in rows)
    assert all(6 <= r["prefix_partial"] < 64 + 12 for r in rows)
    seen: set[int] = set()
    hits = 0
    for r in rows:
        hits += sum(i in seen for i in r["block_hashes"])
        seen.update(r["block_hashes"])
    assert 0.1 < hits / sum(len(r["block_hashes"]) for r in rows) < 0.9
