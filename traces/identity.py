"""Ids: requests, tapes and worker incarnations, unique across hosts and ordered in time."""

import re
import secrets

from tokentape.traces.clock import wall_unix_ns

NS_PER_MS = 1_000_000
_RECOVERED = re.compile(r"-r[0-9a-f]{6}$")  # see TapeWriter


def request_id(unix_ns: int) -> bytes:
    """16 bytes: a UUID version 7 whose 12 sub-millisecond bits keep the order within one ms.

    Source: RFC 9562, section 5.7 and method 3 of section 6.2.
    """
    ms, rest = divmod(max(unix_ns, 0), NS_PER_MS)
    fraction = rest * 4096 // NS_PER_MS
    tail = int.from_bytes(secrets.token_bytes(8)) & ((1 << 62) - 1)
    value = (ms & ((1 << 48) - 1)) << 80 | 0x7 << 76 | fraction << 64 | 0b10 << 62 | tail
    return value.to_bytes(16)


def tape_id() -> str:
    """32 hex digits, new for every tape."""
    return request_id(wall_unix_ns()).hex()


def incarnation(worker: str) -> str:
    """The name of one life of one worker: no file of a tape is ever written twice."""
    return f"{worker}-{wall_unix_ns() // NS_PER_MS:012x}-{secrets.token_hex(3)}"


def whose(name: str) -> str:
    """The incarnation whose rows a segment has: a recovery seals them under a name of its own."""
    return _RECOVERED.sub("", name)
