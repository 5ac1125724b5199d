"""Requests of OpenAI's chat and completions, with the extra parameters of vLLM and its kin.

What becomes of each key is told in `request_body.py`.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

from tokentape.traces.wire import untrusted
from tokentape.traces.wire.request import Prompt, RequestFacts
from tokentape.traces.wire.request_body import (
    EFFORTS,
    I16,
    I64,
    MESSAGE_END,
    PART_END,
    ROLE_END,
    TOOL_CHOICES,
    TOOLS_END,
    Body,
    Reading,
    columns_of,
    content,
    encoded,
    extra_json,
    few,
    known,
    prompt_of,
    session_of,
    utf8,
)

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
_TOLD: Final = frozenset(
    (
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
    )
)
_READING: Final = Reading(_VALUES, _TOLD, _EXTRA_SCALARS, _EXTRA_WORDS)


def read_chat(data: bytes | bytearray) -> RequestFacts:
    """Facts of a chat request. Raises: anything, where the body is no JSON object."""
    body = Body(data)
    columns = _columns(body)
    messages = body.get("messages")
    messages = messages if isinstance(messages, list) else []
    tools = body.get("tools") or body.get("functions")
    kinds = [kind for message in messages for kind in _part_kinds(message)]
    columns["message_count"] = len(messages)
    columns["image_count"] = few(sum("image" in kind for kind in kinds))
    columns["audio_count"] = few(sum("audio" in kind for kind in kinds))
    columns["tool_count"] = few(len(tools)) if isinstance(tools, list) else 0
    if body.get("logprobs") is True:
        asked = untrusted.whole_number(body.get("top_logprobs"), I16)
        columns["logprobs"] = max(1, asked or 0)
    prompt = prompt_of(_conversation(tools, messages)) if messages else None
    return RequestFacts(columns, prompt, session_of(body))


def read_completions(data: bytes | bytearray) -> RequestFacts:
    """Facts of a completions request. Raises: anything, where the body is no JSON object."""
    body = Body(data)
    prompt = body.get("prompt")
    batch = isinstance(prompt, list) and not all(type(item) is int for item in prompt)
    columns = _columns(body, {"prompt_count": len(prompt)} if batch and len(prompt) > 1 else {})
    asked = untrusted.whole_number(body.get("logprobs"), I16)
    if asked is not None:
        columns["logprobs"] = asked
    if batch and len(prompt) == 1:
        prompt = prompt[0]
    facts = RequestFacts(columns, session=session_of(body))
    if isinstance(prompt, str):
        facts.prompt = Prompt(text=b"".join(utf8(prompt)))
    elif isinstance(prompt, list) and prompt and all(type(item) is int for item in prompt):
        facts.prompt = Prompt(tokens=prompt)
    return facts  # several prompts have no single prefix


def _columns(body: Body, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    columns = columns_of(body, _READING)
    limit = untrusted.whole_number(body.get("max_completion_tokens"))
    columns["max_tokens"] = columns["max_tokens"] if limit is None else limit
    stop = body.get("stop")
    if isinstance(stop, str | list):
        columns["stop_count"] = 1 if isinstance(stop, str) else few(len(stop))
    options = body.get("stream_options")
    options = options if isinstance(options, dict) else {}
    if columns["stream"]:
        columns["include_usage"] = options.get("include_usage") is True
    choice = body.get("tool_choice")
    columns["tool_choice"] = (
        "named" if isinstance(choice, dict) else untrusted.one_of(choice, TOOL_CHOICES)
    )
    columns["reasoning_effort"] = untrusted.one_of(body.get("reasoning_effort"), EFFORTS)
    columns["response_format"] = _format(body)
    extra = extra or {}
    if options.get("continuous_usage_stats") is True:
        extra["continuous_usage_stats"] = True
    columns["extra"] = extra_json(body, _READING, extra)
    return known(columns)


def _format(body: Body) -> str | None:
    asked = body.get("response_format")
    if isinstance(asked, dict):
        return untrusted.one_of(asked.get("type"), _FORMATS)
    return next((name for key, name in _GUIDED.items() if body.get(key) is not None), None)


def _part_kinds(message: Any) -> Iterator[str]:
    content = message.get("content") if isinstance(message, dict) else None
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and isinstance(part.get("type"), str):
            yield part["type"]


def _conversation(tools: Any, messages: list[Any]) -> Iterator[bytes]:
    """The canonical text of a chat: tools, then role and content of each message."""
    if isinstance(tools, list) and tools:
        yield encoded(tools)
        yield TOOLS_END
    for message in messages:
        if not isinstance(message, dict):
            continue
        yield from utf8(message.get("role"))
        yield ROLE_END
        yield from content(message.get("content"))
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict):
                yield PART_END
                yield from utf8(function.get("name"))
                yield ROLE_END
                yield from utf8(function.get("arguments"))
        yield MESSAGE_END
