"""Requests of Ollama's /api/chat and /api/generate; see `request_body.py`. Streams by default."""

from collections.abc import Iterator
from typing import Any, Final

from tokentape.traces.wire import untrusted
from tokentape.traces.wire.request import Prompt, RequestFacts
from tokentape.traces.wire.request_body import (
    EFFORTS,
    I64,
    MESSAGE_END,
    PART_END,
    ROLE_END,
    TOOLS_END,
    Body,
    Reading,
    columns_of,
    digest,
    encoded,
    extra_json,
    few,
    known,
    prompt_of,
    utf8,
)

_READING: Final = Reading(
    values={
        "model_requested": ("model", untrusted.label),
        "stream": ("stream", untrusted.truth),
        "max_tokens": ("num_predict", untrusted.whole_number),  # below 0: as many as fit
        "temperature": ("temperature", untrusted.real_number),
        "top_p": ("top_p", untrusted.real_number),
        "top_k": ("top_k", untrusted.whole_number),
        "sampling_seed": ("seed", lambda v: untrusted.whole_number(v, I64, -I64)),
    },
    told=frozenset(
        (
            *("messages", "prompt", "system", "template", "context", "images", "tools", "stop"),
            *("format", "logprobs", "top_logprobs"),
        )
    ),
    scalars=frozenset(
        (
            *("num_ctx", "num_batch", "num_keep", "num_gpu", "num_thread", "min_p", "typical_p"),
            *("repeat_last_n", "repeat_penalty", "presence_penalty", "frequency_penalty"),
            *("raw", "truncate", "shift", "think", "keep_alive"),
        )
    ),
    words={"think": EFFORTS},
)


def read_chat(data: bytes | bytearray) -> RequestFacts:
    """Facts of a chat request. Raises: anything, where the body is no JSON object."""
    body = Body(data)
    columns = _columns(body)
    messages, tools = untrusted.objects(body.get("messages")), body.get("tools")
    columns["message_count"] = len(messages)
    columns["image_count"] = few(sum(_count(message.get("images")) for message in messages))
    columns["tool_count"] = few(_count(tools))
    pieces = _conversation(tools, messages) if messages else ()
    return RequestFacts(known(columns), prompt_of(pieces))


def read_generate(data: bytes | bytearray) -> RequestFacts:
    """Facts of a generate request. Raises: anything, where the body is no JSON object."""
    body = Body(data)
    columns = _columns(body)
    columns["image_count"] = few(_count(body.get("images")))
    prompt = body.get("prompt")
    # A context is what a reply before this one gave: tokens, which the new text follows.
    if not isinstance(prompt, str) or body.get("context"):
        return RequestFacts(known(columns))
    pieces = b"".join((*utf8(body.get("system")), *utf8(prompt)))
    return RequestFacts(known(columns), Prompt(text=pieces) if pieces else None)


def _columns(body: Body) -> dict[str, Any]:
    body.lift("options")
    columns = columns_of(body, _READING)
    columns["stream"] = body.get("stream") is not False
    stop, form, think = body.get("stop"), body.get("format"), body.get("think")
    if isinstance(stop, str | list):
        columns["stop_count"] = 1 if isinstance(stop, str) else few(len(stop))
    if isinstance(form, dict):
        columns["response_format"] = "json_schema"
    elif form:
        columns["response_format"] = "json_object" if form == "json" else "other"
    if isinstance(think, str):
        columns["reasoning_effort"] = untrusted.one_of(think, EFFORTS)
    if body.get("logprobs") is True:
        asked = untrusted.whole_number(body.get("top_logprobs"), untrusted.I16_MAX)
        columns["logprobs"] = max(1, asked or 0)
    columns["extra"] = extra_json(body, _READING, {})
    return known(columns)


def _count(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0


def _conversation(tools: Any, messages: list[dict[str, Any]]) -> Iterator[bytes]:
    """The canonical text: tools, then role, thinking, content and calls of each message."""
    if tools and isinstance(tools, list):
        yield encoded(tools)
        yield TOOLS_END
    for message in messages:
        yield from utf8(message.get("role"))
        yield ROLE_END
        yield from utf8(message.get("thinking"))
        yield from utf8(message.get("content"))
        images = message.get("images")
        for image in images if isinstance(images, list) else ():
            yield PART_END + digest(image)
        if calls := untrusted.objects(message.get("tool_calls")):
            yield PART_END + encoded(calls)
        yield MESSAGE_END
