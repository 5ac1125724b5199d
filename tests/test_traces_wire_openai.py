"""Replies of OpenAI chat and completions; a test named `trap_n` is a known parser trap."""

import json
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokentape.traces import schema, wire
from tokentape.traces.schema import (
    DONE,
    EMPTY,
    ERROR,
    FINISH,
    OTHER,
    PING,
    REASONING,
    ROLE,
    TEXT,
    TOOL,
    USAGE,
)
from tokentape.traces.wire.reply import WHOLE_LIMIT, Reply

CANARY = "CANARY do not keep this"
END = "[DONE]"


def message(value: Any, event: str = "") -> bytes:
    data = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return (f"event: {event}\n" if event else "").encode() + f"data: {data}\n\n".encode()


def chunk(choices: list[Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "model": "m", "choices": choices or [], **more}


def chat(
    index: int = 0, finish: str | None = None, ids: Any = None, **delta: Any
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish, "token_ids": ids}


def usage(prompt: int, output: int, **more: Any) -> dict[str, Any]:
    total = prompt + output
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": total, **more}


def read(
    parts: list[bytes],
    *,
    complete: bool = True,
    status: int = 200,
    wire_format: str = "openai.chat",
    kind: str = "text/event-stream; charset=utf-8",
    encoding: str = "",
    stream: bool = True,
    same_read: bool = False,
) -> Reply:
    """Part i comes with read i at the time 1000 + i."""
    parser = wire.reply_parser(wire_format, stream, status, kind, encoding)
    for i, part in enumerate(parts):
        parser.feed(part, 1000 if same_read else 1000 + i, 0 if same_read else i)
    reply = parser.finish(9000, complete)
    fits_the_schema(reply)
    return reply


def fits_the_schema(reply: Reply) -> None:
    for name, value in reply.columns.items():
        assert value is not None
        pa.array([value], schema.BY_NAME[name].type)
    for name, values in {"ntok": reply.ntok, "cls": reply.cls, "choice": reply.choice}.items():
        pa.array([None if values is None else list(values)], schema.BY_NAME[name].type)
    assert len(reply.t_ns) == len(reply.ntok) == len(reply.cls)
    assert reply.choice is None or len(reply.choice) == len(reply.cls)
    assert len(reply.aux_t_ns) == len(reply.aux_cls)
    if reply.columns.get("ntok_source") in ("token_ids", "usage_cumulative", "usage_spread"):
        assert sum(reply.ntok) == reply.columns["output_tokens"]


def facts(reply: Reply) -> dict[str, Any]:
    """All that does not depend on time."""
    return {
        "columns": reply.columns,
        "events": (list(reply.ntok), bytes(reply.cls), reply.choice and bytes(reply.choice)),
        "aux": bytes(reply.aux_cls),
        "end": (reply.stream_error, reply.done),
    }


VLLM = [
    message(chunk([chat(role="assistant", content="")], prompt_token_ids=None)),
    message(chunk([chat(content=" zwölf")])),
    message(chunk([chat(content=" 你好😀")])),
    message(chunk([chat(content=" c", finish="length")])),
    message(chunk(usage=usage(11, 3))),
    message(END),
]


def test_a_vllm_stream_is_read_in_full() -> None:
    reply = read(VLLM)
    assert list(reply.t_ns) == [1001, 1002, 1003]
    assert list(reply.aux_t_ns) == [1000, 1004, 1005]
    assert list(reply.aux_cls) == [ROLE, USAGE, DONE]
    assert (reply.first_content_ns, reply.first_answer_ns, reply.last_content_ns) == (
        1001,
        1001,
        1003,
    )
    assert reply.done
    assert not reply.stream_error
    assert reply.choice is None
    assert reply.columns == {
        "model": "m",
        "response_id": "chatcmpl-1",
        "response_bytes": sum(map(len, VLLM)),
        "input_tokens": 11,
        "input_tokens_source": "usage",
        "output_tokens": 3,
        "output_tokens_source": "usage",
        "ntok_source": "usage_spread",
        "usage_raw": '{"prompt_tokens":11,"completion_tokens":3,"total_tokens":14}',
        "finish_reason": ["length"],
        "parse_status": "ok",
        "coalesced_reads": 0,
    }


# As a transformers server sent it: no end mark, usage on the last message, whose delta is empty.
TRANSFORMERS = [
    b'data: {"id":"b4","choices":[{"delta":{"role":"assistant"},"index":0}],"model":"/m@main"}\n\n',
    b'data: {"id":"b4","choices":[{"delta":{"content":"riti"},"index":0}],"model":"/m@main"}\n\n',
    b'data: {"id":"b4","choices":[{"delta":{"content":" zac"},"index":0}],"model":"/m@main"}\n\n',
    (
        b'data: {"id":"b4","choices":[{"delta":{},"index":0,"finish_reason":"length"}],'
        b'"model":"/m@main","usage":{"completion_tokens":2,"prompt_tokens":4,"total_tokens":6}}\n\n'
    ),
]


def test_trap_9_a_stream_without_its_end_mark_is_done_by_its_finish_reason() -> None:
    reply = read(TRANSFORMERS)
    assert list(reply.cls) == [TEXT, TEXT]
    assert list(reply.aux_cls) == [ROLE, FINISH]
    assert reply.done
    assert reply.columns["output_tokens"] == sum(reply.ntok) == 2
    assert reply.columns["finish_reason"] == ["length"]
    assert reply.columns["parse_status"] == "ok"


def test_trap_9_messages_behind_the_end_mark_are_still_read() -> None:
    late = [*VLLM[:4], message(END), VLLM[4], b": bye\n\n", message(END)]
    reply = read(late)
    assert list(reply.aux_cls) == [ROLE, DONE, USAGE, PING, DONE]
    assert reply.columns["output_tokens"] == 3
    assert reply.done


@pytest.mark.parametrize("parts", [VLLM, TRANSFORMERS])
def test_trap_1_and_3_a_stream_split_at_every_byte_is_read_the_same(parts: list[bytes]) -> None:
    stream = b"".join(parts)
    expected = facts(read([stream]))
    for cut in range(len(stream)):
        reply = read([stream[:cut], stream[cut:]], same_read=True)
        assert facts(reply) == expected, cut
    assert facts(read([bytes([b]) for b in stream], same_read=True)) == expected


def test_trap_3_an_event_has_the_time_of_the_read_that_completes_it() -> None:
    event = message(chunk([chat(content="a")]))
    parser = wire.reply_parser("openai.chat", True, 200, "text/event-stream", "")
    for i, byte in enumerate(event):
        assert not parser.t_ns
        parser.feed(bytes([byte]), i, i)
    assert list(parser.t_ns) == [len(event) - 1]


def test_trap_2_events_of_one_read_share_its_time_and_the_read_is_counted() -> None:
    reply = read([VLLM[0] + VLLM[1] + VLLM[2], VLLM[3] + VLLM[4], VLLM[5]])
    assert list(reply.t_ns) == [1000, 1000, 1001]
    assert reply.columns["coalesced_reads"] == 1


LINE_ENDS = [
    (b"\n", b"\n"),
    (b"\r\n", b"\r\n"),
    (b"\r", b"\r"),
    (b"\n", b"\r\n"),
    (b"\r\n", b"\n"),
    (b"\r", b"\r\n"),
    (b"\n", b"\r"),
]


@pytest.mark.parametrize("ends", LINE_ENDS)
def test_trap_4_any_line_ends_are_read_the_same(ends: tuple[bytes, bytes]) -> None:
    parts = [part.removesuffix(b"\n\n") + b"".join(ends) for part in VLLM]
    expected = facts(read(VLLM))
    expected["columns"] = expected["columns"] | {"response_bytes": sum(map(len, parts))}
    assert facts(read(parts)) == expected


def test_trap_5_data_without_its_space_and_data_on_several_lines() -> None:
    pretty = b"\n".join(
        b"data:" + line
        for line in json.dumps(chunk([chat(content="a\nb")]), indent=1).encode().split(b"\n")
    )
    reply = read([VLLM[0].replace(b"data: ", b"data:"), pretty + b"\n\n", b"data:[DONE]\n\n"])
    assert list(reply.cls) == [TEXT]
    assert list(reply.aux_cls) == [ROLE, DONE]
    assert reply.columns["parse_status"] == "ok"


def test_trap_6_comments_and_pings_are_aux_and_never_the_first_content() -> None:
    pings = [b": keep-alive\n\n", message("{}", "ping"), message('{"type": "ping"}', "ping")]
    reply = read([*pings, b"data:\n\n", *VLLM])
    assert list(reply.aux_cls) == [PING, PING, PING, PING, ROLE, USAGE, DONE]
    assert reply.first_content_ns == 1005
    assert reply.columns["parse_status"] == "ok"


@pytest.mark.parametrize(
    "delta",
    [
        {"role": "assistant", "content": ""},
        {"role": "assistant"},
        {"role": "assistant", "content": None},
    ],
)
def test_trap_7_a_role_is_never_the_first_content(delta: dict[str, Any]) -> None:
    reply = read([message(chunk([chat(**delta)])), *VLLM[1:]])
    assert reply.aux_cls[0] == ROLE
    assert reply.first_content_ns == 1001


def test_trap_7_a_role_beside_text_does_not_hide_it() -> None:
    parts = [message(chunk([chat(role="assistant", content="a")])) for _ in range(3)]
    assert list(read(parts).cls) == [TEXT] * 3


def test_trap_7_a_role_is_not_promoted_before_an_empty_text() -> None:
    empty = message(chunk([chat(role="assistant", content="")]))
    reply = read([empty, empty, VLLM[1], message(chunk(usage=usage(1, 2)))])
    assert list(reply.cls) == [EMPTY, TEXT]
    assert list(reply.t_ns) == [1001, 1002]
    assert list(reply.aux_cls) == [ROLE, USAGE]


def test_trap_8_usage_null_on_every_message_and_real_at_the_end() -> None:
    parts = [message(chunk([chat(content="a")], usage=None)) for _ in range(3)]
    reply = read([*parts, message(chunk(usage=usage(5, 3)))])
    assert reply.columns["output_tokens"] == 3
    assert reply.columns["ntok_source"] == "usage_spread"


def test_trap_8_usage_on_a_message_with_content() -> None:
    parts = [
        message(chunk([chat(content="a")])),
        message(chunk([chat(content="b")], usage=usage(5, 2))),
    ]
    reply = read(parts)
    assert list(reply.ntok) == [1, 1]
    assert list(reply.aux_cls) == []
    assert reply.columns["ntok_source"] == "usage_spread"


def test_trap_8_usage_repeated_on_every_message_counts_up_and_the_last_wins() -> None:
    counts = [1, 4, 5]
    parts = [message(chunk([chat(content="a")], usage=usage(9, n))) for n in counts]
    reply = read([message(chunk([chat(role="assistant", content="")], usage=usage(9, 0))), *parts])
    assert list(reply.ntok) == [1, 3, 1]
    assert reply.columns["ntok_source"] == "usage_cumulative"
    assert reply.columns["output_tokens"] == 5


def test_trap_8_usage_beside_an_empty_delta_is_no_event() -> None:
    finish, late = message(chunk([chat(finish="stop")])), message(chunk([chat(content="")]))
    told = message(chunk([chat()], usage=usage(5, 5)))
    reply = read([*VLLM[:4], late, told, late, VLLM[5]])
    assert list(reply.cls) == [TEXT] * 3
    assert list(reply.aux_cls) == [ROLE, OTHER, USAGE, OTHER, DONE]
    reply = read([*VLLM[:3], finish, late, told, VLLM[5]])
    assert list(reply.cls) == [TEXT, TEXT, EMPTY]
    assert list(reply.t_ns) == [1001, 1002, 1003]


def test_trap_8_a_count_that_runs_backwards_is_only_a_total() -> None:
    parts = [message(chunk([chat(content="a")], usage=usage(9, n))) for n in (1, 3, 2)]
    reply = read(parts)
    assert list(reply.ntok) == [1, 1, 0]
    assert reply.columns["ntok_source"] == "usage_spread"


def test_an_empty_text_is_an_event_when_the_usage_rises_with_it() -> None:
    parts = [
        message(chunk([chat(content=t)], usage=usage(9, n)))
        for t, n in [("a", 1), ("", 2), ("", 2), ("b", 3)]
    ]
    parser = wire.reply_parser("openai.chat", True, 200, "text/event-stream", "")
    for i, part in enumerate(parts):
        parser.feed(part, i, i)
    assert list(parser.cls) == [TEXT, EMPTY, TEXT]  # known at once, not only at the end
    reply = parser.finish(9, True)
    assert list(reply.t_ns) == [0, 1, 3]
    assert list(reply.ntok) == [1, 1, 1]


def test_no_usage_leaves_one_token_per_event_and_says_so() -> None:
    reply = read(VLLM[:4])
    assert reply.columns["ntok_source"] == "one_per_event"
    assert (reply.columns["output_tokens"], reply.columns["output_tokens_source"]) == (3, "events")
    assert "input_tokens" not in reply.columns


@pytest.mark.parametrize("kept", range(len(VLLM)))
def test_trap_12_a_cut_stream_keeps_what_came_before(kept: int) -> None:
    cut = VLLM[kept][: len(VLLM[kept]) // 2]
    reply = read([*VLLM[:kept], cut], complete=False)
    assert reply.columns["parse_status"] == "partial"
    assert reply.done == (kept >= 4)
    assert len(reply.t_ns) == max(0, min(3, kept - 1))
    assert list(reply.aux_cls) == [ROLE, USAGE][: (kept > 0) + (kept > 4)]
    if not reply.t_ns:
        assert "output_tokens" not in reply.columns  # not known, which is not 0
        assert reply.first_content_ns is None


def test_trap_12_a_cut_behind_the_end_mark_loses_nothing() -> None:
    reply = read(VLLM, complete=False)
    assert reply.done
    assert reply.columns["parse_status"] == "ok"


@given(st.integers(0, sum(map(len, VLLM))))
def test_trap_12_events_of_a_stream_cut_anywhere_are_a_beginning_of_the_whole(cut: int) -> None:
    whole, reply = read([b"".join(VLLM)]), read([b"".join(VLLM)[:cut]], complete=False)
    assert whole.cls.startswith(reply.cls)
    assert whole.aux_cls.startswith(reply.aux_cls)
    assert reply.columns["parse_status"] in ("partial", "ok")


ERRORS = [
    (
        message({"error": {"message": CANARY, "type": "BadRequestError", "code": 400}}),
        "BadRequestError",
    ),
    (message({"object": "error", "message": CANARY, "type": "Internal", "code": 500}), "Internal"),
    (message({"error": {"message": CANARY, "type": None, "code": 429}}), "429"),
    (message({"error": {"message": CANARY, "type": CANARY, "code": "rate_limit"}}), "rate_limit"),
    (message({"error": CANARY}), "error"),
    (message({"message": CANARY, "type": "overloaded"}, "error"), "overloaded"),
    (message(CANARY, "error"), "error"),
    (message("", "error"), "error"),
    (
        message(chunk([chat(finish="error", content="")], error={"code": 502, "message": CANARY})),
        "502",
    ),
]


@pytest.mark.parametrize(("error", "name"), ERRORS)
def test_trap_13_an_error_under_status_200_is_an_error(error: bytes, name: str) -> None:
    reply = read([*VLLM[:2], error])
    assert reply.stream_error
    assert reply.columns["error_type"] == name
    assert list(reply.aux_cls) == [ROLE, ERROR]
    assert list(reply.cls) == [TEXT]
    assert "CANARY" not in repr(reply)


def test_trap_14_token_ids_tell_the_tokens_of_each_event() -> None:
    texts = [("a", [1]), ("bcd", [2, 3, 4]), ("", [5]), ("", []), ("held", [])]
    parts = [message(chunk([chat(content=t, ids=ids)])) for t, ids in texts]
    parts[0] = message(chunk([chat(content="a", ids=[1])], prompt_token_ids=[7, 8, 9]))
    reply = read(parts)
    assert list(reply.cls) == [TEXT, TEXT, EMPTY, TEXT]
    assert list(reply.ntok) == [1, 3, 1, 0]
    assert reply.columns["ntok_source"] == "token_ids"
    assert (reply.columns["output_tokens"], reply.columns["output_tokens_source"]) == (
        5,
        "token_ids",
    )
    assert (reply.columns["input_tokens"], reply.columns["input_tokens_source"]) == (3, "token_ids")


def test_trap_14_and_24_merged_tokens_are_found_by_the_usage_total() -> None:
    texts = [" one", " two", " three four five", " six"]
    parts = [message(chunk([chat(content=t)])) for t in texts]
    reply = read([*parts, message(chunk(usage=usage(1, 6)))])
    assert list(reply.ntok) == [1, 1, 3, 1]
    assert reply.columns["ntok_source"] == "usage_spread"


def test_more_tokens_than_one_event_can_hold_are_said_to_be_short() -> None:
    reply = read([message(chunk([chat(content="a")])), message(chunk(usage=usage(1, 70_000)))])
    assert list(reply.ntok) == [65_535]
    assert reply.columns["ntok_source"] == "usage_spread_short"


def test_trap_15_tokens_of_which_a_parser_let_no_text_out_are_an_event_of_their_own() -> None:
    parts = [
        message(chunk([chat(content="")], usage=usage(5, 3))),
        message(chunk([chat(content="ab")], usage=usage(5, 4))),
        message(chunk([chat(content="", finish="stop")], usage=usage(5, 4))),
    ]
    reply = read(parts)
    assert (list(reply.cls), list(reply.ntok)) == ([EMPTY, TEXT], [3, 1])
    assert (reply.first_content_ns, reply.first_answer_ns) == (1000, 1001)
    assert reply.columns["output_tokens"] == 4


def test_trap_19_a_stop_sequence_left_out_of_the_text_is_in_the_last_event() -> None:
    parts = [
        message(chunk([chat(content="a")])),
        message(chunk([chat(content="", finish="stop")])),
        message(chunk(usage=usage(5, 2))),
    ]
    reply = read(parts)
    assert (list(reply.cls), list(reply.ntok)) == ([TEXT, EMPTY], [1, 1])
    assert reply.columns["output_tokens"] == 2


def test_trap_16_interleaved_choices_are_told_apart_and_usage_is_their_sum() -> None:
    parts = [message(chunk([chat(i, role="assistant", content="")])) for i in (0, 1)]
    parts += [message(chunk([chat(i, content="a")])) for i in (0, 1, 1, 0, 1)]
    parts += [message(chunk([chat(0, content="b"), chat(1, content="b")]))]
    parts += [message(chunk([chat(1, content="", finish="stop")]))]
    parts += [message(chunk([chat(0, content="", finish="length")]))]
    reply = read([*parts, message(chunk(usage=usage(4, 7))), message(END)])
    assert reply.choice is not None
    assert list(reply.choice) == [0, 1, 1, 0, 1, 0, 1]
    assert sum(reply.ntok) == 7
    assert reply.columns["finish_reason"] == ["length", "stop"]
    assert list(reply.aux_cls) == [ROLE, ROLE, FINISH, FINISH, USAGE, DONE]


def test_trap_16_usage_that_counts_up_for_each_choice() -> None:
    parts = [
        message(chunk([chat(i, content="a")], usage=usage(4, n)))
        for i, n in [(0, 1), (1, 1), (0, 2), (1, 4)]
    ]
    cut = read(parts, complete=False)
    assert list(cut.ntok) == [1, 1, 1, 3]
    assert cut.columns["output_tokens"] == 6
    whole = read([*parts, message(chunk(usage=usage(4, 6)))])
    assert list(whole.ntok) == [1, 1, 1, 3]
    assert whole.columns["ntok_source"] == "usage_cumulative"


def test_trap_16_one_finished_choice_of_two_is_not_done() -> None:
    reply = read(
        [
            message(chunk([chat(0, content="a")])),
            message(chunk([chat(1, content="b", finish="stop")])),
        ]
    )
    assert not reply.done
    assert reply.columns["finish_reason"] == [None, "stop"]


def test_trap_20_an_empty_completion_has_no_first_content_and_is_recorded() -> None:
    reply = read(
        [VLLM[0], message(chunk([chat(finish="stop")])), message(chunk(usage=usage(3, 0))), VLLM[5]]
    )
    assert reply.first_content_ns is None
    assert list(reply.aux_cls) == [ROLE, FINISH, USAGE, DONE]
    assert reply.columns["output_tokens"] == 0
    assert reply.done


def test_trap_21_a_byte_order_mark_is_skipped() -> None:
    reply = read([b"\xef", b"\xbb\xbf" + VLLM[0], *VLLM[1:]])
    assert list(reply.aux_cls) == [ROLE, USAGE, DONE]
    assert len(reply.t_ns) == 3


def test_trap_22_an_event_over_the_cap_is_marked_and_later_ones_are_read() -> None:
    huge = message(chunk([chat(content="x" * (5 << 20))]))
    reply = read([VLLM[0], huge[: 3 << 20], huge[3 << 20 :], *VLLM[1:]])
    assert reply.columns["parse_status"] == "truncated"
    assert reply.columns["response_bytes"] == sum(map(len, VLLM)) + len(huge)
    assert list(reply.t_ns) == [1003, 1004, 1005]
    assert list(reply.aux_cls) == [ROLE, OTHER, USAGE, DONE]


def test_trap_23_an_empty_text_that_stands_for_a_token_is_found_by_the_usage_total() -> None:
    empty = message(chunk([chat(content="")]))
    reply = read([*VLLM[:2], empty, *VLLM[2:4], message(chunk(usage=usage(1, 4)))])
    assert list(reply.cls) == [TEXT, EMPTY, TEXT, TEXT]
    assert list(reply.t_ns) == [1001, 1002, 1003, 1004]
    assert list(reply.ntok) == [1, 1, 1, 1]
    assert list(reply.aux_cls) == [ROLE, USAGE]


def test_trap_23_an_empty_finish_is_promoted_last() -> None:
    finish = message(chunk([chat(content="", finish="length")]))
    for output, classes in [(1, [TEXT]), (2, [TEXT, EMPTY])]:
        reply = read([*VLLM[:2], finish, message(chunk(usage=usage(1, output)))])
        assert list(reply.cls) == classes
        assert (
            list(reply.aux_cls) == [ROLE, FINISH, USAGE][: 4 - output]
            if output == 1
            else [ROLE, USAGE]
        )
        assert reply.columns["finish_reason"] == ["length"]


def test_trap_23_an_empty_text_without_a_missing_token_stays_aux() -> None:
    empty = message(chunk([chat(content="")]))
    reply = read([*VLLM[:2], empty, *VLLM[2:]])
    assert list(reply.cls) == [TEXT] * 3
    assert list(reply.aux_cls) == [ROLE, OTHER, USAGE, DONE]


def test_reasoning_that_was_never_sent_is_not_spread_over_the_answer() -> None:
    finish = message(chunk([chat(finish="stop")]))
    told = usage(9, 503, completion_tokens_details={"reasoning_tokens": 500})
    reply = read([*VLLM[:4], finish, message(chunk(usage=told))])
    assert list(reply.ntok) == [1, 1, 1]
    assert reply.columns["ntok_source"] == "usage_spread_short"
    assert (reply.columns["output_tokens"], reply.columns["reasoning_tokens"]) == (503, 500)


@pytest.mark.parametrize(
    ("delta", "cls"),
    [
        ({"content": "a"}, TEXT),
        ({"refusal": "no"}, TEXT),
        ({"reasoning_content": "hm"}, REASONING),
        ({"reasoning": "hm", "content": ""}, REASONING),
        ({"reasoning_content": "hm", "content": "a"}, TEXT),
        (
            {"tool_calls": [{"index": 0, "id": "x", "function": {"name": "f", "arguments": ""}}]},
            TOOL,
        ),
        ({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}], "content": None}, TOOL),
        ({"tool_calls": [{"index": 0, "custom": {"input": "x"}}]}, TOOL),
        ({"function_call": {"name": "f", "arguments": "{"}}, TOOL),
        ({"content": [{"type": "text", "text": "a"}]}, TEXT),
        (
            {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "a"}]}]},
            REASONING,
        ),
    ],
)
def test_the_class_of_an_event_is_what_it_carries(delta: dict[str, Any], cls: int) -> None:
    reply = read([message(chunk([chat(**delta)]))])
    assert list(reply.cls) == [cls]
    assert (reply.first_answer_ns is None) == (cls == REASONING)
    assert reply.first_content_ns == 1000


def test_tool_calls_without_arguments_are_no_events() -> None:
    reply = read([message(chunk([chat(tool_calls=[{"index": 0, "function": {"arguments": ""}}])]))])
    assert list(reply.aux_cls) == [OTHER]


def test_a_completions_stream() -> None:
    parts = [
        message(
            {"id": "cmpl-1", "model": "m", "choices": [{"index": 0, "text": t, "finish_reason": f}]}
        )
        for t, f in [("a", None), ("", None), ("b", None), ("", "stop")]
    ]
    reply = read([*parts, message(chunk(usage=usage(2, 2)))], wire_format="openai.completions")
    assert list(reply.t_ns) == [1000, 1002]
    assert list(reply.aux_cls) == [OTHER, FINISH, USAGE]
    assert reply.columns["finish_reason"] == ["stop"]


TIMING = {
    "time_to_first_token_ms": 85.2,
    "generation_time_ms": 1240.5,
    "queue_time_ms": 12.3,
    "mean_itl_ms": None,
}
SERVER_NS = {
    "server_prefill_ns": 85_200_000,
    "server_decode_ns": 1_240_500_000,
    "server_queue_ns": 12_300_000,
}


@pytest.mark.parametrize(
    ("last", "source"),
    [
        (chunk(usage=usage(1, 1), metrics=TIMING), "metrics"),
        (chunk(usage=usage(1, 1, metrics=TIMING)), "usage.metrics"),
    ],
)
def test_the_servers_own_times_are_taken(last: dict[str, Any], source: str) -> None:
    reply = read([VLLM[1], message(last)])
    assert SERVER_NS.items() <= reply.columns.items()
    assert reply.columns["server_timing_source"] == source
    body = json.dumps({**last, "choices": [{"index": 0, "message": {"content": "a"}}]}).encode()
    whole = read([body], kind="application/json", stream=False)
    assert SERVER_NS.items() <= whole.columns.items()


def test_cached_and_reasoning_tokens_and_numbers_alone_of_the_usage() -> None:
    told = usage(
        90,
        1,
        prompt_tokens_details={"cached_tokens": 64, "note": CANARY},
        completion_tokens_details={"reasoning_tokens": 0},
        note=CANARY,
        flag=True,
        cost=0.5,
        inner={"note": CANARY},
        large=1 << 70,
        **{CANARY: 3},
    )
    reply = read([VLLM[1], message(chunk(usage=told))])
    assert reply.columns["cached_tokens"] == 64
    assert reply.columns["cached_tokens_source"] == "usage"
    assert reply.columns["reasoning_tokens"] == 0
    assert json.loads(reply.columns["usage_raw"]) == {
        "prompt_tokens": 90,
        "completion_tokens": 1,
        "total_tokens": 91,
        "prompt_tokens_details": {"cached_tokens": 64},
        "completion_tokens_details": {"reasoning_tokens": 0},
        "cost": 0.5,
    }


WHOLE = {
    "id": "chatcmpl-2",
    "model": "m",
    "choices": [
        {"index": 1, "message": {"role": "assistant", "content": CANARY}, "finish_reason": "stop"},
        {
            "index": 0,
            "message": {"role": "assistant", "content": CANARY},
            "finish_reason": "length",
        },
    ],
    "usage": usage(3, 8),
}


def test_a_whole_reply_has_counts_but_no_events() -> None:
    body = json.dumps(WHOLE).encode()
    reply = read([body[:50], body[50:]], kind="application/json", stream=False)
    assert reply.first_content_ns is None
    assert len(reply.t_ns) == len(reply.aux_t_ns) == 0
    assert reply.done
    assert reply.columns["output_tokens"] == 8
    assert reply.columns["finish_reason"] == ["length", "stop"]
    assert "ntok_source" not in reply.columns
    assert "CANARY" not in repr(reply)


def test_a_whole_reply_without_usage_counts_its_token_ids() -> None:
    body = {
        "choices": [{"index": i, "token_ids": [1, 2, 3]} for i in (0, 1)],
        "prompt_token_ids": [1],
    }
    reply = read([json.dumps(body).encode()], kind="application/json", stream=False)
    assert (reply.columns["output_tokens"], reply.columns["output_tokens_source"]) == (
        6,
        "token_ids",
    )
    assert reply.columns["input_tokens"] == 1


def test_a_whole_reply_that_was_cut_or_is_too_long_says_so() -> None:
    body = json.dumps(WHOLE).encode()
    assert (
        read([body[:-9]], kind="application/json", complete=False).columns["parse_status"]
        == "partial"
    )
    huge = [b" " * WHOLE_LIMIT, body]
    reply = read(huge, kind="application/json")
    assert reply.columns["parse_status"] == "truncated"
    assert reply.columns["response_bytes"] == sum(map(len, huge))


@pytest.mark.parametrize(
    ("body", "name", "status"),
    [
        (
            {"error": {"message": CANARY, "type": "NotFoundError", "code": 404}},
            "NotFoundError",
            "ok",
        ),
        (
            {"object": "error", "message": CANARY, "type": "BadRequestError"},
            "BadRequestError",
            "ok",
        ),
        ({"detail": CANARY}, "404", "ok"),
        (CANARY, "404", "unknown_format"),
    ],
)
def test_an_error_status_gives_the_class_of_the_error(body: Any, name: str, status: str) -> None:
    reply = read([json.dumps(body).encode()], kind="application/json", status=404)
    assert reply.stream_error
    assert not reply.done
    assert reply.columns["error_type"] == name
    assert reply.columns["parse_status"] == status
    assert "CANARY" not in repr(reply)


def test_an_error_object_in_a_whole_reply_of_status_200_is_an_error() -> None:
    reply = read(
        [b'{"error": {"type": "x", "message": "y"}}'], kind="application/json", stream=False
    )
    assert reply.stream_error
    assert reply.columns["error_type"] == "x"


def test_an_error_page_answers_a_streamed_request() -> None:
    reply = read([b"<html>502</html>"], kind="text/html", status=502)
    assert reply.columns == {
        "error_type": "502",
        "parse_status": "unknown_format",
        "response_bytes": 16,
    }


def test_identity_is_no_encoding() -> None:
    assert read(VLLM, encoding="identity").columns["parse_status"] == "ok"


@pytest.mark.parametrize("kind", ["text/plain", "", "application/octet-stream"])
def test_a_stream_under_a_wrong_content_type_is_read(kind: str) -> None:
    assert len(read(VLLM, kind=kind).t_ns) == 3


def test_what_is_no_stream_at_all_is_an_unknown_format() -> None:
    for body in (b"hello world", b"", b"data: hello\n\n", b"data: 12\n\n"):
        assert read([body]).columns["parse_status"] == "unknown_format"
    assert read([b"x"], wire_format="unknown").columns["parse_status"] == "unknown_format"


def test_a_message_that_is_no_json_is_marked_and_the_rest_is_read() -> None:
    reply = read([*VLLM[:2], b"data: {broken\n\n", *VLLM[2:]])
    assert len(reply.t_ns) == 3
    assert list(reply.aux_cls) == [ROLE, OTHER, USAGE, DONE]
    assert reply.columns["parse_status"] == "error"


def test_fields_of_a_wrong_type_do_not_spoil_their_message() -> None:
    odd = {
        "index": "0",
        "delta": {"content": "a", "role": 5, "tool_calls": "x"},
        "token_ids": [1.5],
    }
    parts = [
        message({"id": 7, "model": "m", "choices": [odd, 3], "usage": "much", "error": None}),
        message({"choices": [{"delta": {"content": "b"}}]}),
        b'data: {"choices":[{"index":0,"delta":{"content":"\\ud800 lone"}}]}\n\n',
        b'data: {"choices":[{"index":0,"delta":{"content":"bad \xff byte"}}]}\n\n',
        message({"choices": [{"delta": {"content": "c"}}], "usage": {"completion_tokens": "4"}}),
        message(chunk(usage={"completion_tokens": 5.0, "prompt_tokens": -1})),
    ]
    reply = read(parts)
    assert list(reply.cls) == [TEXT] * 5
    assert reply.columns["parse_status"] == "ok"
    assert reply.columns["model"] == "m"
    assert reply.columns["output_tokens"] == 5
    assert "input_tokens" not in reply.columns


def test_a_filter_result_before_the_stream_is_no_event() -> None:
    first = message({"id": "", "model": "", "choices": [], "prompt_filter_results": [{"x": 1}]})
    reply = read([first, *VLLM])
    assert list(reply.aux_cls) == [OTHER, ROLE, USAGE, DONE]
    assert reply.columns["model"] == "m"


def test_live_arrays_can_be_read_between_feeds() -> None:
    parser = wire.reply_parser("openai.chat", True, 200, "text/event-stream", "")
    seen = []
    for i, part in enumerate(VLLM):
        parser.feed(part, i, i)
        seen.append((len(parser.t_ns), len(parser.ntok), len(parser.choice), len(parser.aux_cls)))
    assert seen == [
        (0, 0, 0, 1),
        (1, 1, 1, 1),
        (2, 2, 2, 1),
        (3, 3, 3, 1),
        (3, 3, 3, 2),
        (3, 3, 3, 3),
    ]


DELTAS = st.fixed_dictionaries(
    {},
    optional={
        "role": st.just("assistant"),
        "content": st.sampled_from(["", " wort", "é€😀", None, "x" * 30]),
        "reasoning_content": st.sampled_from(["", "hm", None]),
        "tool_calls": st.just([{"index": 0, "function": {"arguments": "{"}}]),
    },
)
CHOICES = st.builds(
    lambda index, delta, finish, ids: {
        "index": index,
        "delta": delta,
        "finish_reason": finish,
        "token_ids": ids,
    },
    st.integers(0, 2),
    DELTAS,
    st.sampled_from([None, None, "stop"]),
    st.sampled_from([None, [], [1], [1, 2]]),
)
CHUNKS = st.builds(
    lambda choices, told: chunk(choices, usage=told),
    st.lists(CHOICES, max_size=2),
    st.one_of(st.none(), st.builds(usage, st.integers(0, 50), st.integers(0, 50))),
)
MESSAGES = st.one_of(
    CHUNKS.map(json.dumps),
    CHUNKS.map(lambda c: json.dumps(c, indent=0)),
    st.sampled_from([END, '{"error": {"type": "x"}}', "{broken", "", "7"]),
)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    out = b""
    for text in draw(st.lists(MESSAGES, max_size=8)):
        line_end, blank = draw(st.sampled_from(LINE_ENDS))
        space = draw(st.sampled_from([b"data: ", b"data:"]))
        out += b"".join(space + line.encode() + line_end for line in text.split("\n")) + blank
        out += draw(st.sampled_from([b"", b"", b": c" + line_end]))
    return out


@settings(max_examples=120, deadline=None)
@given(streams(), st.data())
def test_any_stream_cut_at_random_is_read_the_same(stream: bytes, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=10).map(sorted))
    pieces = [stream[a:b] for a, b in pairwise([0, *cuts, len(stream)])]
    complete = data.draw(st.booleans())
    pieced = read(pieces, same_read=True, complete=complete)
    assert facts(pieced) == facts(read([stream], same_read=True, complete=complete))


@settings(deadline=None)
@given(streams())
def test_the_events_of_any_stream_add_up_or_say_why_not(stream: bytes) -> None:
    reply = read([stream])
    source = reply.columns.get("ntok_source", "")
    if not source.endswith(("_short", "_over")) and source:
        assert sum(reply.ntok) == reply.columns["output_tokens"]
    assert list(reply.t_ns) == sorted(reply.t_ns)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
REPLY_KEYS = ["choices", "usage", "error", "metrics", "id", "model", "object", "prompt_token_ids"]
CHOICE_KEYS = ["index", "delta", "text", "finish_reason", "token_ids", "completion_tokens"]
DELTA_KEYS = ["role", "content", "reasoning", "tool_calls", "function", "arguments", "thinking"]
KEYS = st.sampled_from([*REPLY_KEYS, *CHOICE_KEYS, *DELTA_KEYS])
NONSENSE = st.recursive(
    JSON,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=120, deadline=None)
@given(NONSENSE, st.binary(max_size=30), st.sampled_from([200, 500]))
def test_nothing_that_a_server_sends_raises(value: Any, junk: bytes, status: int) -> None:
    body = json.dumps(value).encode()
    parts = [b"data: " + body + b"\n\n", junk, b"\n\ndata: " + junk]
    read(parts, status=status, complete=False)
    read([body], status=status, kind="application/json")
    read([junk], status=status, kind="application/json")


def test_a_choice_below_zero_does_not_raise_where_it_stands_for_a_token() -> None:
    end = chat(index=-1, finish="stop", content="")
    reply = read([*VLLM[:2], message(chunk([end])), message(chunk(usage=usage(1, 2)))])
    assert bytes(reply.choice or b"") == b"\x00\xff"


def test_the_timings_of_llama_cpp_are_the_servers_times() -> None:
    timings = {"cache_n": 3, "prompt_n": 8, "prompt_ms": 12.5, "predicted_ms": 250.0}
    end = chunk([chat(finish="stop")], timings=timings)
    body = json.dumps({"choices": [{"index": 0}], "timings": timings}).encode()
    for reply in (read([*VLLM[:3], message(end)]), read([body], kind="application/json")):
        assert reply.columns["server_prefill_ns"] == 12_500_000
        assert reply.columns["server_decode_ns"] == 250_000_000
        assert reply.columns["server_timing_source"] == "timings"


def test_a_number_without_end_does_not_raise() -> None:
    endless = b'data: {"choices": [], "metrics": {"queue_time_ms": ' + b"9" * 6_000 + b"}}\n\n"
    reply = read([*VLLM[:4], endless])
    assert len(reply.t_ns) == 3
    assert reply.columns["parse_status"] == "error"


def test_depth_without_end_does_not_raise() -> None:
    deep = b"[" * 100_000
    read([b'data: {"choices":' + deep + b"\n\n"])
    read([deep], kind="application/json")


def test_no_text_of_a_reply_is_in_any_field() -> None:
    deltas: list[dict[str, Any]] = [
        {"role": CANARY, "content": CANARY},
        {"reasoning_content": CANARY},
        {"reasoning": CANARY},
        {"refusal": CANARY},
        {"content": [{"type": "text", "text": CANARY}]},
        {"tool_calls": [{"id": CANARY, "function": {"name": CANARY, "arguments": CANARY}}]},
        {"function_call": {"name": CANARY, "arguments": CANARY}},
        {CANARY: CANARY},
    ]
    parts = [message(chunk([chat(finish=CANARY, **delta)], **{CANARY: CANARY})) for delta in deltas]
    parts += [
        message(chunk([{"index": 0, "text": CANARY}])),
        message(CANARY),
        message(CANARY, CANARY),
    ]
    parts += [f": {CANARY}\n\n".encode(), message(chunk(usage={CANARY: CANARY, "a": {CANARY: 1}}))]
    parts += [error for error, _ in ERRORS]
    for format_ in ("openai.chat", "openai.completions"):
        parser = wire.reply_parser(format_, True, 200, "text/event-stream", "")
        for part in parts:
            parser.feed(part, 0, 0)
        reply = parser.finish(1, True)
        assert len(reply.t_ns) >= 8
        assert "CANARY" not in repr(reply)
        assert reply.columns["finish_reason"] == ["other"]
