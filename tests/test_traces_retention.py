"""What a tape keeps, by age and by room: the oldest goes first, every row that went counted."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxied import capturing, post, scripted, talk, until
from rows import make_tape, streamed_row
from tokentape.cli import units
from tokentape.traces.check import check
from tokentape.traces.errors import UsageError
from tokentape.traces.facts import changing, lock
from tokentape.traces.reader import open_tape
from tokentape.traces.recover import recover
from tokentape.traces.retention import YOUNGEST_S, Limits, Sealed, over, prune
from tokentape.traces.writer import TapeWriter

HOUR_S = 3600.0
CLOCK: dict[str, Any] = {"clock_id": "h/b/w0", "anchors": []}


def aged(path: Path, hours: list[int], **facts: Any) -> Path:
    """A tape with a segment of three requests for each of these ages."""
    make_tape(path, [], **facts)
    writer = TapeWriter(path, lock(path), CLOCK, "w0")
    for n, age in enumerate(hours):
        for m in range(3):
            writer.append(streamed_row(3 * n + m))
        writer.append_telemetry((n, n, "http://x", "load", "{}", 1.0))
        known = set(path.glob("**/*.parquet"))
        writer.seal()
        then = time.time_ns() - int(age * HOUR_S * 1e9)
        for file in set(path.glob("**/*.parquet")) - known:
            os.utime(file, ns=(then, then))
    writer.seen = 3 * len(hours)
    writer.close()
    return path


def balanced(path: Path, seen: int) -> None:
    tape = open_tape(path)
    assert [f for f in check(tape) if f.severity == "error"] == []
    assert sum(tape.facts["seen"].values()) == seen == tape.rows + tape.deleted


def test_what_is_too_old_goes_and_is_counted(tmp_path: Path) -> None:
    path, now = aged(tmp_path / "a.tape", [50, 30, 10, 0]), time.time_ns() / 1e9
    bodies = [path / "content" / f"w0-{n}.parquet" for n in range(2)]
    bodies[0].parent.mkdir()
    for hours, file in zip((50, 10), bodies, strict=True):
        file.write_bytes(b"sealed, and nobody here has the key")
        os.utime(file, (now - hours * HOUR_S,) * 2)
    assert prune(path, Limits(retain_s=100 * HOUR_S), now).files == 0
    assert prune(path, Limits(), now).files == 0
    gone = prune(path, Limits(retain_s=20 * HOUR_S), now)
    assert (gone.files, gone.rows) == (5, 6)
    assert [file.exists() for file in bodies] == [False, True]
    balanced(path, 12)
    assert "deleting" not in open_tape(path).facts
    gone = prune(path, Limits(retain_s=1.0), now)
    assert (gone.rows, open_tape(path).rows) == (3, 3)  # the last one is too young to go
    balanced(path, 12)
    recover(path)
    balanced(path, 12)


def test_what_is_too_much_goes_oldest_first(tmp_path: Path) -> None:
    path, now = aged(tmp_path / "a.tape", [5, 9, 7, 3]), time.time_ns() / 1e9
    files = sorted(path.glob("**/*.parquet"), key=lambda f: f.stat().st_mtime)
    total = sum(f.stat().st_size for f in files)
    room = total - files[0].stat().st_size  # the two of nine hours, and no other
    gone = prune(path, Limits(max_bytes=room), now)
    assert gone.bytes >= total - room and not set(files[2:]) - set(path.glob("**/*.parquet"))
    gone = prune(path, Limits(max_bytes=1), now)
    assert open_tape(path).segments == [] and open_tape(path).deleted == 12
    assert sorted(p.name for p in (path / "requests").iterdir()) == []
    balanced(path, 12)


def test_a_pass_that_died_before_it_had_deleted_is_finished_and_counted_once(
    tmp_path: Path,
) -> None:
    path, now = aged(tmp_path / "a.tape", [50, 30]), time.time_ns() / 1e9
    old = min(path.glob("requests/**/*.parquet"), key=lambda f: f.stat().st_mtime)
    with changing(path) as facts:  # as prune writes it before the first file goes
        facts["deleted"] = dict.fromkeys(facts["seen"], 3)
        facts["deleting"] = [str(old.relative_to(path))]
    assert prune(path, Limits(retain_s=40 * HOUR_S), now).rows == 0
    assert not old.exists()
    balanced(path, 6)


SIZES = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 10_000)), max_size=20)


@given(SIZES, st.none() | st.integers(1, 9_000), st.none() | st.integers(1, 1_500))
def test_what_stays_is_within_the_limits_or_young(
    files: list[tuple[int, int]], retain_s: int | None, max_bytes: int | None
) -> None:
    now = 20_000.0
    sealed = [Sealed(Path(str(n)), size, now - age) for n, (size, age) in enumerate(files)]
    doomed = over(sealed, Limits(retain_s, max_bytes), now)
    stay = [one for one in sealed if one not in doomed]
    old = [one for one in stay if now - one.sealed_unix_s >= YOUNGEST_S]
    assert all(now - one.sealed_unix_s >= YOUNGEST_S for one in doomed)
    if doomed and stay:
        youngest = max(one.sealed_unix_s for one in doomed)
        assert youngest <= min(one.sealed_unix_s for one in stay)
    if retain_s is not None:
        assert all(now - one.sealed_unix_s <= retain_s for one in old)
    if max_bytes is not None and old:
        assert sum(one.bytes for one in stay) <= max_bytes
    if doomed and retain_s is None and max_bytes is not None:
        assert sum(one.bytes for one in stay) + doomed[-1].bytes > max_bytes  # none too many


def test_a_capture_says_what_it_left_out_and_what_it_deleted(tmp_path: Path) -> None:
    def reply(connection: Any, _: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    options = ["--content", "none", "--retain", "1d", "--max-disk", "1GB"]
    options += ["--sample", "50%", "--session-header", "X-Chat", "--keep-slower", "ttft=9s"]
    with scripted(reply) as url:
        facts = {"content": "none", "key_id": None, "candidate": {"url": url}}
        path = aged(tmp_path / "a.tape", [30, 1], **facts)
        with capturing(url, path, *options) as proxy:
            until(lambda: open_tape(path).deleted == 3, "a pass")
            for n in range(30):
                request = post("/v1/completions", b"{}", f"X-Chat: {n // 2}")
                assert b"200 OK" in talk(proxy.host, proxy.port, request)
            said = proxy.stop()
    tape = open_tape(path)
    kept = [row for row in tape.read().to_pylist() if row["sample_prob"] is not None]
    assert f"30 requests seen, {len(kept)} rows, {30 - len(kept)} sampled out," in said
    assert "3 old rows deleted" in said
    assert [f for f in check(tape) if f.severity == "error"] == []
    assert (tape.rows, tape.deleted, tape.sampled_out) == (3 + len(kept), 3, 30 - len(kept))
    assert sum(tape.facts["seen"].values()) == 36
    assert {(row["sample_prob"], row["session_source"]) for row in kept} <= {(0.5, "header")}
    sessions = [row["session_id"] for row in kept]
    assert all(sessions.count(name) == 2 for name in sessions)


@pytest.mark.parametrize(
    "option", [("--retain", "7"), ("--max-disk", "100"), ("--max-disk", "0GB")]
)
def test_a_limit_without_its_unit_is_refused(option: tuple[str, str]) -> None:
    name, text = option
    with pytest.raises(UsageError, match=f"{name} {text}: need"):
        units.duration_ns(name, text) if name == "--retain" else units.size_bytes(name, text)
    assert units.size_bytes("--max-disk", "1.5GiB") == 3 << 29
    assert units.duration_ns("--retain", "7d") == 7 * 86_400 * 10**9
