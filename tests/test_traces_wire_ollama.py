"""Replies and requests of Ollama, beside what its own client makes of the same bytes."""

import json
from typing import Any

import pytest

from tokentape.traces import wire
from tokentape.traces.schema import ERROR, FINISH, REASONING, TEXT, TOOL
from tokentape.traces.wire.lines import LineReader
from wire_streams import (
    JSON,
    NDJSON,
    OLLAMA_CHAT,
    OLLAMA_END,
    OLLAMA_GENERATE,
    Sample,
    line,
    served,
)
from wire_streams import read as read_any

CANARY = "CANARYdonotkeepthis"
both = pytest.mark.parametrize("sample", [OLLAMA_CHAT, OLLAMA_GENERATE], ids=["chat", "generate"])


def read(parts: list[bytes], wire_format: str = "ollama.chat", **more: Any) -> Any:
    return read_any(wire_format, parts, **{"kind": NDJSON, **more})


@both
def test_the_last_line_gives_counts_and_the_servers_own_times(sample: Sample) -> None:
    reply = read(sample.parts, sample.wire_format)
    columns = reply.columns
    assert (columns["input_tokens"], columns["cached_tokens"]) == (26, 16)
    assert (columns["output_tokens"], sum(reply.ntok)) == (7, 7)
    assert columns["ntok_source"] == "usage_spread"
    assert columns["server_prefill_ns"] == 130_079_000
    assert columns["server_decode_ns"] == 1_504_000_000
    assert columns["server_timing_source"] == "durations"
    assert json.loads(columns["usage_raw"])["load_duration"] == 2_000_000_000
    assert (columns["model"], columns["finish_reason"]) == ("gemma", ["stop"])
    assert (reply.first_content_ns, reply.first_answer_ns) == (1000, 1001)


def test_an_end_that_no_token_is_left_for_is_no_event() -> None:
    end = line(message={"content": ""}, **{**OLLAMA_END, "eval_count": 1})
    reply = read([line(message={"content": "a"}), end])
    assert (list(reply.cls), list(reply.aux_cls)) == ([TEXT], [FINISH])


def test_a_prompt_count_that_an_old_server_left_out_is_not_known() -> None:
    end = {k: v for k, v in OLLAMA_END.items() if not k.startswith("prompt_eval")}
    columns = read([line(message={"content": "a"}), line(message={"content": ""}, **end)]).columns
    assert "input_tokens" not in columns and columns["output_tokens"] == 7


def test_trap_13_an_error_under_status_200_is_an_error() -> None:
    reply = read([OLLAMA_CHAT.parts[1], json.dumps({"error": CANARY}).encode() + b"\n"])
    assert reply.stream_error and list(reply.aux_cls) == [ERROR]
    assert not reply.done and CANARY not in repr(reply)


def test_trap_4_and_21_lines_may_end_otherwise_and_begin_with_a_mark() -> None:
    body = b"\xef\xbb\xbf" + b"\r\n\r\n".join(p.strip() for p in OLLAMA_CHAT.parts)
    assert read([body]).columns == read([b"".join(OLLAMA_CHAT.parts)]).columns | {
        "response_bytes": len(body)
    }


def test_trap_22_a_line_beyond_any_cap_is_counted_and_the_next_one_is_read() -> None:
    reader = LineReader(limit=10)
    data = b"x" * 30 + b'\n{"a":1}\n\n{"b":'
    messages = [m for at in range(len(data)) for m in reader.feed(data[at : at + 1])]
    assert messages == [(b"", None), (b"", b'{"a":1}')]
    assert reader.place and reader.flush() == [(b"", b'{"b":')]


def test_whole_replies_and_errors() -> None:
    body = {"model": "gemma", "message": {"role": "assistant", "content": CANARY}, **OLLAMA_END}
    reply = read([json.dumps(body).encode()], kind=JSON, stream=False)
    assert (reply.columns["output_tokens"], reply.columns["server_prefill_ns"]) == (7, 130_079_000)
    assert reply.done and reply.first_content_ns is None
    error = json.dumps({"error": f"model '{CANARY}' not found"}).encode()
    reply = read([error], kind=JSON, status=404)
    assert reply.columns["error_type"] == "error" and CANARY not in repr(reply)


def test_a_chat_request_as_columns_and_its_prompt() -> None:
    body = {
        "model": "gemma",
        "messages": [{"role": "user", "content": CANARY, "images": ["AA=="]}],
        "tools": [{"type": "function", "function": {"name": CANARY}}],
        "options": {"num_predict": 9, "num_ctx": 4096, "seed": 3, "stop": [CANARY, "b"]},
        "think": "high",
        "format": {"type": "object"},
        "keep_alive": CANARY,
    }
    facts = wire.read_request("/api/chat", json.dumps(body).encode())
    extra = json.loads(facts.columns.pop("extra"))
    assert extra["num_ctx"] == 4096
    assert facts.columns == {
        "wire_format": "ollama.chat",
        "operation": "chat",
        "stream": True,
        "model_requested": "gemma",
        "n_choices": 1,
        "max_tokens": 9,
        "sampling_seed": 3,
        "stop_count": 2,
        "tool_count": 1,
        "reasoning_effort": "high",
        "response_format": "json_schema",
        "message_count": 1,
        "image_count": 1,
    }
    assert CANARY not in repr((facts.columns, extra))
    assert facts.prompt is not None and CANARY.encode() in bytes(facts.prompt.text or b"")


def test_a_generate_request_streams_unless_it_says_otherwise() -> None:
    def columns(**more: Any) -> Any:
        body = json.dumps({"model": "m", "prompt": "a", "options": {"num_predict": -1}, **more})
        return wire.read_request("/api/generate", body.encode())

    assert columns().columns["stream"] is True
    assert "max_tokens" not in columns().columns  # -1: as many as fit
    assert columns(stream=False).columns["stream"] is False
    assert columns(system="b").prompt.text == b"ba"
    assert columns(context=[1, 2]).prompt is None


@both
def test_ollamas_own_client_reads_the_same_from_these_bytes(sample: Sample) -> None:
    ollama = pytest.importorskip("ollama", reason="ollama is not installed")
    with served(b"".join(sample.parts), NDJSON) as url:
        client = ollama.Client(host=url)
        if sample is OLLAMA_CHAT:
            asked = [{"role": "user", "content": "a"}]
            chunks = list(client.chat("gemma", messages=asked, stream=True))
            pieces = [chunk.message for chunk in chunks]
            texts = [piece.content for piece in pieces]
        else:
            chunks = pieces = list(client.generate("gemma", "a", stream=True))
            texts = [piece.response for piece in pieces]
        client.close()
    classes = [
        REASONING if piece.thinking else TEXT if text else TOOL
        for piece, text in zip(pieces[:-1], texts, strict=False)
    ]
    reply = read(sample.parts, sample.wire_format)
    assert classes == list(reply.cls)[:-1]
    last, columns = chunks[-1], reply.columns
    assert last.done and [last.done_reason] == columns["finish_reason"]
    assert last.prompt_eval_count == columns["input_tokens"]
    assert last.eval_count == columns["output_tokens"]
    assert last.prompt_eval_duration == columns["server_prefill_ns"]
    assert last.eval_duration == columns["server_decode_ns"]
