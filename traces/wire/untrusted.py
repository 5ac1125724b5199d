"""What may be believed of a JSON value that a stranger wrote.

Requests and replies hold prompts and completions, and any field may hold the wrong type. Each
function gives a value that is safe to put on a tape, or None; none of them ever raises for a
decoded value, and none lets free text through.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
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
    if not isinstance(value, str) or not value:
        return None
    return value[:LABEL_CHARS].encode("utf-8", "replace").decode()  # JSON may hold half a pair


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


def at(value: Any, *path: str) -> Any:
    """What lies under these keys, one in the other; None where there is no such object."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def objects(value: Any) -> list[dict[str, Any]]:
    """The objects of a list; none of anything else."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def size(text: Any) -> int:
    """Bytes of a text as UTF-8; 0 of anything else."""
    if not isinstance(text, str):
        return 0
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def reason(value: Any) -> str | None:
    """Why a choice ended: the server's word, `other` for what is no word; None: not told."""
    return None if value is None else word(value) or "other"


def error_type(error: Any) -> str:
    """The class that the server gave an error: one word or a code, never its text."""
    if isinstance(error, dict):
        for key in ("type", "code", "status", "error_type"):
            if found := word(error.get(key)):
                return found
            if (code := whole_number(error.get(key))) is not None:
                return str(code)
    return "error"


def counts(usage: Any, places: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """The token counts of a usage object that are told: by column, each from its place."""
    found = {name: whole_number(at(usage, *place)) for name, place in places.items()}
    return {name: number for name, number in found.items() if number is not None}


def json_text(value: Any) -> str:
    """Compact JSON, the form in which small objects lie in a column."""
    return msgspec.json.encode(value).decode()
