"""Requests of OpenAI's chat and completions, with the extra parameters of vLLM and its kin.

Values that alter the load become columns or lie in `extra`, where each is a number, a flag or a
word of a closed list. Of anything else only the size is kept. Prompt text leaves this file in
`Prompt` alone.
"""

import json
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any, Final

import msgspec

from tokentape.traces.wire import untrusted
from tokentape.traces.wire.request import Prompt, RequestFacts

I16, I64 = untrusted.I16_MAX, untrusted.I64_MAX
_MOST_EXTRAS = 64

# Columns that are a plain value of one key.
_VALUES: Final[dict[str, tuple[str, Callable[[Any], Any]]]] = {
    "model_requested": ("model", untrusted.label),
    "stream": ("stream", untrusted.truth),
    "n_choices": ("n", lambda v: untrusted.whole_number(v, I16, 1)),
    "max_tokens": ("max_tokens", untrusted.whole_number),
    "min_tokens": ("min_tokens", untrusted.whole_number),
    "ignore_eos": ("ignore_eos", untrusted.truth),
    "temperature": ("temperature", untrusted.real_number),
    "top_p": ("top_p", untrusted.real_number),
    "top_k": ("top_k", lambda v: untrusted.whole_number(v, least=-1)),
    "best_of": ("best_of", lambda v: untrusted.whole_number(v, I16)),
    "sampling_seed": ("seed", lambda v: untrusted.whole_number(v, I64, -I64)),
}
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_TOOL_CHOICES = ("auto", "none", "required")
_FORMATS = ("text", "json_object", "json_schema", "structural_tag", "grammar", "regex")
# vLLM's ways to force a form, by key; each alone alters the load, so it is told as a format.
_GUIDED: Final = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "structured_outputs": "structured_outputs",
}
# Numbers and flags that alter the load and have no column.
_EXTRA_SCALARS: Final = frozenset(
    (
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "length_penalty",
        "min_p",
        "use_beam_search",
        "prompt_logprobs",
        "truncate_prompt_tokens",
        "echo",
        "priority",
        "parallel_tool_calls",
        "skip_special_tokens",
        "include_stop_str_in_output",
        "add_generation_prompt",
        "continue_final_message",
        "include_reasoning",
        "return_token_ids",
    )
)
_EXTRA_WORDS: Final = {
    "service_tier": ("auto", "default", "flex", "priority", "scale"),
    "verbosity": ("low", "medium", "high"),
}
# Keys that a column tells completely.
_TOLD: Final = frozenset(key for key, _ in _VALUES.values()) | {
    "messages",
    "prompt",
    "tools",
    "functions",
    "tool_choice",
    "reasoning_effort",
    "response_format",
    "max_completion_tokens",
    "stop",
    "logprobs",
    "top_logprobs",
    "stream_options",
}

_PIECE_CHARS: Final = 1 << 20  # of a long text that are encoded at once
_split = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class _Body:
    """A request's top-level keys; values are decoded when they are asked for, out of the body.

    A body may be tens of megabytes, so nothing here copies one.
    """

    def __init__(self, data: bytes | bytearray) -> None:
        try:
            self.raw = _split(data)
        except (msgspec.DecodeError, ValueError):
            value = untrusted.decode_any(data)  # what Python's own json takes, servers take too
            self.raw = {k: msgspec.Raw(json.dumps(item).encode()) for k, item in value.items()}

    def get(self, key: str) -> Any:
        raw = self.raw.get(key)
        return None if raw is None else untrusted.decode_any(raw)


def read_chat(data: bytes | bytearray) -> RequestFacts:
    """Facts of a chat request. Raises: anything, where the body is no JSON object."""
    body = _Body(data)
    columns = _columns(body)
    messages = body.get("messages")
    messages = messages if isinstance(messages, list) else []
    tools = body.get("tools") or body.get("functions")
    kinds = [kind for message in messages for kind in _part_kinds(message)]
    columns["message_count"] = len(messages)
    columns["image_count"] = min(I16, sum("image" in kind for kind in kinds))
    columns["audio_count"] = min(I16, sum("audio" in kind for kind in kinds))
    columns["tool_count"] = min(I16, len(tools)) if isinstance(tools, list) else 0
    if body.get("logprobs") is True:
        asked = untrusted.whole_number(body.get("top_logprobs"), I16)
        columns["logprobs"] = max(1, asked or 0)
    text = bytearray()
    for piece in _conversation(tools, messages):
        text += piece
    return RequestFacts(columns, Prompt(text=text) if messages else None)


def read_completions(data: bytes | bytearray) -> RequestFacts:
    """Facts of a completions request. Raises: anything, where the body is no JSON object."""
    body = _Body(data)
    prompt = body.get("prompt")
    batch = isinstance(prompt, list) and not all(type(item) is int for item in prompt)
    columns = _columns(body, {"prompt_count": len(prompt)} if batch and len(prompt) > 1 else {})
    asked = untrusted.whole_number(body.get("logprobs"), I16)
    if asked is not None:
        columns["logprobs"] = asked
    if batch and len(prompt) == 1:
        prompt = prompt[0]
    if isinstance(prompt, str):
        return RequestFacts(columns, Prompt(text=b"".join(_utf8(prompt))))
    if isinstance(prompt, list) and prompt and all(type(item) is int for item in prompt):
        return RequestFacts(columns, Prompt(tokens=prompt))
    return RequestFacts(columns)  # several prompts have no single prefix


def _columns(body: _Body, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    columns = {column: read(body.get(key)) for column, (key, read) in _VALUES.items()}
    columns["stream"] = columns["stream"] or False
    columns["n_choices"] = columns["n_choices"] or 1
    limit = untrusted.whole_number(body.get("max_completion_tokens"))
    columns["max_tokens"] = columns["max_tokens"] if limit is None else limit
    stop = body.get("stop")
    if isinstance(stop, str | list):
        columns["stop_count"] = 1 if isinstance(stop, str) else min(I16, len(stop))
    options = body.get("stream_options")
    options = options if isinstance(options, dict) else {}
    if columns["stream"]:
        columns["include_usage"] = options.get("include_usage") is True
    choice = body.get("tool_choice")
    columns["tool_choice"] = (
        "named" if isinstance(choice, dict) else untrusted.one_of(choice, _TOOL_CHOICES)
    )
    columns["reasoning_effort"] = untrusted.one_of(body.get("reasoning_effort"), _EFFORTS)
    columns["response_format"] = _format(body)
    columns["extra"] = _extra(body, options, extra or {})
    return {name: value for name, value in columns.items() if value is not None}


def _format(body: _Body) -> str | None:
    asked = body.get("response_format")
    if isinstance(asked, dict):
        return untrusted.one_of(asked.get("type"), _FORMATS)
    return next((name for key, name in _GUIDED.items() if body.get(key) is not None), None)


def _extra(body: _Body, options: dict[str, Any], extra: dict[str, Any]) -> str | None:
    if options.get("continuous_usage_stats") is True:
        extra["continuous_usage_stats"] = True
    for key, raw in body.raw.items():
        if key in _TOLD or _is_null(raw) or len(extra) >= _MOST_EXTRAS:
            continue
        value = None
        if key in _EXTRA_SCALARS:
            value = body.get(key)
            if not isinstance(value, bool):
                value = next(iter(untrusted.numbers_only({key: value}).values()), None)
        elif key in _EXTRA_WORDS:
            value = untrusted.one_of(body.get(key), _EXTRA_WORDS[key])
        if value is not None:
            extra[key] = value
        elif untrusted.word(key):
            extra[key] = {"bytes": len(raw)}
        else:  # a name that could be text
            extra["other"] = {"bytes": len(raw) + extra.get("other", {"bytes": 0})["bytes"]}
    return untrusted.json_text(extra) if extra else None


def _part_kinds(message: Any) -> Iterator[str]:
    content = message.get("content") if isinstance(message, dict) else None
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and isinstance(part.get("type"), str):
            yield part["type"]


# Marks of the canonical text. They follow what they end, so nothing after a shared beginning can
# alter it; control characters, so that no JSON text is likely to hold them.
_ROLE_END, _PART_END, _MESSAGE_END, _TOOLS_END = b"\x1f", b"\x1d", b"\x1e", b"\x1c"


def _conversation(tools: Any, messages: list[Any]) -> Iterator[bytes]:
    """The canonical text of a chat: tools, then role and content of each message."""
    if isinstance(tools, list) and tools:
        yield _encode(tools)
        yield _TOOLS_END
    for message in messages:
        if not isinstance(message, dict):
            continue
        yield from _utf8(message.get("role"))
        yield _ROLE_END
        yield from _content(message.get("content"))
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict):
                yield _PART_END
                yield from _utf8(function.get("name"))
                yield _ROLE_END
                yield from _utf8(function.get("arguments"))
        yield _MESSAGE_END


def _content(content: Any) -> Iterator[bytes]:
    """Text as it is; of an image or a sound a digest, since its bytes are not its tokens."""
    if isinstance(content, str):
        yield from _utf8(content)
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            yield from _utf8(part["text"])
        else:
            yield _PART_END + blake2b(_encode(part), digest_size=32).digest()


def _utf8(value: Any) -> Iterator[bytes]:
    if isinstance(value, str):
        for at in range(0, len(value), _PIECE_CHARS):
            yield value[at : at + _PIECE_CHARS].encode("utf-8", "surrogatepass")


def _is_null(raw: msgspec.Raw) -> bool:
    return len(raw) == 4 and bytes(raw) == b"null"


def _encode(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (ValueError, OverflowError):  # lone surrogates, integers past 64 bits
        return json.dumps(value).encode()
