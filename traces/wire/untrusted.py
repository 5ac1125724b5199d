"""What may be believed of a JSON value that a stranger wrote.

Requests and replies hold prompts and completions, and any field may hold the wrong type. Each
function gives a value that is safe to put on a tape, or None; none of them ever raises for a
decoded value, and none lets free text through.
"""

import json
import math
import re
from collections.abc import Collection
from typing import Any

import msgspec

I16_MAX, I32_MAX, I64_MAX = (1 << 15) - 1, (1 << 31) - 1, (1 << 63) - 1
LABEL_CHARS = 256
_MOST_KEYS = 64  # of one object; a server's usage has about ten
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_.\-]{0,63}")
_decode = msgspec.json.Decoder().decode


def decode_any(data: bytes | bytearray | msgspec.Raw) -> Any:
    """The JSON value of data; also takes bad UTF-8, lone surrogates and NaN, as Python's own does.

    Raises: ValueError or RecursionError where it is no JSON.
    """
    try:
        return _decode(data)
    except (msgspec.DecodeError, ValueError):
        return json.loads(bytes(data).decode("utf-8", "replace"))


def whole_number(value: Any, most: int = I32_MAX, least: int = 0) -> int | None:
    """An integer within bounds; a float without fraction counts, True does not."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and least <= value <= most else None


def real_number(value: Any) -> float | None:
    """A finite number as float."""
    if type(value) not in (int, float) or not -1e30 < value < 1e30:
        return None
    return float(value)


def truth(value: Any) -> bool | None:
    """True or False where JSON said so."""
    return value if isinstance(value, bool) else None


def label(value: Any) -> str | None:
    """A name such as a model or a response id, cut to a bounded length."""
    return value[:LABEL_CHARS] if isinstance(value, str) and value else None


def word(value: Any) -> str | None:
    """A text that is one word, as classes of errors and reasons are; prose is refused."""
    return value if isinstance(value, str) and _WORD.fullmatch(value) else None


def one_of(value: Any, known: Collection[str]) -> str | None:
    """A text from a closed list; any other text is `other`."""
    if not isinstance(value, str):
        return None
    return value if value in known else "other"


def numbers_only(value: Any, depth: int = 3) -> dict[str, Any]:
    """The numbers of an object and of the objects in it; everything else is left out."""
    kept: dict[str, Any] = {}
    for key, item in list(value.items())[:_MOST_KEYS] if isinstance(value, dict) else ():
        if word(key) is None:
            continue
        if isinstance(item, dict) and depth > 1:
            if inner := numbers_only(item, depth - 1):
                kept[key] = inner
        elif (type(item) is int and abs(item) <= I64_MAX) or (
            type(item) is float and math.isfinite(item)
        ):
            kept[key] = item
    return kept


def json_text(value: Any) -> str:
    """Compact JSON, the form in which small objects lie in a column."""
    return msgspec.json.encode(value).decode()
