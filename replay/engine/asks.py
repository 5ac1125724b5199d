"""Request bodies of the OpenAI API, read into what the engine must do, or refused with the reason.

Only fields that alter the load are read. `stop`, tools, logprobs and sampling have no effect on a
simulated reply and are accepted; what would change the number of sequences or prompts is refused,
so that no load is ever quietly smaller than the one asked for. Pure: no I/O, no clock.
"""

import json
from dataclasses import dataclass
from typing import Any

import msgspec

from tokentape.replay.engine import tokenizer
from tokentape.replay.engine.batching import Sequence
from tokentape.replay.engine.profile import Profile

COMPLETIONS_MAX_TOKENS = 16  # OpenAI's default where the request names none


class RefusedError(Exception):
    """A request that is answered with an error; `param` names the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class StreamOptions(msgspec.Struct):
    """`stream_options` of a request."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Message(msgspec.Struct):
    """One message of a chat."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[Any] | None = None


class Body(msgspec.Struct):
    """The fields of both kinds of request, and of /tokenize, that mean something here."""

    model: str | None = None
    prompt: str | list[Any] | None = None
    messages: list[Message] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    n: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    add_generation_prompt: bool | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """What one request wants: its tokens, the output included, and how they are told."""

    chat: bool
    model: str
    tokens: list[int]
    prompt_tokens: int
    finish_reason: str
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool

    def sequence(self, arrived_ns: int) -> Sequence:
        """The request as the batch knows it."""
        return Sequence(self.tokens, self.prompt_tokens, arrived_ns)


def read_ask(body: bytes, *, chat: bool, profile: Profile) -> Ask:
    """Read a request body. Raises RefusedError with the message for the client."""
    wish = _decode(body)
    _refuse_unsupported(wish)
    prompt = _chat_prompt(wish) if chat else _plain_prompt(wish)
    limit = _output_limit(wish, len(prompt), chat=chat, profile=profile)
    output, reason = _output(wish, prompt, limit, profile)
    options = wish.stream_options or StreamOptions()
    return Ask(
        chat=chat,
        model=wish.model or profile.model,
        tokens=prompt + output,
        prompt_tokens=len(prompt),
        finish_reason=reason,
        stream=bool(wish.stream),
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.include_usage and options.continuous_usage_stats),
        return_token_ids=bool(wish.return_token_ids),
    )


def read_tokenize(body: bytes) -> list[int]:
    """Token ids for a /tokenize request: of a text, or of messages with their template."""
    wish = _decode(body)
    return _chat_prompt(wish) if wish.messages is not None else _plain_prompt(wish)


def _decode(body: bytes) -> Body:
    try:
        return msgspec.json.decode(body, type=Body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RefusedError(f"The request body is not valid: {error}") from None


def _refuse_unsupported(wish: Body) -> None:
    for name in ("n", "best_of"):
        if getattr(wish, name) not in (None, 1):
            raise RefusedError(f"{name} must be 1: one reply per request is simulated", name)
    if wish.echo:
        raise RefusedError("echo is not simulated", "echo")
    if wish.stream_options is not None and not wish.stream:
        raise RefusedError(
            "Stream options can only be defined when `stream=True`.", "stream_options"
        )


def _plain_prompt(wish: Body) -> list[int]:
    prompt = wish.prompt
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise RefusedError(
                "prompt must be one prompt: lists of prompts are not simulated", "prompt"
            )
        prompt = prompt[0]
    tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if not tokens:
        raise RefusedError("prompt must hold at least one token", "prompt")
    if not all(type(token) is int for token in tokens):
        raise RefusedError("prompt must be text or a list of token ids", "prompt")
    if min(tokens) < 0 or max(tokens) >= tokenizer.ID_LIMIT:
        raise RefusedError(f"prompt token ids must lie in 0..{tokenizer.ID_LIMIT - 1}", "prompt")
    return tokens


def _chat_prompt(wish: Body) -> list[int]:
    if not wish.messages:
        raise RefusedError("messages must hold at least one message", "messages")
    for message in wish.messages:
        if message.role not in tokenizer.ROLE_TOKENS:
            raise RefusedError(f"Unknown role {message.role!r}", "messages")
    return tokenizer.encode_chat(
        [(message.role, _text(message)) for message in wish.messages],
        generation_prompt=wish.add_generation_prompt is not False,
    )


def _text(message: Message) -> str:
    """Words of a message: its text parts, and its tool calls as JSON."""
    parts = [message.content] if isinstance(message.content, str) else []
    for part in message.content if isinstance(message.content, list) else []:
        text = part.get("text")
        if not isinstance(text, str):
            raise RefusedError(f"content of type {part.get('type')!r} is not simulated", "messages")
        parts.append(text)
    parts += [json.dumps(call) for call in message.tool_calls or []]
    return " ".join(parts)


def _output_limit(wish: Body, prompt_tokens: int, *, chat: bool, profile: Profile) -> int:
    """Tokens that the reply may have. Raises RefusedError where the context has too few."""
    context = profile.max_model_tokens
    limit, name = wish.max_completion_tokens, "max_completion_tokens"
    if limit is None:
        limit, name = wish.max_tokens, "max_tokens"
    if limit is None:
        limit = max(1, context - prompt_tokens) if chat else COMPLETIONS_MAX_TOKENS
    if limit < 1:
        raise RefusedError(f"{name} must be at least 1, got {limit}.", name)
    if not 0 <= (wish.min_tokens or 0) <= limit:
        raise RefusedError(
            f"min_tokens must lie in 0..{name}={limit}, got {wish.min_tokens}.", "min_tokens"
        )
    if prompt_tokens + limit > context:
        raise RefusedError(
            f"This model's maximum context length is {context} tokens. However, you requested "
            f"{limit} output tokens and your prompt contains {prompt_tokens} input tokens, for a "
            f"total of {prompt_tokens + limit} tokens. Please reduce the length of the input "
            "prompt or the number of requested output tokens.",
            "input_tokens",
        )
    return limit


def _output(wish: Body, prompt: list[int], limit: int, profile: Profile) -> tuple[list[int], str]:
    """The reply's tokens and its finish reason.

    A natural length is drawn from (profile.seed, request seed, prompt): exponential, the end token
    included. Where it is shorter than the limit and the end token counts, the reply stops there.
    """
    random = tokenizer.generator_for(prompt, profile.seed * 1_000_003 + (wish.seed or 0))
    tokens = tokenizer.synthesize(limit, random)
    if wish.ignore_eos or not profile.natural_output_tokens_mean:
        return tokens, "length"
    drawn = 1 + int(random.expovariate(1 / profile.natural_output_tokens_mean))
    natural = max(drawn, (wish.min_tokens or 0) + 1)
    if natural > limit:
        return tokens, "length"
    return [*tokens[: natural - 1], tokenizer.END_OF_TEXT], "stop"
