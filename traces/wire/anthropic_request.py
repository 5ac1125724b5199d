"""Requests of Anthropic's Messages. What becomes of each key is told in `request_body.py`."""

from collections.abc import Iterator
from typing import Any, Final

from tokentape.traces.wire import untrusted
from tokentape.traces.wire.request import RequestFacts
from tokentape.traces.wire.request_body import (
    EFFORTS,
    MESSAGE_END,
    PART_END,
    ROLE_END,
    TOOL_CHOICES,
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
    session_of,
    utf8,
)

_READING: Final = Reading(
    values={
        "model_requested": ("model", untrusted.label),
        "stream": ("stream", untrusted.truth),
        "max_tokens": ("max_tokens", untrusted.whole_number),
        "temperature": ("temperature", untrusted.real_number),
        "top_p": ("top_p", untrusted.real_number),
        "top_k": ("top_k", untrusted.whole_number),
    },
    told=frozenset(
        ("messages", "system", "tools", "tool_choice", "stop_sequences", "anthropic_version")
    ),
    words={"service_tier": ("auto", "standard_only"), "speed": ("standard", "fast")},
)


def read_messages(data: bytes | bytearray) -> RequestFacts:
    """Facts of a request. Raises: anything, where the body is no JSON object."""
    body = Body(data)
    columns = columns_of(body, _READING)
    tools, stop = body.get("tools"), body.get("stop_sequences")
    columns["tool_count"] = few(len(tools)) if isinstance(tools, list) else 0
    columns["stop_count"] = few(len(stop)) if isinstance(stop, list) else None
    choice = untrusted.at(body.get("tool_choice"), "type")
    choice = {"any": "required", "tool": "named"}.get(choice, choice)
    columns["tool_choice"] = untrusted.one_of(choice, (*TOOL_CHOICES, "named"))
    effort = untrusted.at(body.get("output_config"), "effort")
    columns["reasoning_effort"] = untrusted.one_of(effort, EFFORTS)
    budget = untrusted.whole_number(untrusted.at(body.get("thinking"), "budget_tokens"))
    columns["extra"] = extra_json(
        body, _READING, {} if budget is None else {"thinking_budget_tokens": budget}
    )
    messages = untrusted.objects(body.get("messages"))
    columns["message_count"] = len(messages)
    columns["image_count"] = few(sum(_images(message.get("content")) for message in messages))
    prompt = prompt_of(_conversation(tools, body.get("system"), messages)) if messages else None
    return RequestFacts(known(columns), prompt, session_of(body))


def _images(content: Any) -> int:
    """Images among the parts, those in results of tools included."""
    parts = untrusted.objects(content)
    inner = [_images(part.get("content")) for part in parts if part.get("type") == "tool_result"]
    return sum(inner) + len([part for part in parts if part.get("type") == "image"])


def _conversation(tools: Any, system: Any, messages: list[dict[str, Any]]) -> Iterator[bytes]:
    """The canonical text: tools, system, messages, as the API puts them before the model."""
    if tools and isinstance(tools, list):
        yield encoded([_bare(tool) for tool in tools])
        yield TOOLS_END
    if system:
        yield from _content(system)
        yield MESSAGE_END
    for message in messages:
        yield from utf8(message.get("role"))
        yield ROLE_END
        yield from _content(message.get("content"))
        yield MESSAGE_END


def _content(content: Any) -> Iterator[bytes]:
    if isinstance(content, str):
        yield from utf8(content)
    for part in untrusted.objects(content):
        kind = part.get("type")
        if kind == "text":
            yield from utf8(part.get("text"))
        elif kind == "thinking":
            yield PART_END
            yield from utf8(part.get("thinking"))
        elif kind == "tool_result":
            yield PART_END
            yield from _content(part.get("content"))
        elif kind == "tool_use":
            yield PART_END
            yield from utf8(part.get("name"))
            yield ROLE_END + encoded(part.get("input"))
        else:
            yield PART_END + digest(_bare(part))


def _bare(part: Any) -> Any:
    """Without the cache mark, which moves on from turn to turn and is no part of the prompt."""
    return (
        {k: v for k, v in part.items() if k != "cache_control"} if isinstance(part, dict) else part
    )
