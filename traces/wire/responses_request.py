"""Requests of OpenAI's Responses. What becomes of each key is told in `request_body.py`."""

from collections.abc import Iterator
from typing import Any, Final

from tokentape.traces.wire import untrusted
from tokentape.traces.wire.request import RequestFacts
from tokentape.traces.wire.request_body import (
    EFFORTS,
    MESSAGE_END,
    ROLE_END,
    TOOL_CHOICES,
    TOOLS_END,
    Body,
    Reading,
    columns_of,
    content,
    digest,
    encoded,
    extra_json,
    few,
    known,
    prompt_of,
    session_of,
    utf8,
)

_READING: Final = Reading(
    values={
        "model_requested": ("model", untrusted.label),
        "stream": ("stream", untrusted.truth),
        "max_tokens": ("max_output_tokens", untrusted.whole_number),
        "temperature": ("temperature", untrusted.real_number),
        "top_p": ("top_p", untrusted.real_number),
        "logprobs": ("top_logprobs", lambda v: untrusted.whole_number(v, untrusted.I16_MAX)),
    },
    told=frozenset(("input", "instructions", "tools", "tool_choice", "stream_options")),
    scalars=frozenset(("parallel_tool_calls", "max_tool_calls", "background", "store")),
    words={
        "service_tier": ("auto", "default", "flex", "scale", "priority"),
        "truncation": ("auto", "disabled"),
    },
)
_FORMATS: Final = ("text", "json_object", "json_schema")


def read_responses(data: bytes | bytearray) -> RequestFacts:
    """Facts of a request. Raises: anything, where the body is no JSON object."""
    body = Body(data)
    columns = columns_of(body, _READING)
    asked, tools, choice = body.get("input"), body.get("tools"), body.get("tool_choice")
    items = untrusted.objects(asked)
    kinds = [str(p.get("type")) for i in items for p in untrusted.objects(i.get("content"))]
    columns["message_count"] = 1 if isinstance(asked, str) else len(items)
    columns["image_count"] = few(sum("image" in kind for kind in kinds))
    columns["audio_count"] = few(sum("audio" in kind for kind in kinds))
    columns["tool_count"] = few(len(tools)) if isinstance(tools, list) else 0
    columns["tool_choice"] = (
        "named" if isinstance(choice, dict) else untrusted.one_of(choice, TOOL_CHOICES)
    )
    effort = untrusted.at(body.get("reasoning"), "effort")
    columns["reasoning_effort"] = untrusted.one_of(effort, EFFORTS)
    form = untrusted.at(body.get("text"), "format", "type")
    columns["response_format"] = untrusted.one_of(form, _FORMATS)
    columns["extra"] = extra_json(body, _READING, {})
    # What the server adds of an earlier response is not in the body: no prefix is known then.
    whole = body.get("previous_response_id") is None and body.get("conversation") is None
    pieces = _conversation(tools, body.get("instructions"), asked)
    return RequestFacts(
        known(columns),
        prompt_of(pieces) if whole else None,
        session_of(body),
        untrusted.label(body.get("previous_response_id")),
    )


def _conversation(tools: Any, instructions: Any, asked: Any) -> Iterator[bytes]:
    """The canonical text: tools, instructions, then each item."""
    if tools and isinstance(tools, list):
        yield encoded(tools)
        yield TOOLS_END
    if isinstance(instructions, str):
        yield from utf8(instructions)
        yield MESSAGE_END
    for item in [{"role": "user", "content": asked}] if isinstance(asked, str) else asked or ():
        if not isinstance(item, dict):
            continue
        if "role" in item:
            yield from utf8(item["role"])
            yield ROLE_END
            yield from content(item.get("content"))
        elif item.get("type") == "function_call":
            yield from utf8(item.get("name"))
            yield ROLE_END
            yield from utf8(item.get("arguments"))
        elif item.get("type") == "function_call_output":
            yield ROLE_END
            yield from content(item.get("output"))
        else:
            yield digest(item)
        yield MESSAGE_END
