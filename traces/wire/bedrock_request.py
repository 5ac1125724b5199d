"""Requests of Bedrock's Converse and InvokeModel; the path tells the model, and whether it streams.

What becomes of each key is told in `request_body.py`. An InvokeModel body is the vendor's own:
Anthropic's, Nova's (which is Converse's) and Llama's are read.
"""

from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import unquote

from tokentape.traces.wire import anthropic_request, untrusted
from tokentape.traces.wire.request import Prompt, RequestFacts
from tokentape.traces.wire.request_body import (
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
        "max_tokens": ("maxTokens", untrusted.whole_number),
        "temperature": ("temperature", untrusted.real_number),
        "top_p": ("topP", untrusted.real_number),
        "top_k": ("topK", untrusted.whole_number),
    },
    told=frozenset(
        (
            *("messages", "system", "toolConfig", "stopSequences", "schemaVersion"),
            *("additionalModelRequestFields", "additionalModelResponseFieldPaths"),
        )
    ),
)
_LLAMA: Final = Reading(
    values={
        "max_tokens": ("max_gen_len", untrusted.whole_number),
        "temperature": ("temperature", untrusted.real_number),
        "top_p": ("top_p", untrusted.real_number),
    },
    told=frozenset(("prompt", "images")),
)
_CHOICES: Final = {"auto": "auto", "any": "required", "tool": "named"}


def told_by_path(endpoint: str) -> dict[str, Any]:
    """The model and the stream flag, which are part of the path."""
    path = endpoint.partition("?")[0].rstrip("/")
    columns: dict[str, Any] = {"stream": path.endswith("-stream")}
    name = unquote(path.rpartition("/")[0].rpartition("/model/")[2])
    if name:
        columns["model_requested"] = untrusted.label(name)
    return columns


def read_converse(data: bytes | bytearray) -> RequestFacts:
    """Facts of a request. Raises: anything, where the body is no JSON object."""
    return _converse(Body(data))


def read_invoke(data: bytes | bytearray) -> RequestFacts:
    """Facts of a request in a vendor's own form. Raises: anything, where it is no JSON object."""
    body = Body(data)
    if "anthropic_version" in body.raw:
        facts = anthropic_request.read_messages(data)
        facts.columns.pop("stream", None)
        return facts
    if "prompt" not in body.raw:
        return _converse(body)
    columns = columns_of(body, _LLAMA)
    del columns["stream"]
    columns["extra"] = extra_json(body, _LLAMA, {})
    text = b"".join(utf8(body.get("prompt")))
    return RequestFacts(known(columns), Prompt(text=text) if text else None)


def _converse(body: Body) -> RequestFacts:
    body.lift("inferenceConfig")
    columns = columns_of(body, _READING)
    del columns["stream"]
    tools, stop = untrusted.at(body.get("toolConfig"), "tools"), body.get("stopSequences")
    columns["tool_count"] = few(len(tools)) if isinstance(tools, list) else 0
    columns["stop_count"] = few(len(stop)) if isinstance(stop, list) else None
    choice = untrusted.at(body.get("toolConfig"), "toolChoice")
    if isinstance(choice, dict) and choice:
        columns["tool_choice"] = _CHOICES.get(next(iter(choice)), "other")
    columns["extra"] = extra_json(body, _READING, {})
    messages = untrusted.objects(body.get("messages"))
    columns["message_count"] = len(messages)
    parts = [part for message in messages for part in untrusted.objects(message.get("content"))]
    columns["image_count"] = few(sum("image" in part for part in parts))
    pieces = _conversation(tools, body.get("system"), messages) if messages else ()
    return RequestFacts(known(columns), prompt_of(pieces))


def _conversation(tools: Any, system: Any, messages: list[dict[str, Any]]) -> Iterator[bytes]:
    """The canonical text: tools, system, then each message; cache marks are no part of it."""
    if tools and isinstance(tools, list):
        yield encoded([tool for tool in untrusted.objects(tools) if "cachePoint" not in tool])
        yield TOOLS_END
    if system:
        yield from _parts(system)
        yield MESSAGE_END
    for message in messages:
        yield from utf8(message.get("role"))
        yield ROLE_END
        yield from _parts(message.get("content"))
        yield MESSAGE_END


def _parts(content: Any) -> Iterator[bytes]:
    for part in untrusted.objects(content):
        if isinstance(part.get("text"), str):
            yield from utf8(part["text"])
        elif "cachePoint" not in part:
            yield PART_END + digest(part)
