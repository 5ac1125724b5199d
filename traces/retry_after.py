"""What a refusal asks for: the Retry-After of a reply, in seconds (RFC 9110, section 10.2.3).

It is a count of seconds or a date. A date counts from the reply's own Date, so the answer is of the
server's clock alone and no error of ours is in it.
"""

import contextlib
import math
from collections.abc import Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime

NAMES = (b"retry-after", b"date")
MOST_S = 2**31 - 1


def retry_after_s(headers: Mapping[bytes, str]) -> int | None:
    """Seconds from the reply on, part of one counted whole; None where none can be read.

    Args: headers: values by lower-case name.
    """
    asked = headers.get(b"retry-after", "").strip()
    with contextlib.suppress(ValueError):  # not in the RFC, but sent: 0.25
        seconds = float(asked)
        return min(math.ceil(seconds), MOST_S) if 0 <= seconds < math.inf else None
    at, now = _date(asked), _date(headers.get(b"date", ""))
    if at is None or now is None:
        return None
    return min(max(0, math.ceil((at - now).total_seconds())), MOST_S)


def _date(text: str) -> datetime | None:
    try:
        found = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return found if found.tzinfo else None
