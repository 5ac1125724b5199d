"""A replay from tape to tape: what was planned is what was sent, recorded and judged."""

import json
import os
import signal
import threading
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

from replay_server import (
    HEAD,
    Script,
    Seen,
    Server,
    Step,
    engine_like,
    event,
    plain,
    serve,
    streamed,
)
from tokentape.cli.drive import standing
from tokentape.replay.options import ReplayOptions
from tokentape.replay.run import Progress, RunSummary, make_plan, run_plan
from tokentape.traces.errors import TokentapeError, UsageError
from tokentape.traces.reader import Tape, open_tape
from tokentape.traces.writer import TapeWriter

MS = 1_000_000
SECRETS = ("sk-key-0123456789", "hv-header-0123456789", "pw-url-0123456789")


def source(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    writer = TapeWriter.create(path, role="import", command=[], options={}, facts={})
    for number, row in enumerate(rows):
        known = {"request_id": number.to_bytes(16), "arrival_ns": number * 20 * MS}
        writer.append(known | {"input_tokens": 20 + number, "output_tokens": 3} | row)
    writer.close()
    return path


def replay(
    tmp_path: Path, rows: Sequence[dict[str, Any]], script: Script = engine_like, **changes: Any
) -> tuple[RunSummary, Tape, Server]:
    with serve(script) as server:
        wanted: dict[str, Any] = {
            "source": source(tmp_path / "source.tape", rows),
            "to": server.url,
            "tape": tmp_path / "run.tape",
        }
        plan = make_plan(ReplayOptions(**(wanted | changes)))
        summary = run_plan(plan)
    return summary, open_tape(summary.tape), server


def shape(tape: Tape) -> list[tuple[int, int, int]]:
    """Arrival after the first one, input and output tokens of every request."""
    rows = tape.read(["arrival_ns", "input_tokens", "output_tokens"]).to_pylist()
    first = rows[0]["arrival_ns"]
    return [(r["arrival_ns"] - first, r["input_tokens"], r["output_tokens"]) for r in rows]


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunSummary, Tape, Server]:
    """One run of 30 requests at 2x."""
    folder = tmp_path_factory.mktemp("plain")
    return replay(folder, [{}] * 30, speed=Fraction(2), facts={"gpu": "H100"})


def test_a_run_is_a_tape_with_one_row_for_each_request_of_the_plan(
    plain_run: tuple[RunSummary, Tape, Server],
) -> None:
    summary, tape, server = plain_run
    assert (summary.rows, summary.sent, summary.not_sent) == (30, 30, 0)
    assert summary.outcomes == {"ok": 30} and summary.losses == {}
    assert tape.role == "replay" and tape.rows == 30 and tape.unsealed_rows == 0
    rows = tape.read().to_pylist()
    first = rows[0]["arrival_ns"]
    for number, row in enumerate(rows):
        assert row["scheduled_ns"] == row["arrival_ns"] == first + number * 10 * MS
        assert row["source_request_id"].bytes == number.to_bytes(16)
        assert row["outcome"] == "ok" and row["origin"] == "upstream"
        assert row["wire_format"] == "openai.completions" and row["stream"] is True
        assert row["planned_input_tokens"] == row["input_tokens"] == 20 + number
        assert row["planned_output_tokens"] == row["output_tokens"] == len(row["off_us"]) == 3
        assert row["model_requested"] == row["model"] == "m"
        assert row["event_clock"] == row["send_clock"] == "kernel"
        assert row["arrival_ns"] <= row["send_ns"] <= row["send_end_ns"]
        assert row["send_end_ns"] <= row["response_headers_ns"] <= row["first_content_ns"]
        assert row["first_content_ns"] <= row["last_content_ns"] <= row["end_ns"]
    bodies = sorted(server.generations, key=lambda s: len(s.json["prompt"]))
    assert [r["prompt_bytes"] for r in rows] == [len(b.body) for b in bodies]


def test_what_was_planned_sent_and_judged_stands_in_tape_json(
    plain_run: tuple[RunSummary, Tape, Server],
) -> None:
    summary, tape, server = plain_run
    facts = tape.facts
    assert facts["candidate"]["url"] == server.url + "/v1"
    assert facts["candidate"]["gpu"] == "H100" and facts["candidate"]["model"] == "m"
    assert facts["plan"]["requests"] == 30 and facts["plan"]["turns"] == "open"
    assert facts["source"]["tape_id"] == open_tape(facts["source"]["path"]).facts["tape_id"]
    assert facts["run"]["sent"] == 30 and facts["run"]["health"]["ticks"] > 0
    assert facts["verdict"] == json.loads(json.dumps(summary.verdict.as_dict()))
    assert facts["verdict"]["input_match"]["matched"] == 30
    assert facts["verdict"]["output_match"]["matched"] == 30


def test_a_run_can_be_replayed_itself(
    tmp_path: Path, plain_run: tuple[RunSummary, Tape, Server]
) -> None:
    _, first, _ = plain_run
    with serve() as server:
        plan = make_plan(ReplayOptions(source=first.path, to=server.url, tape=tmp_path / "again"))
        assert run_plan(plan).outcomes == {"ok": 30}
    assert shape(open_tape(tmp_path / "again")) == shape(first)


def test_chat_takes_the_template_into_account_and_counts_what_is_too_short(tmp_path: Path) -> None:
    def script(seen: Seen) -> Sequence[Step]:
        if seen.path.endswith("/models"):
            return plain(200, {"data": [{"id": "m"}]})
        return streamed(seen, extra_prompt_tokens=25)

    rows = [{"operation": "chat"} for _ in range(10)]
    summary, tape, _ = replay(tmp_path, rows, script)
    match = summary.verdict.figures["input_match"]
    assert match == {"matched": 4, "counted": 4, "exceptions": 6, "unknown": 0}
    read = tape.read(["input_tokens", "planned_input_tokens", "wire_format"]).to_pylist()
    assert [r["input_tokens"] for r in read] == [26] * 6 + [26, 27, 28, 29]
    assert {r["wire_format"] for r in read} == {"openai.chat"}


def test_every_kind_of_failure_is_a_row_with_its_outcome(tmp_path: Path) -> None:
    def script(seen: Seen) -> Sequence[Step]:
        if seen.path.endswith("/models") or seen.json["max_tokens"] == 1:
            return engine_like(seen)
        error = event({"error": {"code": 1}})
        kinds: dict[int, Sequence[Step]] = {
            3: streamed(seen),
            4: plain(503, {"error": {"message": "busy"}}),
            5: [HEAD, error, b"0\r\n\r\n"],
            6: [None],
            7: [*streamed(seen)[:3], 30.0],
        }
        return kinds[int(seen.json["max_tokens"])]

    rows = [{"output_tokens": 3 + n} for n in range(5)]
    summary, tape, _ = replay(tmp_path, rows, script, timeout_ns=1000 * MS)
    outcomes = tape.read(["outcome"])["outcome"].to_pylist()
    assert outcomes == ["ok", "http_error", "stream_error", "upstream_abort", "timeout"]
    assert summary.outcomes == dict.fromkeys(outcomes, 1)
    assert summary.verdict.level == "invalid"
    assert "80.0 % of the requests failed" in " ".join(summary.verdict.reasons)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_and_seals_what_was_sent(
    tmp_path: Path, number: signal.Signals
) -> None:
    path = source(tmp_path / "s.tape", [{"arrival_ns": 0}, {"arrival_ns": 3_600_000 * MS}])
    states: list[Progress] = []

    def interrupt(state: Progress) -> None:
        states.append(state)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with serve() as server:
        plan = make_plan(ReplayOptions(source=path, to=server.url, tape=tmp_path / "run.tape"))
        summary = run_plan(plan, interrupt)
    signal.signal(number, before)
    assert (summary.stopped, summary.sent, summary.not_sent) == (True, 1, 1)
    assert open_tape(summary.tape).rows == 1
    assert "stopped early: 1 of 2" in " ".join(summary.verdict.reasons)
    assert states[0].in_flight == 0 and states[0].done == 1


def test_a_run_outside_the_main_thread_takes_no_signals_and_works(tmp_path: Path) -> None:
    done: list[RunSummary] = []
    thread = threading.Thread(target=lambda: done.append(replay(tmp_path, [{}])[0]))
    thread.start()
    thread.join(30)
    assert done[0].outcomes == {"ok": 1}


def test_no_secret_reaches_the_tape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY_KEY", SECRETS[0])

    def echo(seen: Seen) -> Sequence[Step]:
        leaked = f"Set-Cookie: {SECRETS[1]}\r\n\r\n".encode()
        steps = list(engine_like(seen))
        assert isinstance(steps[0], bytes)
        steps[0] = steps[0].replace(b"\r\n\r\n", b"\r\n" + leaked, 1)
        return steps

    with serve(echo) as server:
        to = server.url.replace("http://", f"http://user:{SECRETS[2]}@")
        options = ReplayOptions(
            source=source(tmp_path / "s.tape", [{}] * 3),
            to=to,
            tape=tmp_path / "run.tape",
            headers={"X-Secret": SECRETS[1]},
            key_env="CANARY_KEY",
            command=["tokentape", "replay", "--to", to, "--header", f"X-Secret={SECRETS[1]}"],
        )
        summary = run_plan(make_plan(options))
        sent = server.generations[0].headers
    assert sent["authorization"] == f"Bearer {SECRETS[0]}" and sent["x-secret"] == SECRETS[1]
    files = [f for f in summary.tape.rglob("*") if f.is_file()]
    assert len(files) >= 2
    for file in files:
        assert not any(s.encode() in file.read_bytes() for s in SECRETS), file
    for text in tape_texts(open_tape(summary.tape)):
        assert not any(s in text for s in SECRETS)


def tape_texts(tape: Tape) -> list[str]:
    """Every text cell of a tape, since pages in files are compressed."""
    table = tape.read()
    return [str(v) for name in table.column_names for v in table[name].to_pylist() if v is not None]


def test_a_tape_that_exists_is_not_overwritten_without_force(tmp_path: Path) -> None:
    old = source(tmp_path / "run.tape", [{}] * 2)
    with serve() as server:
        options = ReplayOptions(
            source=source(tmp_path / "source.tape", [{}]), to=server.url, tape=old
        )
        with pytest.raises(TokentapeError, match="--force"):
            run_plan(make_plan(options))
        assert not server.generations
        options.force = True
        assert run_plan(make_plan(options)).rows == 1


def test_a_plan_without_a_tape_or_a_candidate_cannot_be_run(tmp_path: Path) -> None:
    path = source(tmp_path / "s.tape", [{}])
    offline = make_plan(ReplayOptions(source=path, to="http://h:1", model="m"), offline=True)
    with pytest.raises(UsageError, match="--tape"):
        run_plan(offline)
    offline.options.tape = tmp_path / "run.tape"
    with pytest.raises(UsageError, match="offline"):
        run_plan(offline)


def test_a_candidate_that_dies_after_the_plan_is_one_line_and_a_sealed_tape(
    tmp_path: Path,
) -> None:
    with serve() as server:
        path = source(tmp_path / "s.tape", [{}])
        plan = make_plan(ReplayOptions(source=path, to=server.url, tape=tmp_path / "run.tape"))
    with pytest.raises(TokentapeError, match="takes no connection any more"):
        run_plan(plan)
    tape = open_tape(tmp_path / "run.tape")
    assert tape.rows == 0 and tape.facts["run"] == {"failed": True}


def test_session_and_block_columns_are_carried_over(tmp_path: Path) -> None:
    block = {"block_tokens": 8, "block_unit": "token", "block_scope": "trace"}
    rows = [
        block
        | {"block_hashes": [7, -8], "prefix_partial": 4 + n, "session_id": "s", "turn_index": n}
        for n in range(3)
    ]
    _, tape, server = replay(tmp_path, rows)
    table = tape.read(["block_hashes", "session_id", "turn_index", "block_scope"])
    assert table["block_hashes"].to_pylist() == [[7, -8]] * 3
    assert table["turn_index"].to_pylist() == [0, 1, 2]
    assert pc.unique(table["session_id"]).to_pylist() == ["s"]
    prompts = [s.json["prompt"] for s in server.generations]
    assert prompts[0][:16] == prompts[1][:16] == prompts[2][:16]
    assert prompts[0][16:20] != prompts[1][16:20]


def offering(*models: str) -> Script:
    """A candidate with several models."""

    def script(seen: Seen) -> Sequence[Step]:
        if seen.path.endswith("/models"):
            return plain(200, {"data": [{"id": name} for name in models]})
        return streamed(seen)

    return script


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({}, ["big", "small", "big", "big"]),  # the first that is offered, where no other is named
        ({"models": {"gpt": "small"}}, ["big", "small", "small", "big"]),
        ({"model": "small"}, ["small"] * 4),
        ({"model": "small", "models": {"big": "big"}}, ["big", "small", "small", "small"]),
    ],
)
def test_each_request_asks_for_its_model_or_for_what_stands_in_for_it(
    tmp_path: Path, changes: dict[str, Any], asked: list[str]
) -> None:
    rows = [{"model": "big"}, {"model": "x", "model_requested": "small"}, {"model": "gpt"}, {}]
    _, tape, server = replay(tmp_path, rows, offering("big", "small"), **changes)
    assert [s.json["model"] for s in server.generations] == asked
    assert tape.read(["model_requested"])["model_requested"].to_pylist() == asked
    assert tape.read(["model"])["model"].to_pylist() == asked  # as the replies say


def test_a_model_that_the_candidate_does_not_offer_is_named_before_anything_is_sent(
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match="--map-model: the candidate does not offer huge"):
        replay(tmp_path, [{}], offering("big"), models={"a": "huge"})


def test_further_fields_are_in_each_body_and_ours_are_not_to_be_replaced(tmp_path: Path) -> None:
    more = {"priority": 3, "chat_template_kwargs": {"enable_thinking": False}, "min_tokens": 1}
    _, tape, server = replay(tmp_path, [{}, {"operation": "chat"}], body=more)
    for seen in server.generations:
        assert {name: seen.json[name] for name in more} == more
    assert tape.facts["options"]["body"] == more
    with pytest.raises(UsageError, match="--body stream: that field follows"):
        replay(tmp_path / "b", [{}], body={"stream": False})


def test_each_request_tells_its_session_where_a_header_for_it_is_named(tmp_path: Path) -> None:
    rows = [{"session_id": name} for name in ("a b", "a b", None, "größe")]
    _, _, server = replay(tmp_path, rows, session_header="X-Session-Id")
    told = [s.headers.get("x-session-id") for s in server.generations]
    assert told == ["a%20b", "a%20b", None, "gr%C3%B6%C3%9Fe"]
    with pytest.raises(UsageError, match="--session-header: a header's name"):
        replay(tmp_path / "b", rows, session_header="x: y")


def test_a_run_tells_what_is_left_and_the_mean_times_of_replies_so_far(tmp_path: Path) -> None:
    path = source(tmp_path / "s.tape", [{"arrival_ns": n * 700 * MS} for n in range(6)])
    states: list[Progress] = []
    with serve(lambda seen: streamed(seen, gap_s=0.02) if seen.body else engine_like(seen)) as it:
        plan = make_plan(ReplayOptions(source=path, to=it.url, tape=tmp_path / "run.tape"))
        run_plan(plan, states.append)
    assert states[0].left_s == pytest.approx(3.5 - states[0].elapsed_s)
    assert states[-1].left_s <= states[0].left_s
    told = [s for s in states if s.mean_s("TTFT") is not None]
    assert told
    per_token_s, per_event_s = told[-1].mean_s("TPOT"), told[-1].mean_s("ICL")
    assert per_token_s is not None and 0.02 <= per_token_s < 0.5
    assert per_event_s == pytest.approx(per_token_s, rel=0.01)  # here each event is one token
    line = standing(told[-1])
    assert (
        "in flight, mean TTFT" in line
        and "mean TPOT" in line
        and "mean ICL" in line
        and "worst" in line
    )
    assert "s to send" in standing(states[0])
