"""What a synthetic load is described with: plain numbers with their units, checked. Draws nothing.

Raises UsageError, one line, for what cannot be meant; a description that exists can be drawn.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from tokentape.traces.errors import TapeError, UsageError
from tokentape.traces.reader import open_tape

NS_PER_S = 1_000_000_000
MOST_REQUESTS = 100_000_000
MOST_TOKENS = 10_000_000  # of one request
MOST_CV = 20.0
YEAR_NS = 366 * 86_400 * NS_PER_S

Process = Literal["constant", "poisson", "gamma"]


@dataclass(frozen=True)
class Part:
    """A stretch of time in which sessions begin at a rate that stays or changes evenly.

    cv: of the gaps, of `gamma` only; 1 is Poisson, more is burstier. Where the rate changes the
    process is stretched along with it, so it has that cv at every rate.
    """

    process: Process
    from_per_s: Fraction
    to_per_s: Fraction
    lasting_ns: int
    cv: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.lasting_ns <= YEAR_NS:
            raise UsageError("arrivals: each part lasts more than 0 s and at most a year")
        if min(self.from_per_s, self.to_per_s) < 0 or not self.expected:
            raise UsageError("arrivals: a rate is below zero, or nothing would arrive in a part")
        if not 0.05 <= self.cv <= MOST_CV:
            raise UsageError(f"arrivals: cv {self.cv:g}: give one from 0.05 to {MOST_CV:g}")

    @property
    def expected(self) -> Fraction:
        """Sessions that begin in it, on average."""
        return (self.from_per_s + self.to_per_s) / 2 * self.lasting_ns / NS_PER_S


@dataclass(frozen=True)
class Lengths:
    """A log-normal number of tokens (or ns) by its mean and cv; cv 0 is the mean itself.

    Rounded to whole ones, then cut off at `least` and `most`, which moves the mean where they bite.
    """

    mean: float
    cv: float = 0.0
    least: int = 1
    most: int = MOST_TOKENS

    def __post_init__(self) -> None:
        if not self.least <= self.mean <= self.most:
            raise UsageError(f"a mean of {self.mean:g} is not from {self.least:,} to {self.most:,}")
        if not 0 <= self.cv <= MOST_CV:
            raise UsageError(f"cv {self.cv:g}: give one from 0 to {MOST_CV:g}")

    def as_dict(self) -> dict[str, Any]:
        """As a tape keeps it."""
        return asdict(self)


@dataclass(frozen=True)
class Empirical:
    """Lengths as a tape has them. Input and output of one tape are drawn together, as they were."""

    path: Path

    @cached_property
    def pairs(self) -> NDArray[np.int32]:
        """int32[n, 2], input and output tokens of its requests that have both.

        TapeError where there is none.
        """
        tape, found = open_tape(self.path), []
        for table in tape.parts(["input_tokens", "output_tokens"]):
            both = table.filter(
                pc.and_(pc.greater(table["input_tokens"], 0), pc.greater(table["output_tokens"], 0))
            )
            found.append(np.stack([both[name].to_numpy() for name in both.column_names], axis=1))
        pairs = np.concatenate(found) if found else np.empty((0, 2))
        if not len(pairs):
            raise TapeError(
                f"{self.path}: no request has input and output token counts to draw from"
            )
        return np.minimum(pairs, MOST_TOKENS).astype(np.int32)

    def as_dict(self) -> dict[str, Any]:
        """As a tape keeps it: the counts, not where they lay."""
        digest = hashlib.sha256(self.pairs.astype("<i4").tobytes()).hexdigest()
        return {"requests": len(self.pairs), "sha256": digest}


@dataclass(frozen=True)
class Prefixes:
    """A share of the sessions begins with one of `count` common prefixes of `tokens` tokens.

    The k-th is chosen in proportion to k^-exponent (Zipf); 0 chooses all alike.
    """

    count: int
    tokens: int
    share: Fraction = Fraction(1)
    exponent: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.count <= 1_000_000 or not 1 <= self.tokens <= MOST_TOKENS:
            raise UsageError("prefixes: count from 1 to 1,000,000, tokens from 1 to 10,000,000")
        if not 0 < self.share <= 1 or not 0 <= self.exponent <= 10:
            raise UsageError("prefixes: share above 0% to 100%, exponent from 0 to 10")


@dataclass(frozen=True)
class Turns:
    """A geometric number of turns by its mean, cut off at `most`.

    A turn's prompt is all that was said before and the new input. It comes after the reply and the
    user's think time; how long the reply takes nobody knows before, so it is assumed:
    `reply_start_ns` and `reply_ns_per_token`. In a replay with turns the real reply counts.
    """

    mean: float
    most: int = 1_000
    think: Lengths = field(
        default_factory=lambda: Lengths(8.0 * NS_PER_S, 1.0, least=0, most=86_400 * NS_PER_S)
    )
    reply_start_ns: int = NS_PER_S // 2
    reply_ns_per_token: int = NS_PER_S // 50

    def __post_init__(self) -> None:
        if not 1 <= self.mean <= self.most <= 100_000:
            raise UsageError("turns: mean from 1 to most, most to 100,000")


@dataclass(frozen=True)
class Described:
    """A load. Input tokens are those of one turn, without prefix and history.

    context_tokens: a session ends before the turn whose prompt and reply would exceed it.
    block_tokens: size of the prefix blocks; there are none unless prefixes or turns are asked for.
    chat: share of the sessions that use the chat endpoint; the others complete a text.
    """

    arrivals: tuple[Part, ...]
    input_tokens: Lengths | Empirical
    output_tokens: Lengths | Empirical
    prefixes: Prefixes | None = None
    turns: Turns | None = None
    context_tokens: int | None = None
    block_tokens: int = 128
    chat: Fraction = Fraction(0)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.arrivals:
            raise UsageError("arrivals: give at least one part, such as poisson 5/s for 10m")
        expected = float(sum(part.expected for part in self.arrivals))
        expected *= self.turns.mean if self.turns else 1
        if expected > MOST_REQUESTS:
            raise UsageError(
                f"arrivals: about {expected:,.0f} requests are more than the {MOST_REQUESTS:,} "
                "that a tape should hold"
            )
        if not 1 <= self.block_tokens <= 1 << 20:
            raise UsageError(f"block_tokens {self.block_tokens}: give one from 1 to 1,048,576")
        if not 0 <= self.chat <= 1:
            raise UsageError("chat: give a share from 0% to 100%")
        if self.context_tokens is not None and self.context_tokens < 2:
            raise UsageError(f"context_tokens {self.context_tokens}: give at least 2")

    def as_dict(self) -> dict[str, Any]:
        """As a tape keeps it; what it says is all that the rows follow from."""
        parts = [
            asdict(p) | {"from_per_s": str(p.from_per_s), "to_per_s": str(p.to_per_s)}
            for p in self.arrivals
        ]
        prefixes = asdict(self.prefixes) if self.prefixes else None
        if prefixes:
            prefixes["share"] = str(prefixes["share"])
        return {
            "arrivals": parts,
            "input_tokens": self.input_tokens.as_dict(),
            "output_tokens": self.output_tokens.as_dict(),
            "prefixes": prefixes,
            "turns": asdict(self.turns) if self.turns else None,
            "context_tokens": self.context_tokens,
            "block_tokens": self.block_tokens,
            "chat": str(self.chat),
            "seed": self.seed,
        }

    @cached_property
    def sha256(self) -> str:
        """A digest of all of it: the same load has the same one everywhere."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()
