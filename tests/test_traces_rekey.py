"""A tape for others: the prefixes of the first one, and none of its ids."""

import secrets
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tokentape.traces.check import check
from tokentape.traces.errors import TapeError, UsageError
from tokentape.traces.privacy import Privacy, load_key
from tokentape.traces.reader import open_tape
from tokentape.traces.rekey import DIGESTS, DROPPED, IDS, rekey
from tokentape.traces.wire import Prompt
from tokentape.traces.writer import TapeWriter

LISTS = ("block_hashes", "parents")
BEGINNING = b"You are a helpful assistant. " * 100


def new_key(path: Path) -> Path:
    path.write_bytes(secrets.token_bytes(32))
    return path


def prompts() -> list[bytes]:
    return [BEGINNING + bytes([n]) * 2000 + b"end" for n in (1, 1, 2)] + [b"other" * 900]


def written(tape: Path, key: Path) -> list[dict[str, Any]]:
    """A tape of four requests, some with common beginnings, under a key; its rows."""
    privacy = Privacy("structure", load_key(tape, key))
    facts = {"content": "structure", "key_id": privacy.key_id}
    writer = TapeWriter.create(tape, role="import", command=[], options={}, facts=facts)
    ids = [bytes([n]) * 16 for n in range(1, 5)]
    for n, prompt in enumerate(prompts()):
        row = {
            "request_id": ids[n],
            "arrival_ns": n,
            "end_ns": n,
            "outcome": "ok",
            "session_id": f"s{n // 2}",
            "parents": [ids[0]] if n == 1 else None,
            "endpoint": "/~0123456789abcdef/v1/completions",
            "tenant_digest": "0123456789abcdef",
            "trace_id": "t",
            "response_id": f"r{n}",
        }
        writer.append(row | privacy.blocks(Prompt(text=prompt)))
    writer.append_telemetry((1, 2, "s", "n", "{}", 3.0))
    writer.close()
    return list(open_tape(tape).read().to_pylist())


def shared(rows: list[dict[str, Any]]) -> list[int]:
    """Blocks that each two prompts begin with in common."""
    found = []
    for a, b in combinations([row["block_hashes"] for row in rows], 2):
        alike = [x == y for x, y in zip(a, b, strict=False)]
        found.append([*alike, False].index(False))
    return found


def values(rows: list[dict[str, Any]]) -> set[Any]:
    """Everything by which rows could be joined."""
    one = {row[name] for row in rows for name in (*DIGESTS, *DROPPED, *IDS, "endpoint")}
    return (one | {v for row in rows for name in LISTS for v in row[name] or ()}) - {None}


def test_a_rekeyed_tape_has_the_same_prefixes_and_nothing_to_join_by(tmp_path: Path) -> None:
    tape, keys = tmp_path / "a.tape", [new_key(tmp_path / f"k{n}") for n in range(2)]
    rows = written(tape, new_key(tmp_path / "own"))
    copies = []
    for n, key in enumerate([keys[0], keys[1], None, None]):
        out = tmp_path / f"copy{n}.tape"
        assert rekey(tape, out, key_file=key, command=[]) == len(rows)
        assert not [f for f in check(open_tape(out)) if f.severity == "error"]
        copies.append(list(open_tape(out).read().to_pylist()))
    assert max(shared(rows)) > 5
    assert 0 in shared(rows)
    seen = values(rows)
    for copy in copies:
        assert shared(copy) == shared(rows)
        assert not seen & values(copy)
        seen |= values(copy)
        changed = {*DIGESTS, *DROPPED, *IDS, *LISTS, "endpoint"}
        for before, after in zip(rows, copy, strict=True):
            assert {k for k in before if before[k] != after[k]} <= changed
        assert copy[1]["parents"] == [copy[0]["request_id"]]
        assert copy[0]["session_id"] == copy[1]["session_id"] != copy[2]["session_id"]
    tapes = [open_tape(t) for t in (tape, *(tmp_path / f"copy{n}.tape" for n in range(4)))]
    assert len({t.facts["tape_id"] for t in tapes}) == 5
    assert len({s.metadata["tape_id"] for t in tapes for s in t.segments}) == 5
    assert all(len(t.telemetry_files) == 1 for t in tapes)


def test_one_key_file_lets_the_prefixes_of_two_tapes_match(tmp_path: Path) -> None:
    key, other = new_key(tmp_path / "fleet"), new_key(tmp_path / "other")
    a, b, c = (
        [row["block_hashes"] for row in written(tmp_path / f"{n}.tape", k)]
        for n, k in (("a", key), ("b", key), ("c", other))
    )
    assert a == b
    assert not {h for row in a for h in row} & {h for row in c for h in row}


def test_what_cannot_be_rekeyed_is_refused(tmp_path: Path) -> None:
    tape, key = tmp_path / "a.tape", new_key(tmp_path / "k")
    written(tape, key)
    with pytest.raises(TapeError, match="choose another OUT"):
        rekey(tape, tape, key_file=None, command=[], force=True)
    with pytest.raises(UsageError, match="own key"):
        rekey(tape, tmp_path / "b.tape", key_file=key, command=[])
    assert not (tmp_path / "b.tape").exists()
