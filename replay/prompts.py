"""Synthesizes prompts of an exact length with the recorded prefix sharing, alike on every host.

A prompt is a row of 64-bit draws, one per token: a block's draws follow from the tape, the seed,
the run's namespace and the block's hash, those after the last block from the request's own id. So
prompts share exactly the prefixes whose hashes they share, and a tape without blocks gets prompts
that share nothing.
Draws become token ids or words. Nothing here may depend on the process: never use `hash()`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Draws = NDArray[np.uint64]

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S32 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(32)

# English, four letters, consonant-vowel-consonant-vowel: with a space before it each is one token
# in the usual byte-pair vocabularies, and one in word-level ones. Never reorder or change it: the
# position of a word is part of what makes two replays send the same prompt.
_WORDS = """
base bite bone cake came care case cave code come cope core cure cute data date dare dome done
dose face fade fame fare fate file fine fire five game gate gave gene give hate have here hero
hide hole home hope huge kite lake lane late life like line live logo lone lose love made make
male mate menu mere mice mile mine mode more move mute name nice nine none nose note page pale
pile pine pole pope pose pure race rare rate rice ride rise role rope rose rude rule safe sake
sale same save side site size sole some sure take tale tape tide time tone tube tune vice vote
zero zone bare bore cage cape fuse tire bake bike dime dive pipe ripe
"""
WORDS = tuple(_WORDS.split())


@dataclass(frozen=True)
class Blocks:
    """Prefix blocks of one prompt: `hashes[i]` stands for everything up to the end of block i.

    The last hash may stand for a block that is only partly filled (Mooncake's lists); whatever
    follows the last block is the request's own.
    """

    hashes: NDArray[np.int64]
    block_tokens: int
    namespace: str = ""

    def of_copy(self, copy: int) -> "Blocks":
        """The blocks of a copy of the prompt: as many, and none that another copy has."""
        if not copy or not len(self.hashes):
            return self
        return replace(self, hashes=hashes_of_copy(self.hashes, copy))


def hashes_of_copy(
    hashes: NDArray[np.int64], copy: int | NDArray[np.integer[Any]]
) -> NDArray[np.int64]:
    """Hashes as copies of their prompts have them: equal where they were, within a copy only.

    Copy 0 keeps its hashes. Every other copy has a bijection of its own, so two hashes of two
    copies are equal by a chance of 2^-64 only. Args: copy: one number, or one for each hash.
    """
    numbers = np.atleast_1d(copy).astype(np.uint64)  # no scalar: those warn as they wrap
    moved = _mix(hashes.view(np.uint64) + _mix(numbers * _STEP + _MIX_1))
    kept: NDArray[np.int64] = np.where(numbers == 0, hashes, moved.view(np.int64))
    return kept


NO_BLOCKS = Blocks(np.empty(0, dtype=np.int64), 1)


class PromptSource:
    """Draws of prompts for one tape and seed; other namespaces have other prompts throughout."""

    def __init__(self, tape_id: str, seed: int, namespace: str = "") -> None:
        told = f"{tape_id}\0{seed}" + (f"\0{namespace}" if namespace else "")
        self._root = blake2b(told.encode(), digest_size=16, person=b"tokentape").digest()

    def draws(
        self, request_id: bytes, tokens: int, blocks: Blocks = NO_BLOCKS, *, copy: int = 0
    ) -> Draws:
        """One draw per token of a prompt; cost about 20 ns each. `copy`: of the request."""
        size = blocks.block_tokens
        shared = min(tokens, size * len(blocks.hashes))
        parts = []
        if shared:
            hashes = blocks.hashes[: -(-shared // size)].astype(np.int64).view(np.uint64)
            keys = _mix(hashes * _STEP + self._key(b"blocks", blocks.namespace.encode()))
            parts.append(_counted(keys, size).ravel()[:shared])
        if tokens > shared or not shared:
            name = request_id + copy.to_bytes(2) if copy else request_id
            own = np.array([self._key(b"request", name)], dtype=np.uint64)
            parts.append(_counted(own, tokens - shared).ravel())
        return np.concatenate(parts)

    def _key(self, kind: bytes, what: bytes) -> np.uint64:
        digest = blake2b(kind + b"\0" + what, digest_size=8, key=self._root).digest()
        return np.uint64(int.from_bytes(digest, "little"))


def _counted(keys: Draws, count: int) -> Draws:
    """SplitMix64 in counter mode: `count` draws for each key.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    steps = np.arange(1, count + 1, dtype=np.uint64) * _STEP
    return _mix(keys[:, None] + steps[None, :])


def _mix(x: Draws) -> Draws:
    x = (x ^ (x >> _S30)) * _MIX_1
    x = (x ^ (x >> _S27)) * _MIX_2
    return x ^ (x >> _S31)


class Writing(Protocol):
    """Turns draws into the bytes of a JSON value's inside."""

    def write(self, draws: Draws) -> bytes:
        """What stands between the brackets or quotes of the prompt."""


class TokenIds:
    """Writes draws as token ids in [low, high], padded with spaces to one width for speed."""

    LOW, HIGH = 100, 31_999  # ids of words in the usual vocabularies

    def __init__(self, low: int = LOW, high: int = HIGH) -> None:
        self.high = high
        width = len(str(high))
        cells = "".join(f"{i:>{width}}," for i in range(low, high + 1))
        self._table = _table(cells, width + 1)

    def write(self, draws: Draws) -> bytes:
        """The ids with commas between them."""
        return _write(self._table, draws)


class Words:
    """Writes draws as words with one space between them; safe inside a JSON string."""

    def __init__(self, words: Sequence[str] = WORDS) -> None:
        """Args: words: all of one length."""
        self.words = words
        self._table = _table("".join(f"{word} " for word in words), len(words[0]) + 1)

    def write(self, draws: Draws) -> bytes:
        """The words with spaces between them."""
        return _write(self._table, draws)


def _table(cells: str, width: int) -> NDArray[np.void]:
    return np.frombuffer(cells.encode(), dtype=f"V{width}")


def _write(table: NDArray[np.void], draws: Draws) -> bytes:
    places = ((draws >> _S32) * np.uint64(len(table))) >> _S32  # multiply-shift: no division
    return table.take(places.astype(np.intp)).tobytes()[:-1]


@dataclass(frozen=True)
class Length:
    """How many tokens a candidate counts for a prompt of n units: overhead + per_unit * n."""

    overhead: float = 0.0
    per_unit: float = 1.0

    def units(self, tokens: int) -> int:
        """Units to send so that the candidate counts `tokens`; at least one is sent."""
        return max(1, round((tokens - self.overhead) / self.per_unit))

    @property
    def shortest_tokens(self) -> int:
        """The shortest prompt that can be sent; a shorter one is an exception that is counted."""
        return round(self.overhead + self.per_unit)

    @property
    def exact(self) -> bool:
        """True when every length from the shortest on can be reached."""
        return self.per_unit == 1.0 and self.overhead == int(self.overhead)

    @classmethod
    def through(cls, first: tuple[int, int], second: tuple[int, int]) -> "Length | None":
        """The rule through two (units, counted tokens); None if the count does not follow."""
        (n1, t1), (n2, t2) = first, second
        per_unit = (t2 - t1) / (n2 - n1)
        return cls(t1 - per_unit * n1, per_unit) if per_unit > 0 else None
