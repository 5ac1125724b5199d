"""The APIs that a replay can speak: where they are, and how a body of each is laid out.

Pure tables and bytes. How long a prompt is, and which of these fields a candidate takes, is found
by `probe.py`; what a reply means is read by `traces/wire/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Endpoint = Literal["completions", "chat", "responses", "anthropic", "sglang", "tgi"]

Wanted = Literal["recorded"] | Endpoint  # recorded: each request in the API that it came in


@dataclass(frozen=True)
class Api:
    """One API.

    at_root: its path does not begin behind the /v1 of the others. prompt: what stands before and
    behind the prompt. limit, least: the names of the most and the fewest output tokens. inside:
    the object that holds them, if they do not stand at the top. token_ids: the field for a prompt
    of token ids, where there is one. headers: what a client of it sends with each request.
    """

    path: str
    wire_format: str
    operation: str
    prompt: tuple[bytes, bytes]
    limit: str = "max_tokens"
    least: str = "min_tokens"
    inside: str | None = None
    token_ids: bytes | None = None
    at_root: bool = False
    stream_options: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


_MESSAGE: Final = (b'"messages":[{"role":"user","content":', b"}]")
APIS: Final[dict[Endpoint, Api]] = {
    "completions": Api(
        "/completions",
        "openai.completions",
        "text_completion",
        (b'"prompt":', b""),
        token_ids=b'"prompt":',
        stream_options=True,
    ),
    "chat": Api("/chat/completions", "openai.chat", "chat", _MESSAGE, stream_options=True),
    "responses": Api(
        "/responses",
        "openai.responses",
        "chat",
        (b'"input":', b""),
        limit="max_output_tokens",
        settings={"store": False},
    ),
    "anthropic": Api(
        "/messages",
        "anthropic",
        "chat",
        _MESSAGE,
        headers={"Anthropic-Version": "2023-06-01"},
    ),
    "sglang": Api(
        "/generate",
        "sglang",
        "text_completion",
        (b'"text":', b""),
        limit="max_new_tokens",
        least="min_new_tokens",
        inside="sampling_params",
        token_ids=b'"input_ids":',
        at_root=True,
    ),
    # The root takes "stream"; /generate and /generate_stream would be two paths.
    "tgi": Api(
        "/",
        "tgi",
        "text_completion",
        (b'"inputs":', b""),
        limit="max_new_tokens",
        inside="parameters",
        at_root=True,
        settings={"details": True},
    ),
}
ENDPOINTS: Final[tuple[Endpoint, ...]] = tuple(APIS)  # a request's API is its number in here
OF_FORMAT: Final = {APIS[name].wire_format: number for number, name in enumerate(ENDPOINTS)}
COMPLETIONS, CHAT = ENDPOINTS.index("completions"), ENDPOINTS.index("chat")


def endpoint(wanted: Wanted, recorded: int) -> Endpoint:
    """The API of a request: the one that it came in, by number, unless another is wanted."""
    return ENDPOINTS[recorded] if wanted == "recorded" else wanted
