"""Values with units, as they are written on the command line: one parser for every verb.

Exact: durations are whole nanoseconds, factors and rates are fractions; nothing passes through a
float. A text that cannot be read raises UsageError, one line with the option, the text as given
and a form that would do. Nothing is guessed: a number without its unit is refused.
"""

import json
import re
from collections.abc import Iterable
from datetime import datetime
from fractions import Fraction
from typing import Any

from tokentape.traces.errors import UsageError

_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
_DURATION = re.compile(_NUMBER + "(ns|us|ms|s|m|h|d)")
_SIZE = re.compile(_NUMBER + "([kMGT]i?B)")
_FACTOR = re.compile(_NUMBER + "x")
_TIMES = re.compile(_NUMBER + "x?")
_PERCENT = re.compile(_NUMBER + "%")
_RATE = re.compile(_NUMBER + "/(s|m|h)")
_PART = re.compile(r"([0-9]{1,6})/([0-9]{1,6})")
_SECONDS = re.compile(_NUMBER)
_RFC_3339 = re.compile(
    r"(\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)", re.ASCII
)
_NS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_NS["d"] = 24 * _NS["h"]
_BYTES = {f"{u}{i}B": b**n for i, b in (("", 1000), ("i", 1024)) for n, u in enumerate("kMGT", 1)}
_LONGEST = 40  # characters of a number; more is a mistake, and costs time to convert
_HEADER = re.compile(r"[0-9A-Za-z!#$%&'*+.^_`|~-]{1,64}")
_INT64 = 2**63
_LAST_PORT = 65535

DURATION_FORM = "a duration such as 500ms, 90s or 5m"
WINDOW_FORM = "a window such as 0s..10m, 30s.. or ..10m"
FACTOR_FORM = "a factor above zero such as 2x or 0.5x"
TIMES_FORM = "a number above zero such as 3 or 2.5x"
REPEATS_FORM = "how long or how often, such as 30m or 3x"
PERCENT_FORM = "a share from 0% to 100% such as 50%"
RATE_FORM = "a rate above zero such as 10/s or 600/m"
SHARD_FORM = "I/N with I from 0 to N-1, such as 0/4"
INSTANT_FORM = "an instant such as 2026-11-27T09:30:00Z, or unix seconds such as 1795771800"
SIZE_FORM = "a size above zero such as 500MB, 100GB or 2TiB"
HEADER_FORM = "the name of an HTTP header such as X-Session-Id"
ADDRESS_FORM = "HOST:PORT such as 127.0.0.1:8080; port 0 takes any free one"


def duration_ns(option: str, text: str) -> int:
    """Whole nanoseconds of `500ms`; the units are ns, us, ms, s, m, h and d."""
    ns = _duration(text)
    if ns is None:
        raise _refusal(option, text, DURATION_FORM)
    return ns


def window_ns(option: str, text: str) -> tuple[int | None, int | None]:
    """(from, to) in ns of `0s..10m`; a side that is left out is None, one is there."""
    first, dots, last = text.partition("..")
    ends = [_duration(end) if end else None for end in (first, last)]
    unread = any(end and ns is None for end, ns in zip((first, last), ends, strict=True))
    begin, end = ends
    if not dots or unread or (begin is None and end is None):
        raise _refusal(option, text, WINDOW_FORM)
    if begin is not None and end is not None and begin >= end:
        raise _refusal(option, text, f"{WINDOW_FORM}, that ends after it begins")
    return begin, end


def factor(option: str, text: str) -> Fraction:
    """The factor of `2x`, exactly; above zero."""
    value = _number(_FACTOR, text)
    if not value:
        raise _refusal(option, text, FACTOR_FORM)
    return value


def times(option: str, text: str) -> Fraction:
    """How often: the number of `3` or `2.5x`, exactly; above zero."""
    value = _number(_TIMES, text)
    if not value:
        raise _refusal(option, text, TIMES_FORM)
    return value


def repeats(option: str, text: str) -> tuple[int | None, Fraction | None]:
    """(ns, None) of `30m`, or (None, factor) of `3x`; above zero."""
    duration, factor_ = _duration(text), _number(_FACTOR, text)
    if not duration and not factor_:
        raise _refusal(option, text, REPEATS_FORM)
    return duration or None, factor_ or None


def percent(option: str, text: str) -> Fraction:
    """The share of `50%` as a fraction from 0 to 1, exactly."""
    value = _number(_PERCENT, text)
    if value is None or value > 100:
        raise _refusal(option, text, PERCENT_FORM)
    return value / 100


def rate_per_s(option: str, text: str) -> Fraction:
    """The rate of `10/s` per second, exactly; above zero."""
    value = _number(_RATE, text)
    if not value:
        raise _refusal(option, text, RATE_FORM)
    return value * _NS["s"] / _NS[text[-1]]


def address(option: str, text: str) -> tuple[str, int]:
    """(host, port) of `127.0.0.1:8080` or `[::1]:8080`."""
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    digits = port.isascii() and port.isdigit() and len(port) <= len(str(_LAST_PORT))
    loose = ":" in bare and bare == host  # an IPv6 address needs its brackets
    if not bare or loose or not digits or int(port) > _LAST_PORT or set(bare) & set(" []/@"):
        raise _refusal(option, text, ADDRESS_FORM)
    return bare, int(port)


def part(option: str, text: str) -> tuple[int, int]:
    """(I, N) of `I/N`."""
    match = _PART.fullmatch(text)
    index, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if index >= count:
        raise _refusal(option, text, SHARD_FORM)
    return index, count


def instant_unix_ns(option: str, text: str) -> int:
    """Ns since 1970 of an RFC 3339 instant (its offset is a must), or of unix seconds."""
    seconds = _SECONDS.fullmatch(text) if len(text) <= _LONGEST else None
    match = _RFC_3339.fullmatch(text.upper())
    if seconds:
        ns = int(Fraction(seconds[1]) * _NS["s"])
    elif match:
        try:
            whole = datetime.fromisoformat(match[1] + match[3])
        except ValueError:
            raise _refusal(option, text, INSTANT_FORM) from None
        ns = int(whole.timestamp()) * _NS["s"] + int((match[2] or "").ljust(9, "0")[:9])
    else:
        raise _refusal(option, text, INSTANT_FORM)
    if ns >= _INT64:
        raise _refusal(option, text, INSTANT_FORM)
    return ns


def size_bytes(option: str, text: str) -> int:
    """Whole bytes of `100GB`; the units are kB, MB, GB, TB and kiB, MiB, GiB, TiB."""
    match = _SIZE.fullmatch(text) if len(text) <= _LONGEST else None
    size = int(Fraction(match[1]) * _BYTES[match[2]]) if match else 0
    if not 0 < size < _INT64:
        raise _refusal(option, text, SIZE_FORM)
    return size


def header_name(option: str, text: str) -> str:
    """The name of an HTTP header, in lower case. Source: RFC 9110, section 5.6.2 (token)."""
    if not _HEADER.fullmatch(text):
        raise _refusal(option, text, HEADER_FORM)
    return text.lower()


def pairs(option: str, texts: Iterable[str]) -> dict[str, str]:
    """A mapping of `NAME=VALUE` texts; each name once. A value may hold anything, secrets too."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"{option}: an argument is not NAME=VALUE")
        if name in found:
            raise UsageError(f"{option} {name}: is given twice")
        found[name] = value
    return found


def json_pairs(option: str, texts: Iterable[str]) -> dict[str, Any]:
    """A mapping of `NAME=JSON` texts; each name once."""
    found: dict[str, Any] = {}
    for name, value in pairs(option, texts).items():
        try:
            found[name] = json.loads(value)
        except ValueError:
            quoted = json.dumps(value)
            raise UsageError(
                f"{option} {name}: not JSON; a text needs its quotes: {option} '{name}={quoted}'"
            ) from None
    return found


def _duration(text: str) -> int | None:
    match = _DURATION.fullmatch(text) if len(text) <= _LONGEST else None
    ns = Fraction(match[1]) * _NS[match[2]] if match else Fraction(1, 2)
    return int(ns) if ns.denominator == 1 and ns < _INT64 else None


def _number(form: re.Pattern[str], text: str) -> Fraction | None:
    match = form.fullmatch(text) if len(text) <= _LONGEST else None
    return Fraction(match[1]) if match else None


def _refusal(option: str, text: str, form: str) -> UsageError:
    shown = text if text.isprintable() and text.strip() else ascii(text)
    if len(shown) > 2 * _LONGEST:
        shown = shown[: 2 * _LONGEST] + "..."
    return UsageError(f"{option} {shown}: need {form}")
