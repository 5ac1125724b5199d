"""Draws a described load: batches of requests, in the order in which their sessions begin.

numpy's RandomState is frozen for good (NEP 19). What its functions and exp round differently
on two hosts is cut to whole ns and tokens before anything is added up, and rates are followed with
the four operations and a square root, which are exact everywhere: a last bit cannot travel.
"""

import math
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tokentape.traces.importers.rows import Batch, Parents
from tokentape.traces.synthetic.described import (
    NS_PER_S,
    Described,
    Empirical,
    Lengths,
    Part,
    Turns,
)

Ints = NDArray[np.int64]

SESSIONS = 8_192  # drawn at a time: bounds the memory, changes nothing that is drawn
UNIT_BITS = 32  # gaps of a process of mean 1 are whole multiples of 2^-32
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def random_of(name: str, seed: int) -> np.random.RandomState:
    """A stream of its own for everything that is drawn, so that one does not move another."""
    digest = blake2b(f"{name}\0{seed}".encode(), digest_size=32, person=b"tokentape").digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4"))


def batches(described: Described, sessions: int = SESSIONS) -> Iterator[Batch]:
    """The requests of so many sessions at a time; times from the start of the load.

    No later batch has a request before the first of this one.
    """
    load = _Load(described)
    for starts_ns in _starts(described, sessions):
        batch = load.take(starts_ns)
        if len(batch.time_ns):
            yield batch


def _starts(described: Described, size: int) -> Iterator[Ints]:
    begin_ns = 0
    for number, part in enumerate(described.arrivals):
        random = random_of(f"arrivals {number}", described.seed)
        for starts_ns in part_starts_ns(part, random, size):
            yield begin_ns + starts_ns
        begin_ns += part.lasting_ns


def part_starts_ns(part: Part, random: np.random.RandomState, size: int) -> Iterator[Ints]:
    """When sessions begin, ns from the start of a part; at most `size` at a time.

    A process of mean gap 1 runs on a clock that is the integral of the rate. Its first event comes
    at once where it is constant, else after one gap.
    """
    lasting_s = part.lasting_ns / NS_PER_S
    first, last = float(part.from_per_s), float(part.to_per_s)
    slope = (last - first) / (2 * lasting_s)
    whole = int(part.expected * (1 << UNIT_BITS))
    done = np.int64(0)
    while done < whole:
        units = _units(part, random, size)
        at = done + np.cumsum(units) - (units[0] if part.process == "constant" else 0)
        done += units.sum()
        inside = at[at < whole] / float(1 << UNIT_BITS)
        if len(inside):
            root = np.sqrt(np.maximum(first * first + 4 * slope * inside, 0.0))
            below = first + root
            times_s = np.divide(2 * inside, below, out=np.zeros_like(inside), where=below > 0)
            yield np.minimum((times_s * NS_PER_S).astype(np.int64), part.lasting_ns - 1)


def _units(part: Part, random: np.random.RandomState, size: int) -> Ints:
    """Gaps of mean 1 in units of 2^-32."""
    if part.process == "constant":
        return np.full(size, 1 << UNIT_BITS, dtype=np.int64)
    if part.process == "poisson":
        gaps = random.standard_exponential(size)
    else:
        shape = 1 / part.cv**2
        gaps = random.standard_gamma(shape, size) / shape
    return np.maximum((gaps * (1 << UNIT_BITS)).astype(np.int64), 1)


class _Load:
    """Draws sessions one lot after the other; each draw takes from its own stream, in order."""

    def __init__(self, described: Described) -> None:
        self._described = described
        names = ("input", "output", "pairs", "turns", "think", "prefixed", "prefix", "chat")
        self._random = {name: random_of(name, described.seed) for name in names}
        self._sessions = self._rows = 0
        prefixes = described.prefixes
        self._popularity: NDArray[np.float64] | None = None
        if prefixes is not None:
            weights = np.arange(1, prefixes.count + 1, dtype=np.float64) ** -prefixes.exponent
            self._popularity = np.cumsum(weights / weights.sum())

    def take(self, starts_ns: Ints) -> Batch:
        """All requests of the sessions that begin then."""
        described, count = self._described, len(starts_ns)
        turns = self._turn_counts(count)
        session = np.repeat(np.arange(count), turns)
        first = np.repeat(np.cumsum(turns) - turns, turns)
        turn = np.arange(len(session)) - first
        own, output = self._lengths(len(session))
        prefix = self._prefix_of(count)
        chat = self._random["chat"].random_sample(count) < float(described.chat)
        shared = np.zeros(count, dtype=np.int64)
        if described.prefixes is not None:
            shared[prefix >= 0] = described.prefixes.tokens
        said = np.cumsum(own + output)
        before = said - (own + output)  # of all rows; less what was before the session's first
        prompt = shared[session] + before - before[first] + own
        gap_ns, think_ns = self._gaps(turn, output)
        waited = np.cumsum(gap_ns)
        time_ns = starts_ns[session] + waited - waited[first]
        kept = self._within_context(prompt + output, first)
        numbers = self._rows + np.arange(len(session), dtype=np.int64)
        names = self._sessions + session
        columns: dict[str, pa.Array] = {
            "input_tokens": pa.array(prompt[kept]),
            "output_tokens": pa.array(output[kept]),
            "outcome": pa.nulls(int(kept.sum()), pa.string()),
            "operation": _operations(chat[session[kept]]),
        }
        parents = None
        if described.turns is not None:
            columns |= _session_columns(names[kept], turn[kept], think_ns[kept])
            parents = _parents(turn[kept], time_ns[kept], numbers[kept])
        if described.turns is not None or described.prefixes is not None:
            columns |= self._blocks(prompt[kept], names[kept], prefix[session[kept]])
        self._sessions += count
        self._rows += len(session)
        return Batch(time_ns[kept], numbers[kept], columns, {}, {}, parents)

    def _turn_counts(self, count: int) -> Ints:
        turns = self._described.turns
        if turns is None or turns.mean == 1:
            return np.ones(count, dtype=np.int64)
        drawn = self._random["turns"].random_sample(count)
        tail = math.log1p(-1 / turns.mean)  # of one more turn, as a logarithm
        more = np.floor(np.log1p(-drawn) / tail).astype(np.int64)
        return np.minimum(1 + more, turns.most)

    def _lengths(self, count: int) -> tuple[Ints, Ints]:
        """(input, output) tokens; those of one tape come from one of its requests."""
        drawn = self._random["pairs"].random_sample(count)
        both = (("input", self._described.input_tokens), ("output", self._described.output_tokens))
        found = []
        for column, (name, how) in enumerate(both):
            if isinstance(how, Empirical):
                pairs = how.pairs
                place = np.minimum((drawn * len(pairs)).astype(np.int64), len(pairs) - 1)
                found.append(pairs[place, column].astype(np.int64))
            else:
                found.append(_lognormal(how, self._random[name], count))
        return found[0], found[1]

    def _prefix_of(self, count: int) -> Ints:
        """The common prefix that each session begins with, -1 for none."""
        prefixes = self._described.prefixes
        if prefixes is None or self._popularity is None:
            return np.full(count, -1, dtype=np.int64)
        has_one = self._random["prefixed"].random_sample(count) < float(prefixes.share)
        drawn = self._random["prefix"].random_sample(count)
        which = np.searchsorted(self._popularity, drawn, side="right")
        return np.where(has_one, np.minimum(which, prefixes.count - 1), -1)

    def _gaps(self, turn: Ints, output: Ints) -> tuple[Ints, Ints]:
        """(ns since the turn before, of these thinking), for each request; 0 for a first turn."""
        turns = self._described.turns or Turns(1)
        think = np.zeros(len(turn), dtype=np.int64)
        if self._described.turns is not None:
            think = _lognormal(turns.think, self._random["think"], len(turn))
        replied = turns.reply_start_ns + turns.reply_ns_per_token * output
        gap = think + np.concatenate([[0], replied[:-1]])
        return np.where(turn > 0, gap, 0), np.where(turn > 0, think, 0)

    def _within_context(self, tokens: Ints, first: Ints) -> NDArray[np.bool_]:
        """Which requests fit; after the first that does not, a session has no more."""
        most = self._described.context_tokens
        if most is None:
            return np.ones(len(tokens), dtype=np.bool_)
        over = np.cumsum(tokens > most)
        own_over = over - over[first] + (tokens[first] > most)
        return np.asarray(own_over == 0)

    def _blocks(self, prompt: Ints, names: Ints, prefix: Ints) -> dict[str, pa.Array]:
        """Full blocks only, named by the common prefix that they lie in, else by their session.

        Prompts of a session grow at their ends, so what they have in common stays the same.
        """
        size = self._described.block_tokens
        counts = prompt // size
        row = np.repeat(np.arange(len(prompt)), counts)
        place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        shared = self._described.prefixes.tokens if self._described.prefixes else 0
        common = (prefix[row] >= 0) & ((place + 1) * size <= shared)
        owner = np.where(common, 2 * prefix[row], 2 * names[row] + 1)
        hashes = _mixed(_mixed(owner.astype(np.uint64) * _STEP) + place.astype(np.uint64) * _STEP)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        return {
            "block_hashes": pa.ListArray.from_arrays(
                pa.array(offsets), pa.array(hashes.view(np.int64))
            ),
            "block_tokens": pa.repeat(pa.scalar(size, pa.int32()), len(prompt)),
            "block_unit": pa.repeat(pa.scalar("token"), len(prompt)),
            "block_scope": pa.repeat(pa.scalar("tape"), len(prompt)),
            "prefix_partial": pa.array((prompt % size).astype(np.int32)),
        }


def _operations(chat: NDArray[np.bool_]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(
        pa.array(chat.astype(np.int8)), pa.array(["text_completion", "chat"])
    ).cast(pa.string())


def _session_columns(names: Ints, turn: Ints, think_ns: Ints) -> dict[str, pa.Array]:
    return {
        "session_id": pa.array([f"s{name}" for name in names.tolist()]),
        "session_source": pa.repeat(pa.scalar("plan"), len(names)),
        "turn_index": pa.array(turn.astype(np.int32)),
        "think_ns": pa.array(think_ns, mask=turn == 0),
    }


def _parents(turn: Ints, time_ns: Ints, numbers: Ints) -> Parents:
    """Each turn waits for the one before it, which is the row before it."""
    later = np.flatnonzero(turn > 0)
    offsets = np.concatenate([[0], np.cumsum(turn > 0)]).astype(np.int64)
    return Parents(offsets, time_ns[later - 1], numbers[later - 1])


def _lognormal(how: Lengths, random: np.random.RandomState, count: int) -> Ints:
    if not how.cv:
        return np.full(count, round(how.mean), dtype=np.int64)
    variance = math.log1p(how.cv**2)
    drawn = np.exp(random.standard_normal(count) * math.sqrt(variance) - variance / 2)
    whole = np.floor(np.minimum(how.mean * drawn, float(how.most)) + 0.5).astype(np.int64)
    return np.clip(whole, how.least, how.most)


def _mixed(x: Any) -> Any:
    """SplitMix64's finalizer."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))
