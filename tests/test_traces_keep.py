"""Sampling: whole sessions, errors and slow ones beside them, weights that are right, books too."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import fill
from tokentape.traces import assemble, blocks, journal, writer_process
from tokentape.traces.check import check
from tokentape.traces.clock import TapeClock
from tokentape.traces.keep import Keep
from tokentape.traces.prepare import make_ready
from tokentape.traces.privacy import Privacy
from tokentape.traces.reader import open_tape
from tokentape.traces.recording import Recorder
from tokentape.traces.recover import recover, replay_journal
from tokentape.traces.writer import TapeWriter

MS, SECOND = 1_000_000, 1_000_000_000
SSE = [(b"content-type", b"text/event-stream")]
KEY = b"k" * 32
CHAT = b"/v1/chat/completions"


def asked(*texts: str) -> bytes:
    """The body of a turn: what the user said, and an answer between."""
    messages = [{"role": "user", "content": texts[0]}]
    for text in texts[1:]:
        messages += [{"role": "assistant", "content": "so"}, {"role": "user", "content": text}]
    return json.dumps({"model": "m", "stream": True, "messages": messages}).encode()


def event(text: str) -> bytes:
    return b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n' % text.encode()


class Kept:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.out: list[dict[str, Any]] = []

    def opened(self, stream: int, row: dict[str, Any]) -> None:
        """Not asked here."""

    def learned(self, stream: int, columns: dict[str, Any]) -> None:
        """Not asked here."""

    def finished(self, stream: int, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def bodies(self, row: dict[str, Any]) -> None:
        raise AssertionError("the mode structure has no bodies")

    def left_out(self, stream: int, row: dict[str, Any]) -> None:
        self.out.append(row)

    def sampled(self, samples: list[Any]) -> None:
        """Not asked here."""


class Traffic:
    """Requests through one assembler."""

    def __init__(self, keep: Keep, key: bytes = KEY, headers: tuple[bytes, ...] = ()) -> None:
        self.sink = Kept()
        clock = TapeClock.start(0, "w0")
        privacy = Privacy("structure", key)
        self.assembler = assemble.Assembler(clock, privacy, self.sink, keep, headers)
        self._streams = 0

    def ask(
        self,
        body: bytes,
        at_ns: int,
        *,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        first_ms: int = 1,
        end_ms: int = 2,
        outcome: str = "ok",
    ) -> bool:
        """Whether the request got a row."""
        self._streams += 1
        pack, ended = msgspec.msgpack.encode, {"outcome": outcome, "send_ns": at_ns}
        records = [
            (blocks.OPEN, at_ns, pack([{}, [b"POST", CHAT, list(headers)]])),
            (blocks.REQUEST_BODY, at_ns, body),
            (blocks.MARK, at_ns, b"request_end_ns"),
            (blocks.REPLY_HEAD, at_ns, pack([200, SSE])),
            (blocks.REPLY_DATA, at_ns + first_ms * MS, event("a")),
            (blocks.REPLY_DATA, at_ns + end_ms * MS, event("b") + b"data: [DONE]\n\n"),
            (blocks.CLOSE, at_ns + end_ms * MS, pack(ended)),
        ]
        head = blocks.RECORD
        block = b"".join(
            head.pack(kind, self._streams, t_ns, blocks.NO_STAMP, len(payload)) + payload
            for kind, t_ns, payload in records
        )
        before = len(self.sink.rows)
        self.assembler.take(memoryview(block))
        return len(self.sink.rows) > before


TURN = st.tuples(
    st.integers(0, 5),  # which session
    st.sampled_from(["ok", "ok", "ok", "client_abort", "http_error", "cut"]),
    st.sampled_from([1, 1, 1, 6_000]),  # ms to the first token
)


@settings(max_examples=60)
@given(st.lists(TURN, max_size=30), st.sampled_from(["header", "prompt"]), st.integers(1, 99))
def test_every_request_is_a_row_or_counted_and_sessions_are_kept_whole(
    turns: list[tuple[int, str, int]], named_by: str, percent: int
) -> None:
    share = percent / 100
    traffic, told = Traffic(Keep(share)), dict[int, list[str]]()
    always = 0
    for number, (session, outcome, first_ms) in enumerate(turns):
        said = told.setdefault(session, [f"session {session}"])
        names = ((b"x-session-id", b"%d" % session),) if named_by == "header" else ()
        slow = first_ms > 5_000
        always += slow or outcome in ("http_error", "cut")
        traffic.ask(
            asked(*said) if named_by == "prompt" else asked(str(number)),
            number * 10 * SECOND,
            headers=names,
            first_ms=first_ms,
            end_ms=first_ms + 1,
            outcome=outcome,
        )
        if outcome == "ok" and named_by == "prompt":
            said.append(f"turn {number}")
    rows, out = traffic.sink.rows, traffic.sink.out
    assert traffic.assembler.seen == len(turns) == len(rows) + len(out)
    assert traffic.assembler.sampled_out == len(out)
    assert always == sum(row["sample_prob"] == 1 for row in rows)
    drawn = {row["session_id"] for row in rows if row["sample_reason"] == "session"}
    assert not drawn & {row["session_id"] for row in out}  # no session is drawn in part
    for row in rows:
        assert (row["session_id"] in drawn) == (row["sample_reason"] == "session")
        slow = row["first_content_ns"] - row["arrival_ns"] > 5 * SECOND
        failed = row["outcome"] not in ("ok", "client_abort")
        assert row["sample_prob"] == (1 if slow or failed else share)


def test_turns_on_other_workers_and_after_a_restart_share_the_decision_of_their_session() -> None:
    keep, kept = Keep(0.5), 0
    workers = [Traffic(keep) for _ in range(3)]
    for n in range(40):
        turns = [f"conversation {n}"]
        decided = set()
        for worker in workers:  # none of which has seen the turn before
            decided.add(worker.ask(asked(*turns), n * SECOND))
            turns.append("and then?")
        assert len(decided) == 1, turns
        kept += decided.pop()
    assert 10 <= kept <= 30  # the key is fixed: no chance in it
    names = [(b"x-session-id", b"s%d" % n) for n in range(40)]
    one, two, other_key = (
        [t.ask(asked("hi"), n * SECOND, headers=(name,)) for n, name in enumerate(names)]
        for t in (Traffic(keep), Traffic(keep), Traffic(keep, b"x" * 32))
    )
    assert one == two != other_key


def test_a_header_of_the_users_own_names_the_session_before_the_known_ones() -> None:
    traffic = Traffic(Keep(1.0), headers=(b"x-chat",))
    for name in (b"a", b"a", b"b"):
        headers = ((b"X-Session-Id", b"same"), (b"X-Chat", name))
        assert traffic.ask(asked("hi"), 0, headers=headers)
    one, two, three = (row["session_id"] for row in traffic.sink.rows)
    assert one == two != three


# A population: sessions of 1 to 8 turns, a tenth of the requests slow, some failed, long outputs
# where they are slow: the case in which a wrong weight shows.
SESSIONS, SHARE, SEEDS = 300, 0.1, 80


def population() -> list[tuple[int, dict[str, Any]]]:
    rng, rows = np.random.default_rng(7), []
    for session in range(SESSIONS):
        for _ in range(int(rng.integers(1, 9))):
            slow, failed = rng.random() < 0.1, rng.random() < 0.05
            row = {"outcome": "http_error" if failed else "ok", "arrival_ns": 0, "stream": True}
            row |= {"first_content_ns": (9 if slow else 1) * SECOND, "end_ns": 10 * SECOND}
            row["output_tokens"] = int(rng.integers(500, 900) if slow else rng.integers(1, 100))
            rows.append((session, row))
    return rows


def test_weighted_counts_and_tokens_are_unbiased_over_keys() -> None:
    rows, keep = population(), Keep(SHARE)
    estimates = []
    for seed in range(SEEDS):
        privacy = Privacy("structure", seed.to_bytes(32))
        found = np.zeros(2)
        for session, row in rows:
            draw = int(privacy.digest(b"%d" % session, "session"), 16)
            kept = keep.judge(draw, row)
            if kept is not None:
                found += np.array([1, row["output_tokens"]]) / kept["sample_prob"]
        estimates.append(found)
    ordinary = np.zeros((SESSIONS, 2))
    for session, row in rows:
        if row["outcome"] == "ok" and row["first_content_ns"] < 5 * SECOND:
            ordinary[session] += [1, row["output_tokens"]]
    truth = np.array([len(rows), sum(row["output_tokens"] for _, row in rows)])
    # Horvitz and Thompson: sessions are drawn independently, the rest is certain.
    variance = (ordinary**2).sum(axis=0) * (1 - SHARE) / SHARE
    error = np.mean(estimates, axis=0) - truth
    assert (np.abs(error) < 3.5 * np.sqrt(variance / SEEDS)).all(), (error, truth)
    assert (np.std(estimates, axis=0) / np.sqrt(variance) > 0.6).all()
    assert (np.std(estimates, axis=0) / np.sqrt(variance) < 1.4).all()


def test_sql_weighs_what_was_kept_for_being_slow_once_and_what_was_drawn_by_its_share(
    tmp_path: Path,
) -> None:
    traffic = Traffic(Keep(0.25))
    tokens = 0
    for n in range(120):
        first_ms = 6_000 if n % 10 == 0 else 1
        traffic.ask(asked(f"q{n}"), n * SECOND, first_ms=first_ms, end_ms=first_ms + 1)
        tokens += 2
    writer = TapeWriter.create(
        tmp_path / "a.tape", role="capture", command=[], options={}, facts={}
    )
    writer.seen, writer.sampled_out = 120, traffic.assembler.sampled_out
    for row in traffic.sink.rows:
        writer.append(row)
    writer.close()
    tape = open_tape(tmp_path / "a.tape")
    assert check(tape) == []
    slow = sum(row["sample_prob"] == 1 for row in traffic.sink.rows)
    ordinary = len(traffic.sink.rows) - slow
    assert slow == 12 and 0 < ordinary < 108
    query = "SELECT estimated_requests FROM outcomes WHERE outcome = 'ok'"
    assert tape.sql(query).fetchall() == [(slow + 4 * ordinary,)]
    query = "SELECT sampled, sampled_out_requests, sealed_requests FROM tapes"
    assert tape.sql(query).fetchall() == [(True, 120 - slow - ordinary, slow + ordinary)]


# -- the real writer process ------------------------------------------------------------------


def recorder(tape: Path, keep: Keep) -> Recorder:
    lock_fd = make_ready(tape, role="capture", command=[], options={}, facts={}, append=True)
    hello = {"worker": "w0", "content": "structure", "key": KEY.hex(), "fsync": False}
    return Recorder(tape, lock_fd, hello | {"keep": keep.as_dict()}, lambda _: None)


def send(to: Recorder, number: int, *, close: bool = True) -> None:
    now = time.monotonic_ns()
    name = [(b"x-session-id", b"%d" % (number // 3))]
    stream = to.open(now, {"arrival_ns": now}, (b"POST", CHAT, name))
    to.request_body(stream, now, asked("hi"))
    to.mark(stream, "request_end_ns", now)
    to.mark(stream, "send_ns", now)
    to.reply_head(stream, now, 200, SSE)
    to.reply_data(stream, now + MS, event("a"))
    outcome = "upstream_abort" if number % 20 == 0 else "ok"
    if close:
        to.close(stream, now + 2 * MS, {"outcome": outcome, "send_ns": now})


def journaled(tape: Path, to: Recorder, requests: int) -> None:
    deadline = time.monotonic() + 20
    while True:
        to.flush()
        left = [replay_journal(file) for _, file in journal.leftovers(tape)]
        if left and left[-1].seen >= requests:
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def test_killing_the_writer_keeps_the_counts_of_what_was_left_out(tmp_path: Path) -> None:
    tape = tmp_path / "a.tape"
    to = recorder(tape, Keep(0.3))
    for number in range(90):
        if number == 40:
            journaled(tape, to, number)
            os.kill(to._life.process.pid, signal.SIGKILL)
            to._life.process.wait()
        send(to, number)
        to.flush()
    summary = to.finish()
    assert (summary.seen, summary.losses) == (90, {})
    assert summary.rows + summary.sampled_out == 90
    assert 30 < summary.sampled_out < 80
    opened = open_tape(tape)
    assert [f for f in check(opened) if f.severity == "error"] == []
    assert (opened.rows, opened.sampled_out) == (summary.rows, summary.sampled_out)
    assert sum(opened.facts["seen"].values()) == 90
    whole = Traffic(Keep(0.3))
    for number in range(90):
        name = (b"x-session-id", b"%d" % (number // 3))
        whole.ask(asked("hi"), 0, headers=(name,), outcome="cut" if number % 20 == 0 else "ok")
    assert len(whole.sink.out) == summary.sampled_out  # nobody was decided on twice


def test_killing_everything_keeps_the_counts_too(tmp_path: Path) -> None:
    tape = tmp_path / "a.tape"
    to = recorder(tape, Keep(0.3))
    for number in range(50):
        send(to, number)
    send(to, 50, close=False)
    journaled(tape, to, 51)
    os.kill(to._life.process.pid, signal.SIGKILL)
    to._life.bury()
    os.close(to._lock_fd)
    done = recover(tape)
    opened = open_tape(tape)
    assert [f for f in check(opened) if f.severity == "error"] == []
    assert done.sampled_out == opened.sampled_out > 10
    assert sum(opened.facts["seen"].values()) == 51 == opened.rows + opened.sampled_out
    (cut,) = [row for row in opened.read().to_pylist() if row["outcome"] == "cut"]
    assert (cut["sample_prob"], cut["sample_reason"]) == (1, "error")


def test_events_of_what_is_left_out_go_with_the_next_seal_even_if_nothing_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_process, "SEAL_EVERY_S", 0.0)
    tape = tmp_path / "a.tape"
    lock_fd = make_ready(tape, role="capture", command=[], options={}, facts={})
    clock = TapeClock.start(0, "w0")
    writer = TapeWriter(tape, lock_fd, clock.footer(), "w0")
    hot, theirs, memory_fd = blocks.channel_pair()
    sink = writer_process.TapeSink(writer, hot, fsync=False, estate=None)
    traffic = Traffic(Keep(1e-9))
    traffic.assembler._sink = sink
    sink.attach(traffic.assembler)
    sizes = []
    for n in range(3):
        for m in range(20):
            assert not traffic.ask(asked(f"{n} {m}"), SECOND)
        sink.checkpoint(n + 1)
        (file,) = (tape / "journal").glob("*.journal")
        sizes.append(file.stat().st_size)
    assert sizes[0] == sizes[1] == sizes[2] < 1_000
    assert replay_journal(file).sampled_out == 60
    assert list((tape / "requests").glob("**/*.parquet")) == []
    theirs.close()
    hot.close()
    os.close(memory_fd)
    os.close(lock_fd)


def test_on_a_full_disk_what_was_left_out_is_not_lost(small_disk: Path) -> None:
    tape = small_disk / "a.tape"
    to = recorder(tape, Keep(0.3))
    for number in range(20):
        send(to, number)
    journaled(tape, to, 20)
    filler = fill(small_disk)
    for number in range(20, 50):
        send(to, number)
    summary = to.finish()
    assert summary.seen == 50 and 10 < summary.sampled_out < 45
    assert summary.unsealed + summary.sampled_out + summary.losses["disk_full"] == 50
    filler.unlink()
    recover(tape)
    opened = open_tape(tape)
    assert [f for f in check(opened) if f.severity == "error"] == []
    assert opened.sampled_out == summary.sampled_out
    assert opened.rows + opened.sampled_out + sum(opened.losses.values()) == 50
