"""Requests of Gemini's generateContent. What becomes of each key is told in `request_body.py`.

The path tells the model and whether it is a stream. Keys may be written in camel or in snake case.
"""

import re
from collections.abc import Iterator
from typing import Any, Final

from tokentape.traces.wire import untrusted
from tokentape.traces.wire.request import RequestFacts
from tokentape.traces.wire.request_body import (
    EFFORTS,
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
        "n_choices": ("candidateCount", lambda v: untrusted.whole_number(v, untrusted.I16_MAX, 1)),
        "max_tokens": ("maxOutputTokens", untrusted.whole_number),
        "temperature": ("temperature", untrusted.real_number),
        "top_p": ("topP", untrusted.real_number),
        "top_k": ("topK", untrusted.whole_number),
        "sampling_seed": (
            "seed",
            lambda v: untrusted.whole_number(v, untrusted.I64_MAX, -untrusted.I64_MAX),
        ),
    },
    told=frozenset(
        (
            *("contents", "systemInstruction", "tools", "toolConfig", "stopSequences", "model"),
            *("responseLogprobs", "logprobs", "responseMimeType"),
        )
    ),
    scalars=frozenset(("presencePenalty", "frequencyPenalty", "audioTimestamp")),
    words={"mediaResolution": tuple(f"MEDIA_RESOLUTION_{s}" for s in ("LOW", "MEDIUM", "HIGH"))},
)
_CHOICES: Final = {"AUTO": "auto", "ANY": "required", "NONE": "none"}
_FORMATS: Final = {"text/plain": "text", "application/json": "json_object"}
_SNAKE: Final = re.compile(r"_([a-z])")
_MODEL: Final = re.compile(r"models/([^/:?]+):")


def told_by_path(endpoint: str) -> dict[str, Any]:
    """The model and the stream flag, which are part of the path."""
    found = _MODEL.search(endpoint)
    columns: dict[str, Any] = {"stream": ":streamGenerateContent" in endpoint}
    if found:
        columns["model_requested"] = untrusted.label(found[1])
    return columns


def read_generate_content(data: bytes | bytearray) -> RequestFacts:
    """Facts of a request. Raises: anything, where the body is no JSON object."""
    body = Body(data)
    _camel(body)
    body.lift("generationConfig")
    _camel(body)
    body.lift("thinkingConfig")
    _camel(body)
    columns = columns_of(body, _READING)
    del columns["stream"]
    tools, contents = body.get("tools"), body.get("contents")
    contents = untrusted.objects([contents] if isinstance(contents, dict) else contents)
    stop = body.get("stopSequences")
    columns["stop_count"] = few(len(stop)) if isinstance(stop, list) else None
    columns["tool_count"] = few(sum(map(_tools_in, untrusted.objects(tools))))
    mode = untrusted.at(body.get("toolConfig"), "functionCallingConfig", "mode")
    columns["tool_choice"] = _CHOICES.get(mode, "other") if isinstance(mode, str) else None
    if body.get("responseLogprobs") is True:
        columns["logprobs"] = (
            untrusted.whole_number(body.get("logprobs"), untrusted.I16_MAX, 1) or 1
        )
    columns["response_format"] = _format(body)
    level, extra = body.get("thinkingLevel"), {}
    columns["reasoning_effort"] = (
        untrusted.one_of(level.lower(), EFFORTS) if isinstance(level, str) else None
    )
    budget = untrusted.whole_number(body.get("thinkingBudget"), least=-1)
    if budget is not None:
        extra["thinking_budget_tokens"] = budget
    for key in ("thinkingLevel", "thinkingBudget"):
        body.raw.pop(key, None)
    columns["extra"] = extra_json(body, _READING, extra)
    kinds = [kind for content in contents for kind in _media(content)]
    columns["message_count"] = len(contents)
    columns["image_count"] = few(sum(kind.startswith("image/") for kind in kinds))
    columns["audio_count"] = few(sum(kind.startswith("audio/") for kind in kinds))
    # What lies in a cache of the server is not in the body: no prefix is known then.
    whole = bool(contents) and body.get("cachedContent") is None
    pieces = _conversation(tools, body.get("systemInstruction"), contents)
    return RequestFacts(known(columns), prompt_of(pieces) if whole else None)


def _camel(body: Body) -> None:
    body.raw = {_SNAKE.sub(lambda m: m[1].upper(), key): raw for key, raw in body.raw.items()}


def _tools_in(tool: dict[str, Any]) -> int:
    functions = tool.get("functionDeclarations", tool.get("function_declarations"))
    return len(functions) if isinstance(functions, list) else 1


def _format(body: Body) -> str | None:
    kind = body.get("responseMimeType")
    if body.get("responseSchema") is not None or body.get("responseJsonSchema") is not None:
        return "json_schema"
    return _FORMATS.get(kind, "other") if isinstance(kind, str) else None


def _media(content: dict[str, Any]) -> Iterator[str]:
    """Types of what is no text, such as image/png."""
    for part in untrusted.objects(content.get("parts")):
        for key in ("inlineData", "fileData", "inline_data", "file_data"):
            kind = untrusted.at(part, key, "mimeType") or untrusted.at(part, key, "mime_type")
            if isinstance(kind, str):
                yield kind.lower()


def _conversation(tools: Any, system: Any, contents: list[dict[str, Any]]) -> Iterator[bytes]:
    """The canonical text: tools, system instruction, then each content."""
    if tools and isinstance(tools, list):
        yield encoded(tools)
        yield TOOLS_END
    if isinstance(system, dict):
        yield from _parts(system)
        yield MESSAGE_END
    for content in contents:
        yield from utf8(content.get("role"))
        yield ROLE_END
        yield from _parts(content)
        yield MESSAGE_END


def _parts(content: dict[str, Any]) -> Iterator[bytes]:
    parts = content.get("parts")
    for part in untrusted.objects([parts] if isinstance(parts, dict) else parts):
        if isinstance(part.get("text"), str):
            yield from utf8(part["text"])
        else:
            yield PART_END + digest(part)
