"""The body of a request, key by key: what the request readers of all dialects share.

Values that alter the load become columns or lie in `extra`, where each is a number, a flag or a
word of a closed list; of anything else only the size is kept. A prompt becomes a canonical text in
which the shared beginning of two conversations is a shared beginning of bytes.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import msgspec

from tokentape.traces.wire import untrusted
from tokentape.traces.wire.request import Prompt

I16, I64 = untrusted.I16_MAX, untrusted.I64_MAX
_MOST_EXTRAS = 64
TOOL_CHOICES = ("auto", "none", "required")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class Reading(NamedTuple):
    """How a dialect's top-level keys are read."""

    values: Mapping[str, tuple[str, Callable[[Any], Any]]]  # column: (key, what may be believed)
    told: frozenset[str] = frozenset()  # further keys that columns tell completely
    scalars: frozenset[str] = frozenset()  # numbers and flags that have no column
    words: Mapping[str, tuple[str, ...]] = MappingProxyType(
        {}
    )  # closed lists of words that have no column


_SESSIONS: Final = (
    *("session_id", "conversation_id", "thread_id", "conversation", "litellm_session_id"),
    "session_params",
)
_USER_SESSION: Final = re.compile(r"_session_[0-9a-f-]{36}$")
_PIECE_CHARS: Final = 1 << 20  # of a long text that are encoded at once
_split = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Body:
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

    def lift(self, key: str) -> None:
        """Read the keys of the object under this key as if they stood beside it."""
        inner = bytes(self.raw.get(key, b""))
        if inner.lstrip().startswith(b"{"):
            del self.raw[key]
            self.raw = Body(inner).raw | self.raw


def columns_of(body: Body, reading: Reading) -> dict[str, Any]:
    """The columns that are plain values of one key each; None for what is not told."""
    columns = {column: read(body.get(key)) for column, (key, read) in reading.values.items()}
    columns["stream"] = columns.get("stream") or False
    columns["n_choices"] = columns.get("n_choices") or 1
    return columns


def known(columns: dict[str, Any]) -> dict[str, Any]:
    """The columns that are told."""
    return {name: value for name, value in columns.items() if value is not None}


def few(number: int) -> int:
    """A count as its column can hold it."""
    return min(I16, number)


def extra_json(body: Body, reading: Reading, extra: dict[str, Any]) -> str | None:
    """The column `extra`: what no column tells of the body, behind what is in `extra` already."""
    told = {key for key, _ in reading.values.values()} | reading.told
    for key, raw in body.raw.items():
        if key in told or is_null(raw) or len(extra) >= _MOST_EXTRAS:
            continue
        value = None
        if key in reading.scalars:
            value = body.get(key)
            if not isinstance(value, bool):
                value = next(iter(untrusted.numbers_only({key: value}).values()), None)
        elif key in reading.words:
            value = untrusted.one_of(body.get(key), reading.words[key])
        if value is not None:
            extra[key] = value
        elif untrusted.word(key):
            extra[key] = {"bytes": len(raw)}
        else:  # a name that could be text
            extra["other"] = {"bytes": len(raw) + extra.get("other", {"bytes": 0})["bytes"]}
    return untrusted.json_text(extra) if extra else None


# Marks of the canonical text. They follow what they end, so nothing after a shared beginning can
# alter it; control characters, so that no JSON text is likely to hold them.
ROLE_END, PART_END, MESSAGE_END, TOOLS_END = b"\x1f", b"\x1d", b"\x1e", b"\x1c"


def prompt_of(pieces: Iterable[bytes]) -> Prompt | None:
    """The prompt that these pieces of canonical text make; None where there are none."""
    text = bytearray()
    ends: list[int] = []
    for piece in pieces:
        text += piece
        if piece is MESSAGE_END:
            ends.append(len(text))
    return Prompt(text=text, ends=ends) if text else None


def session_of(body: Body) -> str | None:
    """What the client calls its session, where it says so in the body."""
    told = [body.get(key) for key in _SESSIONS if key in body.raw]
    if "metadata" in body.raw:
        metadata = body.get("metadata")
        told += [untrusted.at(metadata, key) for key in _SESSIONS]
        user = untrusted.at(metadata, "user_id")  # of Claude Code, which puts its session there
        told.append(user if isinstance(user, str) and _USER_SESSION.search(user) else None)
    told = [untrusted.at(value, "id") if isinstance(value, dict) else value for value in told]
    return next((value for value in told if isinstance(value, str) and value), None)


def content(content: Any) -> Iterator[bytes]:
    """Text as it is; of an image or a sound a digest, since its bytes are not its tokens."""
    if isinstance(content, str):
        yield from utf8(content)
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            yield from utf8(part["text"])
        else:
            yield PART_END + digest(part)


def digest(part: Any) -> bytes:
    """What stands for a part whose bytes are not its tokens."""
    return blake2b(encoded(part), digest_size=32).digest()


def utf8(value: Any) -> Iterator[bytes]:
    """A text in pieces; nothing for what is none."""
    if isinstance(value, str):
        for at in range(0, len(value), _PIECE_CHARS):
            yield value[at : at + _PIECE_CHARS].encode("utf-8", "surrogatepass")


def is_null(raw: msgspec.Raw) -> bool:
    return len(raw) == 4 and bytes(raw) == b"null"


def encoded(value: Any) -> bytes:
    """A value as compact JSON."""
    try:
        return msgspec.json.encode(value)
    except (ValueError, OverflowError):  # lone surrogates, integers past 64 bits
        return json.dumps(value).encode()
