"""What a request says of the load it makes, and its prompt for prefix hashing.

The dialect-free half of reading requests: the two shapes that every dialect returns. A prompt is
for hashing in memory only; it must never be written as it is.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Prompt:
    """Tokens or text.

    tokens: the prompt as token ids. text: canonical bytes, in which the shared beginning of two
    conversations is a shared beginning of bytes.
    """

    tokens: list[int] | None = None
    text: bytes | bytearray | None = None
    ends: list[int] = field(default_factory=list)  # of the messages in a text


@dataclass
class RequestFacts:
    """Schema columns that the request gives, and its prompt where it has a single one.

    session: what the client calls the session. previous: the id of the response that this request
    follows. Both as they came: they must never be written as they are.
    """

    columns: dict[str, Any] = field(default_factory=dict)
    prompt: Prompt | None = None
    session: str | None = None
    previous: str | None = None
