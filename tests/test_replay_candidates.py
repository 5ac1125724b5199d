"""Odd candidates, each over a real socket: what they do is on the run's tape, and nothing more.

A request is sent once whatever comes back: no retry, no redirect that is followed.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from replay_server import HEAD, LAST, Seen, Step, chunk, engine_like, event, plain, serve, streamed
from tokentape.cli.drive import ask_about
from tokentape.replay.options import ReplayOptions
from tokentape.replay.run import make_plan, run_plan
from tokentape.replay.targets import is_private
from tokentape.replay.verdict import _refusal_lines
from tokentape.traces.errors import TokentapeError, UsageError
from tokentape.traces.reader import open_tape
from tokentape.traces.retry_after import retry_after_s
from tokentape.traces.writer import TapeWriter

TOKENS = 5
S = 1_000_000_000


def run_against(
    answer: Any, tmp_path: Path, row: dict[str, Any] | None = None, **options: Any
) -> tuple[dict[str, Any], list[str], int]:
    """(the row, the verdict's reasons, requests that arrived) of one request of five tokens."""
    writer = TapeWriter.create(tmp_path / "s.tape", role="import", command=[], options={}, facts={})
    counts = {"input_tokens": 20, "output_tokens": TOKENS, "outcome": "ok", "stream": True}
    writer.append({"request_id": bytes(16), "arrival_ns": 0} | counts | (row or {}))
    writer.close()

    def script(seen: Seen) -> Sequence[Step]:
        asked = seen.path.endswith("completions") and seen.json.get("max_tokens") == TOKENS
        return list(answer(seen)) if asked else engine_like(seen)

    with serve(script) as server:
        wanted: dict[str, Any] = {
            "source": tmp_path / "s.tape",
            "tape": tmp_path / "r.tape",
            "timeout_ns": S,
        }
        summary = run_plan(make_plan(ReplayOptions(to=server.url, **(wanted | options))))
        arrived = len(server.generations)
    return open_tape(summary.tape).read().to_pylist()[0], summary.verdict.reasons, arrived


def refusal(status: int, after: str = "0") -> bytes:
    return f"HTTP/1.1 {status} X\r\nRetry-After: {after}\r\nContent-Length: 2\r\n\r\n{{}}".encode()


@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_that_says_when_to_come_back_is_one_row_and_no_second_try(
    tmp_path: Path, status: int
) -> None:
    row, reasons, arrived = run_against(lambda _: [refusal(status)], tmp_path)
    assert (row["outcome"], row["http_status"], row["attempt"], arrived) == (
        *("http_error", status, 1, 1),
    )
    assert "1 http_error" in " ".join(reasons)
    assert row["retry_after_s"] == 0


def test_the_verdict_says_how_many_were_refused_and_what_they_were_told_to_wait(
    tmp_path: Path,
) -> None:
    run_against(lambda _: [refusal(429, "7")], tmp_path)
    verdict = open_tape(tmp_path / "r.tape").facts["verdict"]
    assert verdict["refusals"] == {
        "by_status": {"429": 1},
        "with_retry_after": 1,
        "retry_after_s": {"p50": 7, "p99": 7, "max": 7},
    }
    (line,) = _refusal_lines(verdict["refusals"])
    assert "1 with 429; 1 asked for a wait of 7 s" in line
    assert not _refusal_lines(verdict["refusals"] | {"by_status": {}})


DATE = "Sun, 06 Nov 1994 08:49:{} GMT"


@pytest.mark.parametrize(
    ("asked", "date", "seconds"),
    [
        ("120", None, 120),
        ("0.25", None, 1),
        ("99999999999", None, 2**31 - 1),
        (DATE.format(50), DATE.format(37), 13),
        (DATE.format(30), DATE.format(37), 0),
        (DATE.format(50), None, None),
        *((wrong, DATE.format(37), None) for wrong in ("", "soon", "-1", "nan", "inf")),
    ],
)
def test_what_a_refusal_asks_for_is_read_in_both_forms_and_never_guessed(
    asked: str, date: str | None, seconds: int | None
) -> None:
    headers = {b"retry-after": asked} | ({b"date": date} if date else {})
    assert retry_after_s(headers) == seconds


def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    head = b"HTTP/1.1 307 X\r\nLocation: /v1/elsewhere/completions\r\nContent-Length: 0\r\n\r\n"
    row, _, arrived = run_against(lambda _: [head], tmp_path)
    assert (row["outcome"], row["http_status"], arrived) == ("http_error", 307, 1)


def test_a_stream_that_is_cut_keeps_the_events_that_came(tmp_path: Path) -> None:
    # A reset discards what the client's kernel holds unread, so the server dies a little later.
    row, _, arrived = run_against(lambda seen: [*streamed(seen)[:5], 0.5, None], tmp_path)
    assert (row["outcome"], arrived) == ("upstream_abort", 1)
    assert len(row["off_us"]) == 2


def test_a_stream_that_never_ends_is_a_timeout_with_what_it_had(tmp_path: Path) -> None:
    row, _, _ = run_against(lambda seen: [*streamed(seen)[:7], 20.0], tmp_path)
    assert row["outcome"] == "timeout" and len(row["off_us"]) == 3
    assert row["end_ns"] - row["send_ns"] < 10 * S
    assert row["error_type"] == "total_timeout"


@pytest.mark.parametrize("begun", [[], [HEAD]])
def test_a_stream_that_does_not_begin_is_given_up_at_its_own_deadline(
    tmp_path: Path, begun: list[Step]
) -> None:
    row, _, _ = run_against(
        lambda _: [*begun, 20.0], tmp_path, first_byte_timeout_ns=S // 4, timeout_ns=60 * S
    )
    assert (row["outcome"], row["error_type"]) == ("timeout", "first_byte_timeout")
    assert row["http_status"] == (200 if begun else None) and not row["off_us"]
    assert S // 4 <= row["end_ns"] - row["send_ns"] < 15 * S


@pytest.mark.parametrize("in_one_read", [True, False])
def test_a_stream_that_has_begun_may_take_its_time(tmp_path: Path, *, in_one_read: bool) -> None:
    def slow(seen: Seen) -> Sequence[Step]:
        head, first, *rest = (step for step in streamed(seen) if isinstance(step, bytes))
        return [*([head + first] if in_one_read else [head, 0.01, first]), 1.0, *rest]

    row, _, _ = run_against(slow, tmp_path, first_byte_timeout_ns=S // 2, timeout_ns=60 * S)
    assert row["outcome"] == "ok" and len(row["off_us"]) == TOKENS


def test_a_whole_answer_has_no_first_byte_to_wait_for(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 20, "completion_tokens": TOKENS, "total_tokens": 20 + TOKENS}
    answer = plain(200, {"choices": [{"index": 0, "text": "x"}], "usage": usage})
    row, _, _ = run_against(
        lambda _: [0.6, *answer], tmp_path, {"stream": False}, first_byte_timeout_ns=S // 4
    )
    assert (row["outcome"], row["stream"]) == ("ok", False)


def test_garbage_is_not_counted_as_tokens(tmp_path: Path) -> None:
    body = chunk(b"data: {not json\n\n") + chunk(bytes(range(256)) * 8) + LAST
    row, reasons, _ = run_against(lambda _: [HEAD, body], tmp_path)
    assert not row["off_us"] and not row["output_tokens"]
    assert row["outcome"] != "ok" or row["parse_status"] not in (None, "ok")
    assert reasons


def test_framing_that_breaks_is_an_abort(tmp_path: Path) -> None:
    row, _, arrived = run_against(lambda _: [HEAD, b"zz\r\nnonsense", None], tmp_path)
    assert (row["outcome"], arrived) == ("upstream_abort", 1)


def test_an_answer_without_usage_is_counted_by_its_events(tmp_path: Path) -> None:
    def without(seen: Seen) -> Sequence[Step]:
        return [*streamed(seen)[:-1], event("[DONE]") + LAST]

    row, _, _ = run_against(without, tmp_path)
    assert row["outcome"] == "ok" and len(row["off_us"]) == TOKENS
    assert row["input_tokens"] is None
    assert row["output_tokens_source"] != "usage"


def test_a_candidate_that_ignores_the_limit_is_told_by_the_verdict(tmp_path: Path) -> None:
    def longer(seen: Seen) -> Sequence[Step]:
        more = seen.body.replace(b'"max_tokens":5', b'"max_tokens":9')
        return streamed(Seen(seen.method, seen.path, seen.headers, more, 0, 0))

    row, reasons, _ = run_against(longer, tmp_path)
    assert (row["planned_output_tokens"], row["output_tokens"]) == (TOKENS, 9)
    assert "output tokens: 1 of 1 requests are not as planned" in " ".join(reasons)


@pytest.mark.parametrize(
    ("url", "private"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://localhost:8000/v1", True),
        ("http://10.1.2.3/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://192.168.7.9/v1", True),
        ("http://8.8.8.8/v1", False),
        ("https://[2001:4860:4860::8888]/v1", False),
        ("http://engine/v1", True),
        ("http://engine.default.svc.cluster.local/v1", True),
        ("https://api.example.com/v1", False),
    ],
)
def test_a_candidate_out_in_the_world_is_told_from_one_at_home(url: str, private: bool) -> None:
    assert is_private(url) is private


def offline_options(folder: Path, to: str) -> ReplayOptions:
    """Options that replay one request; nobody is asked."""
    path = folder / f"{len(list(folder.iterdir()))}.tape"
    writer = TapeWriter.create(path, role="import", command=[], options={}, facts={})
    counts = {"input_tokens": 20, "output_tokens": 5, "outcome": "ok"}
    writer.append({"request_id": bytes(16), "arrival_ns": 0} | counts)
    writer.close()
    return ReplayOptions(source=path, to=to, model="m")


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_person_at_a_terminal_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    plan = make_plan(offline_options(tmp_path, "https://api.example.com"), offline=True)
    asked: list[str] = []
    for stream in (sys.stdin, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(typer, "confirm", lambda text, **_: asked.append(text))
    ask_about(plan)
    assert asked == (
        ["https://api.example.com/v1 is not private. Send 1 requests?"] if terminal else []
    )


def test_the_plan_names_a_candidate_that_is_not_private(tmp_path: Path) -> None:
    def noted(to: str) -> bool:
        plan = make_plan(offline_options(tmp_path, to), offline=True)
        return "api.example.com is not a private address" in plan.text()

    assert noted("https://api.example.com") and not noted("http://127.0.0.1:8000")


def test_several_candidates_get_whole_sessions_in_turn_and_the_rows_say_who_answered(
    tmp_path: Path,
) -> None:
    """Nine sessions of three turns and nine requests that belong to none, for three candidates."""
    writer = TapeWriter.create(tmp_path / "s.tape", role="import", command=[], options={}, facts={})
    for n in range(36):
        row = {"request_id": n.to_bytes(16), "arrival_ns": n * 4_000_000, "stream": True}
        session = {"session_id": f"s{n % 9}"} if n < 27 else {}
        writer.append(row | session | {"input_tokens": 20, "output_tokens": 3, "outcome": "ok"})
    writer.close()
    with serve() as a, serve() as b, serve() as c:
        servers = {server.url.removeprefix("http://"): server for server in (a, b, c)}
        wanted = ReplayOptions(
            source=tmp_path / "s.tape",
            to=a.url,
            also_to=(b.url, c.url),
            tape=tmp_path / "r.tape",
            model="m",
        )
        plan = make_plan(wanted)
        summary = run_plan(plan)
        counts = {name: len(server.generations) for name, server in servers.items()}
        with pytest.raises(UsageError, match="--to: several URLs must differ"):
            make_plan(ReplayOptions(source=tmp_path / "s.tape", to=a.url, also_to=(a.url,)))
    assert counts == dict.fromkeys(servers, 12)
    assert "sessions take turns between" in plan.text() and f"{b.url}/v1 (12 req" in plan.text()
    tape = open_tape(summary.tape)
    rows = tape.read().to_pylist()
    assert Counter(row["server_id"] for row in rows) == counts
    homes = {(row["session_id"], row["server_id"]) for row in rows if row["session_id"]}
    assert len(homes) == 9 and Counter(home for _, home in homes) == dict.fromkeys(servers, 3)
    assert tape.facts["candidate"]["urls"] == [f"{server.url}/v1" for server in (a, b, c)]
    assert {server.connections > 1 for server in (a, b, c)} == {True}  # warmed, each of them


def test_a_second_candidate_that_is_dead_or_takes_other_prompts_ends_the_plan(
    tmp_path: Path,
) -> None:
    options = offline_options(tmp_path, "")

    def words_only(seen: Seen) -> Sequence[Step]:
        ids = seen.path.endswith("completions") and isinstance(seen.json["prompt"], list)
        return plain(422, {"error": "text only"}) if ids else engine_like(seen)

    with serve() as a, serve(words_only) as b:
        with pytest.raises(UsageError, match=r"differs from .* on completions .*; replay each by"):
            make_plan(replace(options, to=a.url, also_to=(b.url,)))
        with pytest.raises(TokentapeError, match="nothing answers"):
            make_plan(replace(options, to=a.url, also_to=("http://127.0.0.1:9",)))


def test_adapters_keep_their_names_and_a_further_field_reaches_each_request(tmp_path: Path) -> None:
    """LoRA adapters are models by name; a priority is a field of the body."""
    asked = ["base", "lora-a", "lora-b", "lora-old", "lora-a"]
    writer = TapeWriter.create(tmp_path / "s.tape", role="import", command=[], options={}, facts={})
    for n, model in enumerate(asked):
        row = {"request_id": n.to_bytes(16), "arrival_ns": n * 4_000_000, "stream": True}
        row |= {"model_requested": model, "extra": '{"priority":3}'}
        writer.append(row | {"input_tokens": 20, "output_tokens": 3, "outcome": "ok"})
    writer.close()

    def script(seen: Seen) -> Sequence[Step]:
        if seen.path.endswith("/models"):
            return plain(200, {"data": [{"id": m} for m in ("base", "lora-a", "lora-b")]})
        return streamed(seen)

    with serve(script) as server:
        wanted = ReplayOptions(
            source=tmp_path / "s.tape",
            to=server.url,
            tape=tmp_path / "r.tape",
            models={"lora-old": "lora-b"},
            body={"priority": 3},
        )
        run_plan(make_plan(wanted))
    sent = ["base", "lora-a", "lora-b", "lora-b", "lora-a"]
    assert [s.json["model"] for s in server.generations] == sent
    assert {s.json["priority"] for s in server.generations} == {3}
    assert open_tape(tmp_path / "r.tape").read()["model_requested"].to_pylist() == sent
