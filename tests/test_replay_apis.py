"""A replay in each API: what is asked, and what is read of the answer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from replay_server import HEAD, LAST, Script, Seen, Step, engine_like, plain, serve
from replay_server import chunk as in_chunk
from tokentape.replay.apis import Wanted
from tokentape.replay.options import ReplayOptions
from tokentape.replay.run import make_plan, run_plan
from tokentape.traces.reader import open_tape
from tokentape.traces.writer import TapeWriter

PATHS = {
    "responses": "/v1/responses",
    "anthropic": "/v1/messages",
    "sglang": "/generate",
    "tgi": "/",
}
FORMATS = {"responses": "openai.responses", "anthropic": "anthropic", "sglang": "sglang"}


def said(value: dict[str, Any]) -> bytes:
    name = f"event: {value['type']}\n" if "type" in value else ""
    return in_chunk(f"{name}data: {json.dumps(value)}\n\n".encode())


def responses(asked: dict[str, Any]) -> list[bytes]:
    prompt, n = len(asked["input"].split()), asked["max_output_tokens"]
    usage = {"input_tokens": prompt, "output_tokens": n, "total_tokens": prompt + n}
    response = {"id": "r", "model": asked["model"], "status": "completed", "usage": usage}
    delta = {"type": "response.output_text.delta", "delta": " w", "output_index": 0}
    return [*[said(delta)] * n, said({"type": "response.completed", "response": response})]


def anthropic(asked: dict[str, Any]) -> list[bytes]:
    prompt, n = len(asked["messages"][0]["content"].split()), asked["max_tokens"]
    message = {"id": "m", "model": asked["model"], "usage": {"input_tokens": prompt}}
    text = {"type": "text_delta", "text": " w"}
    end = {"delta": {"stop_reason": "max_tokens"}, "usage": {"output_tokens": n}}
    return [
        said({"type": "message_start", "message": message}),
        *[said({"type": "content_block_delta", "index": 0, "delta": text})] * n,
        said({"type": "message_delta", **end}),
        said({"type": "message_stop"}),
    ]


def sglang(asked: dict[str, Any]) -> list[bytes]:
    settings = asked["sampling_params"]
    n = settings["max_new_tokens"]
    assert settings["ignore_eos"] is True and settings["min_new_tokens"] == n
    meta = {"id": "s", "prompt_tokens": len(asked["input_ids"]), "finish_reason": None}
    parts = [
        {"text": " w" * i, "meta_info": meta | {"completion_tokens": i}} for i in range(1, n + 1)
    ]
    parts[-1]["meta_info"] |= {"finish_reason": {"type": "length", "length": n}}  # type: ignore[operator]
    return [*map(said, parts), in_chunk(b"data: [DONE]\n\n")]


def tgi(asked: dict[str, Any]) -> list[bytes]:
    n, prompt = asked["parameters"]["max_new_tokens"], len(asked["inputs"].split())
    token = {"id": 5, "text": " w", "logprob": -1.0, "special": False}
    details = {"finish_reason": "length", "generated_tokens": n, "input_length": prompt}
    last = {"token": token, "generated_text": " w" * n, "details": details}
    return [*[said({"token": token})] * (n - 1), said(last)]


ANSWERS = {"responses": responses, "anthropic": anthropic, "sglang": sglang, "tgi": tgi}


def speaking(api: str) -> Any:
    def script(seen: Seen) -> Sequence[Step]:
        if seen.path.endswith("/models"):
            return plain(200, {"data": [{"id": "m"}]})
        if seen.path != PATHS[api]:
            return plain(404, {})
        assert seen.json["stream"] is True and seen.json["model"] == "m"
        return [HEAD, *ANSWERS[api](seen.json), LAST]

    return script


@pytest.mark.parametrize("api", sorted(ANSWERS))
def test_a_replay_asks_in_an_api_and_reads_its_answers(tmp_path: Path, api: Wanted) -> None:
    source = tmp_path / "source.tape"
    writer = TapeWriter.create(source, role="import", command=[], options={}, facts={})
    for n in range(5):
        row = {"request_id": n.to_bytes(16), "arrival_ns": n * 10_000_000, "stream": True}
        writer.append(row | {"input_tokens": 20 + n, "output_tokens": 2 + n})
    writer.close()
    with serve(speaking(api)) as server:
        wanted = ReplayOptions(
            source=source, to=server.url, tape=tmp_path / "run.tape", endpoint=api
        )
        plan = make_plan(wanted)
        verdict = run_plan(plan).verdict
        sent = [s for s in server.seen if s.path == PATHS[api]]
    assert f"5 of 5 requests (5 {api})" in plan.text()
    assert f"prompts on {api}: {'token ids' if api == 'sglang' else 'words'}" in plan.text()
    assert all(s.headers.get("anthropic-version") == "2023-06-01" for s in sent) == (
        api == "anthropic"
    )
    for name in ("input_match", "output_match"):
        assert verdict.figures[name]["matched"] == 5, verdict.text()
    rows = open_tape(tmp_path / "run.tape").read().to_pylist()
    assert {row["wire_format"] for row in rows} == {FORMATS.get(api, api)}
    assert {row["endpoint"] for row in rows} == {PATHS[api]}
    assert sorted(len(row["off_us"]) for row in rows) == [2, 3, 4, 5, 6]
    assert {(row["outcome"], row["parse_status"]) for row in rows} == {("ok", "ok")}


def test_each_request_goes_out_in_the_api_that_it_came_in(tmp_path: Path) -> None:
    """Two of each; imported rows know no wire format, so their operation says which it is."""
    chosen: list[tuple[str | None, str, str]] = [
        ("openai.completions", "text_completion", "/v1/completions"),
        ("openai.chat", "chat", "/v1/chat/completions"),
        ("openai.responses", "chat", "/v1/responses"),
        ("anthropic", "chat", "/v1/messages"),
        ("sglang", "text_completion", "/generate"),
        ("tgi", "text_completion", "/"),
        (None, "chat", "/v1/chat/completions"),
        ("unknown", "text_completion", "/v1/completions"),
        ("gemini", "chat", ""),
    ]
    source = tmp_path / "source.tape"
    writer = TapeWriter.create(source, role="import", command=[], options={}, facts={})
    for n in range(2 * len(chosen)):
        spoken, operation, _ = chosen[n % len(chosen)]
        row = {"request_id": n.to_bytes(16), "arrival_ns": n * 5_000_000, "operation": operation}
        row |= {"wire_format": spoken, "stream": True, "outcome": "ok"}
        writer.append(row | {"input_tokens": 20 + n, "output_tokens": 2 + n})
    writer.close()
    apis = {path: api for api, path in PATHS.items()}

    def script(seen: Seen) -> Sequence[Step]:
        answer: Script = speaking(apis[seen.path]) if seen.path in apis else engine_like
        return answer(seen)

    with serve(script) as server:
        wanted = ReplayOptions(source=source, to=server.url, tape=tmp_path / "run.tape")
        plan = make_plan(wanted)
        verdict = run_plan(plan).verdict
        in_chat = make_plan(ReplayOptions(source=source, to=server.url, endpoint="chat"))
    assert plan.figures["requests_of_api"] == {
        "completions": 4, "chat": 4, "responses": 2, "anthropic": 2, "sglang": 2, "tgi": 2
    }  # fmt: skip
    assert "4 completions, 4 chat, 2 responses, 2 anthropic, 2 sglang and 2 tgi" in plan.text()
    left = "left out: 2 came in an API that a replay does not speak, gemini: --endpoint NAME"
    assert left in plan.text()
    assert in_chat.figures["requests_of_api"] == {"chat": 18} and not in_chat.figures["left_out"]
    assert verdict.figures["output_match"]["matched"] == 16, verdict.text()
    rows = open_tape(tmp_path / "run.tape").read().to_pylist()
    went = {int.from_bytes(row["source_request_id"].bytes): row["endpoint"] for row in rows}
    assert went == {n: path for n in range(18) if (path := chosen[n % len(chosen)][2])}
    again = make_plan(ReplayOptions(source=tmp_path / "run.tape", to=server.url), offline=True)
    assert again.figures["requests_of_api"] == plan.figures["requests_of_api"]
