"""The engine's own tokens: one word is one token, a word being a run of non-space characters.

A token's text is a space and its word, so text and token ids count alike and joining the texts of
a reply gives a text with as many tokens. Words outside the vocabulary get a stable id by hash, so
equal texts have equal ids on every host. It must never depend on a model file or on the platform.
"""

import zlib
from array import array
from collections.abc import Sequence
from itertools import product
from random import Random

# 32,000 words of five letters, id = position: the size of the vocabulary that was recorded.
WORDS: tuple[str, ...] = tuple(
    map("".join, product("bcdfghjklmnprstv", "aeiou", "bcdfghjklmnprstv", "aeiou", "lmnrs"))
)

# Special tokens have ids behind the vocabulary and no text.
END_OF_TEXT = len(WORDS)
ROLE_TOKENS: dict[str, int] = {
    "system": END_OF_TEXT + 1,
    "developer": END_OF_TEXT + 1,
    "user": END_OF_TEXT + 2,
    "assistant": END_OF_TEXT + 3,
    "tool": END_OF_TEXT + 4,
    "function": END_OF_TEXT + 4,
}
FIRST_HASHED = 32_768
ID_LIMIT = 2**31  # ids of prompts lie below

REMEMBERED_WORDS = 262_144  # known and hashed, so that a long prompt is split in a millisecond

# Two neighbours in an output are this many words apart; no factor in common with 32,000.
OUTPUT_STRIDE = 7_919


class _WordIds(dict[str, int]):
    """Ids of the vocabulary; any other word's is its hash."""

    def __missing__(self, word: str) -> int:
        digest = zlib.crc32(word.encode("utf-8", "surrogatepass"))
        token = FIRST_HASHED + digest % (ID_LIMIT - FIRST_HASHED)
        if len(self) < REMEMBERED_WORDS:
            self[word] = token
        return token


_word_ids = _WordIds((word, token) for token, word in enumerate(WORDS))


def encode(text: str) -> list[int]:
    """Token ids of a text, one for each word."""
    return [_word_ids[word] for word in text.split()]


def decode(tokens: Sequence[int]) -> str:
    """Text of tokens of the vocabulary; special tokens have none."""
    return "".join([f" {WORDS[token]}" for token in tokens if token < END_OF_TEXT])


def encode_chat(
    messages: Sequence[tuple[str, str]], *, generation_prompt: bool = True
) -> list[int]:
    """Token ids of (role, text) messages: a role token before each, and the assistant's at the end.

    One user message of n words is n + 2 tokens. A next turn that repeats the reply as an assistant
    message has the whole earlier turn as its prefix.
    """
    tokens: list[int] = []
    for role, text in messages:
        tokens.append(ROLE_TOKENS[role])
        tokens += encode(text)
    if generation_prompt:
        tokens.append(ROLE_TOKENS["assistant"])
    return tokens


def generator_for(prompt: Sequence[int], seed: int) -> Random:
    """Random numbers that depend on the prompt and the seed alone, not on when it is asked."""
    return Random(zlib.crc32(array("q", prompt), seed & 0xFFFFFFFF))


def synthesize(count: int, random: Random) -> list[int]:
    """`count` tokens of the vocabulary."""
    start, size = random.randrange(END_OF_TEXT), END_OF_TEXT
    return [(start + i * OUTPUT_STRIDE) % size for i in range(count)]
