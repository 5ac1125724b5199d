"""Sessions of a capture: told by the client, or found where a prompt goes on from an answer."""

import json
from typing import Any

import pytest

from tokentape.traces import turns, wire
from tokentape.traces.privacy import Privacy
from tokentape.traces.turns import Turns

MS = 1_000_000
SYSTEM = {"role": "system", "content": "be brief"}
CANARY = "CANARYdonotkeepthis"


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


class Capture:
    """Requests that begin and end when they are told to."""

    def __init__(self, mode: Any = "structure") -> None:
        self.turns = Turns(Privacy(mode, b"k" * 32))
        self.rows: list[dict[str, Any]] = []

    def ask(
        self,
        body: dict[str, Any],
        at_ms: int,
        end_ms: int,
        *,
        path: str = "/v1/chat/completions",
        headers: tuple[tuple[bytes, bytes], ...] = (),
        outcome: str = "ok",
        response_id: str | None = None,
    ) -> dict[str, Any]:
        turn = self.turns.told_by_head(headers)
        self.turns.told_by_body(turn, wire.read_request(path, json.dumps(body).encode()))
        row = {
            "request_id": len(self.rows).to_bytes(16),
            "arrival_ns": at_ms * MS,
            "end_ns": end_ms * MS,
            "outcome": outcome,
            "response_id": response_id,
        }
        row |= self.turns.close(turn, row)
        self.rows.append(row)
        assert CANARY not in repr(row) and CANARY not in repr(turn)
        return row

    def chat(self, *messages: dict[str, Any], **more: Any) -> dict[str, Any]:
        return self.ask({"model": "m", "messages": [SYSTEM, *messages]}, **more)


def test_a_prompt_that_goes_on_from_an_answer_is_the_next_turn() -> None:
    capture = Capture()
    first = capture.chat(user("a"), at_ms=0, end_ms=10)
    other = capture.chat(user("b"), at_ms=5, end_ms=12)
    second = capture.chat(user("a"), said(CANARY), user("c"), at_ms=30, end_ms=40)
    third = capture.chat(
        user("a"), said(CANARY), user("c"), said("y"), user("d"), at_ms=41, end_ms=50
    )
    assert [r["turn_index"] for r in (first, second, third, other)] == [0, 1, 2, 0]
    assert first["session_id"] == second["session_id"] == third["session_id"]
    assert other["session_id"] != first["session_id"]
    assert {r["session_source"] for r in capture.rows} == {"prefix"}
    assert "parents" not in first and "think_ns" not in first
    assert second["parents"] == [first["request_id"]]
    assert third["parents"] == [second["request_id"]]
    assert (second["think_ns"], third["think_ns"]) == (20 * MS, 1 * MS)


def test_a_prompt_that_shares_a_beginning_only_is_no_turn() -> None:
    capture = Capture()
    first = capture.chat(user("a"), at_ms=0, end_ms=10)
    for messages in (
        [user("a"), user("b")],  # nobody answered
        [user("a, too"), said("x"), user("b")],
        [said("x"), user("b")],
    ):
        row = capture.chat(*messages, at_ms=20, end_ms=30)
        assert row["turn_index"] == 0 and row["session_id"] != first["session_id"]


def test_an_answer_that_has_not_come_yet_cannot_be_gone_on_from() -> None:
    capture = Capture()
    capture.chat(user("a"), at_ms=0, end_ms=50)
    early = capture.chat(user("a"), said("x"), user("b"), at_ms=40, end_ms=60)
    assert "parents" not in early
    capture.chat(user("q"), at_ms=0, end_ms=10, outcome="http_error")
    after_failure = capture.chat(user("q"), said("x"), user("b"), at_ms=20, end_ms=30)
    assert "parents" not in after_failure


def test_of_two_with_the_same_prompt_each_is_gone_on_from_once() -> None:
    capture = Capture()
    same = [capture.chat(user("hi"), at_ms=n, end_ms=10 + n) for n in range(2)]
    nexts = [
        capture.chat(user("hi"), said("x"), user(t), at_ms=30 + n, end_ms=40 + n)
        for n, t in enumerate("ab")
    ]
    assert {tuple(r["parents"]) for r in nexts} == {(r["request_id"],) for r in same}
    assert len({r["session_id"] for r in capture.rows}) == 2


@pytest.mark.parametrize(
    ("headers", "body", "source"),
    [
        (((b"X-Session-Id", CANARY.encode()),), {}, "header"),
        ((), {"session_id": CANARY}, "body"),
        ((), {"metadata": {"conversation_id": CANARY}}, "body"),
        ((), {"metadata": {"user_id": f"user_x_account__session_{'0' * 36}"}}, "body"),
    ],
)
def test_what_the_client_calls_a_session_is_one_and_its_name_is_not_kept(
    headers: tuple[tuple[bytes, bytes], ...], body: dict[str, Any], source: str
) -> None:
    capture = Capture("none")
    rows = [
        capture.ask(
            {"model": "m", "messages": [user(str(n))], **body},
            at_ms=100 * n,
            end_ms=100 * n + 50,
            headers=headers,
        )
        for n in range(3)
    ]
    assert len({r["session_id"] for r in rows}) == 1
    assert {r["session_source"] for r in rows} == {source}
    assert [r["turn_index"] for r in rows] == [0, 1, 2]
    assert rows[2]["parents"] == [rows[1]["request_id"]] and rows[2]["think_ns"] == 50 * MS


def test_in_a_session_two_sent_at_once_wait_for_the_same_and_the_next_for_both() -> None:
    capture = Capture()
    headers = ((b"session-id", b"s"),)

    def ask(at_ms: int, end_ms: int) -> dict[str, Any]:
        return capture.ask({"messages": []}, at_ms, end_ms, headers=headers)

    first, left = ask(0, 10), ask(20, 30)
    right = ask(21, 60)
    last = ask(70, 80)
    assert left["parents"] == right["parents"] == [first["request_id"]]
    assert set(last["parents"]) == {left["request_id"], right["request_id"]}
    assert last["think_ns"] == 10 * MS


def test_a_response_that_names_the_one_before_it_is_its_next_turn() -> None:
    capture = Capture()
    path = "/v1/responses"
    first = capture.ask({"input": "a"}, 0, 10, path=path, response_id="resp_1")
    body = {"input": "b", "previous_response_id": "resp_1"}
    second = capture.ask(body, 20, 30, path=path, response_id="resp_2")
    assert second["parents"] == [first["request_id"]]
    assert second["session_id"] == first["session_id"]


def test_anthropic_and_gemini_speak_of_answers_in_their_own_words() -> None:
    capture = Capture()
    path = "/v1/messages"
    first = capture.ask({"messages": [user("a")]}, 0, 10, path=path)
    marked = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    body = {"messages": [{"role": "user", "content": [marked]}, said("x"), user("b")]}
    assert capture.ask(body, 20, 30, path=path)["parents"] == [first["request_id"]]
    path = "/v1beta/models/g:generateContent"
    contents = [{"role": "user", "parts": [{"text": "a"}]}]
    first = capture.ask({"contents": contents}, 0, 10, path=path)
    contents += [{"role": r, "parts": [{"text": r}]} for r in ("model", "user")]
    assert capture.ask({"contents": contents}, 20, 30, path=path)["parents"] == [
        first["request_id"]
    ]


def test_mode_none_looks_at_no_prompt() -> None:
    capture = Capture("none")
    capture.chat(user("a"), at_ms=0, end_ms=10)
    row = capture.chat(user("a"), said("x"), user("b"), at_ms=20, end_ms=30)
    assert not row.keys() & {"session_id", "parents", "turn_index"}


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "MOST_PROMPTS", 10)
    monkeypatch.setattr(turns, "MOST_SESSIONS", 5)
    capture = Capture()
    for n in range(100):
        headers = ((b"session-id", str(n % 50).encode()),)
        capture.ask({"messages": [user(str(n))]}, n, n, headers=headers, response_id=str(n))
    held = capture.turns
    assert len(held._prompts) == len(held._responses) == 10
    assert len(held._sessions) == 5
