"""Makes other loads out of a recorded one: fewer sessions, more of them, for longer. Pure.

Each operator takes requests in order of time and gives requests in order of time; sessions stay
whole, and what is drawn follows from the seed, the session and the operator alone, so it is the
same on every host. What an operator does to think time, bursts and prefix reuse is in `distorts`;
the plan measures it (`shape.py`). A new operator is a class with the three members of `Operator`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from hashlib import blake2b
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from tokentape.replay.sessions import Numbers, mixed
from tokentape.traces.errors import UsageError

Ints = NDArray[np.int64]
Draws = NDArray[np.uint64]

NS_PER_S = 1_000_000_000
MOST_REQUESTS = 100_000_000  # of a plan: 1.4 GB of due times
MOST_COPIES = (1 << 15) - 1  # copy_index is 16 bits wide
MOST_NS = 1 << 62
_STEP = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Selected:
    """Requests on their way from a tape to a plan, sorted by time.

    time_ns: int64[n], ns of the recorded time, not of the run. row: int32[n], rows of the tape.
    copy: int16[n], which copy of the row; 0 is the recorded request itself.
    """

    time_ns: Ints
    row: NDArray[np.int32]
    copy: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.time_ns)

    @property
    def period_ns(self) -> int:
        """How long these arrivals last when they are repeated: the span and one mean gap."""
        if len(self) < 2:
            return NS_PER_S
        span_ns = int(self.time_ns[-1] - self.time_ns[0])
        return max(1, span_ns + -(-span_ns // (len(self) - 1)))

    def only(self, kept: NDArray[np.bool_]) -> "Selected":
        """Some of them."""
        return Selected(self.time_ns[kept], self.row[kept], self.copy[kept])


@dataclass(frozen=True)
class Kin:
    """Who stays together, and what a router would see.

    number: int32 for each row of the tape, -1 for a request by itself. digest: uint64 for each row,
    of its session's name: a session is drawn alike on any tape. duration_ns: int64 for each row.
    prefixes: (blocks of each request, their names) of some requests, part after part.
    """

    number: Numbers
    digest: Draws
    duration_ns: Ints | None = None
    prefixes: Callable[[Selected], Iterator[tuple[Ints, Draws]]] | None = None

    @classmethod
    def nobody(cls, rows: int) -> "Kin":
        """Every request by itself."""
        return cls(np.full(rows, -1, dtype=np.int32), np.zeros(rows, dtype=np.uint64))

    def draws(self, chosen: Selected, salt: int) -> Draws:
        """64 random bits for each request, the same for all of one copy of a session.

        A request by itself is known by its row.
        """
        number = self.number[chosen.row]
        alone = number < 0
        keys = mixed(chosen.row.astype(np.uint64) + _STEP)
        keys[~alone] = self.digest[chosen.row[~alone]]
        keys ^= mixed(chosen.copy.astype(np.uint64) * _STEP)
        return mixed(keys + np.uint64(salt))

    def starts_ns(self, chosen: Selected) -> Ints:
        """When the session of each request begins among them; its own time where it has none."""
        number = self.number[chosen.row]
        together = number >= 0
        first = np.full(int(number.max(initial=-1)) + 1, MOST_NS, dtype=np.int64)
        np.minimum.at(first, number[together], chosen.time_ns[together])
        starts = chosen.time_ns.copy()
        starts[together] = first[number[together]]
        return starts


Watch = Callable[[str, Selected], None]


class Operator(Protocol):
    """One step from a recorded load to another. `words` name it as it was asked for."""

    @property
    def words(self) -> str:
        """Such as `thin 50%`."""

    @property
    def distorts(self) -> str:
        """What it does to think time, bursts and prefix reuse, in a sentence."""

    @property
    def instead(self) -> "Operator | None":
        """A simpler one that it is compared with, if any."""

    def apply(self, chosen: Selected, kin: Kin) -> Selected:
        """The requests after it; UsageError for more than a plan can hold."""


@dataclass(frozen=True)
class Thin:
    """Keeps a share of the sessions, each whole: those whose draw is below the share.

    A session that `--thin 25%` keeps is kept by `--thin 50%` too.
    """

    share: Fraction
    seed: int

    instead: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError("--thin 0%: nothing would be left; give a share such as 50%")

    @property
    def words(self) -> str:
        """As it was asked for."""
        return f"thin {_percent(self.share)}"

    @property
    def distorts(self) -> str:
        """In a sentence."""
        return (
            "think time stays; arrivals come closer to independent ones; prefixes that several "
            "sessions share are reused less"
        )

    def apply(self, chosen: Selected, kin: Kin) -> Selected:
        """The requests of the sessions that are kept."""
        return chosen.only(_below(kin.draws(chosen, _salt("thin", self.seed)), self.share))


@dataclass(frozen=True)
class Multiply:
    """Lays copies of the load over each other, moved in time against each other.

    Of m copies the k-th is moved by about k/m of the tape's period, to the nearest quarter of 1/m
    drawn from the seed. The shift is circular by session: one that would begin past the end begins
    as much after the start, with all of its turns. A last fraction is a thinned copy.
    """

    factor: Fraction
    seed: int

    instead: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.factor < 1:
            thin = f"--thin {_percent(self.factor)}" if self.factor > 0 else "2 or 2.5x"
            raise UsageError(f"--multiply {_plain(self.factor)}: multiplies by 1 at least; {thin}")

    @property
    def words(self) -> str:
        """As it was asked for."""
        return f"multiply {_plain(self.factor)}x"

    @property
    def distorts(self) -> str:
        """In a sentence."""
        return (
            "think time stays; bursts of the copies fall apart, so that peaks grow less than the "
            "mean and a daily curve is flattened; no prefix is shared between copies; sessions "
            "that were moved over the end begin at the start"
        )

    def apply(self, chosen: Selected, kin: Kin) -> Selected:
        """The copies, each request with its copy's number."""
        count = math.ceil(self.factor)
        _check_size(f"--multiply {_plain(self.factor)}", len(chosen) * self.factor, count)
        period_ns, starts = chosen.period_ns, kin.starts_ns(chosen)
        origin = int(chosen.time_ns[0]) if len(chosen) else 0
        copies = [chosen]
        for copy in range(1, count):
            shift_ns = self._shift_ns(copy, count, period_ns)
            over = starts - origin + shift_ns >= period_ns
            moved = chosen.time_ns + np.where(over, shift_ns - period_ns, shift_ns)
            number = np.full(len(chosen), copy, dtype=np.int16)
            made = Selected(moved, chosen.row, number)
            if copy > self.factor - 1:
                salt = _salt("multiply", self.seed)
                made = made.only(_below(kin.draws(made, salt), self.factor - copy))
            copies.append(made)
        return _in_order(copies)

    def _shift_ns(self, copy: int, count: int, period_ns: int) -> int:
        """k/m of the period, give or take a quarter of 1/m: no two copies come together."""
        drawn = _salt(f"shift {copy}", self.seed)
        return (period_ns * (4 * copy - 1)) // (4 * count) + (period_ns * drawn >> 64) // (
            2 * count
        )


@dataclass(frozen=True)
class Loop:
    """Repeats the load until an instant of the recorded time, the first pass being as it was.

    Give `run_ns`, how long the run shall last at its `speed`, or `passes`. Sessions that the end
    cuts are cut, as the end of a run cuts them.
    """

    run_ns: int | None = None
    passes: Fraction | None = None
    speed: Fraction = Fraction(1)

    instead: ClassVar[None] = None

    @property
    def words(self) -> str:
        """As it was asked for."""
        if self.passes is not None:
            return f"loop {_plain(self.passes)}x"
        return f"loop {_plain(Fraction(self.run_ns or 0, NS_PER_S))}s"

    @property
    def distorts(self) -> str:
        """In a sentence."""
        return (
            "think time and bursts stay and repeat; no prefix is shared between passes; at each "
            "seam the turns of sessions from before the tape are missing"
        )

    def apply(self, chosen: Selected, kin: Kin) -> Selected:
        """The passes one after the other; each has copies of its own."""
        if not len(chosen):
            return chosen
        period_ns, width = chosen.period_ns, int(chosen.copy.max()) + 1
        passes = self.passes if self.run_ns is None else self.run_ns * self.speed / period_ns
        until = math.ceil(period_ns * (passes or 1))
        if until < period_ns:
            raise UsageError(
                f"--loop: is shorter than the {period_ns / self.speed / NS_PER_S:.1f} s that it "
                "would repeat; use --window"
            )
        count = -(-until // period_ns)
        _check_size("--loop", len(chosen) * Fraction(until, period_ns), count * width)
        end_ns = int(chosen.time_ns[0]) + until
        if end_ns >= MOST_NS:
            raise UsageError("--loop: would last over a century; give a shorter time")
        made = _in_order(
            replace(
                chosen,
                time_ns=chosen.time_ns + number * period_ns,
                copy=(chosen.copy + number * width).astype(np.int16),
            )
            for number in range(count)
        )
        return made.only(made.time_ns < end_ns)


@dataclass(frozen=True)
class Spread:
    """Puts arrivals that a coarse clock stamped alike anywhere within its step, in their order."""

    step_ns: int
    seed: int

    instead: ClassVar[None] = None

    @property
    def words(self) -> str:
        """As it was asked for."""
        return f"spread over {self.step_ns / NS_PER_S:g} s"

    @property
    def distorts(self) -> str:
        """In a sentence."""
        return (
            "think time is wrong by a step at most, as it was before; bursts within a step, which "
            "the tape does not know, become those of independent arrivals; prefix reuse stays"
        )

    def apply(self, chosen: Selected, kin: Kin) -> Selected:
        """The same requests in the same order, at other times."""
        salt = np.uint64(_salt("spread", self.seed))
        keys = chosen.row.astype(np.uint64) * _STEP + mixed(chosen.copy.astype(np.uint64) + salt)
        within = mixed(keys) >> np.uint64(32)  # 32 bits, so that no product leaves 64
        moves = _scaled(within, self.step_ns)
        groups = np.cumsum(np.diff(chosen.time_ns, prepend=chosen.time_ns[:1]) != 0)
        order = np.lexsort((moves, groups))  # the k-th request of an instant gets the k-th move
        return _in_order([replace(chosen, time_ns=chosen.time_ns + moves[order])])


def operate(
    chosen: Selected, operators: Sequence[Operator], kin: Kin, watch: Watch
) -> tuple[Selected, dict[str, NDArray[np.int32]]]:
    """The load after all operators, in their order, and the rows that none of it replays.

    `watch` is told the load before and after each.
    """
    gone: dict[str, NDArray[np.int32]] = {}
    watch("tape", chosen)
    for operator in operators:
        before, chosen = chosen, operator.apply(chosen, kin)
        watch(operator.words, chosen)
        if (other := operator.instead) is not None:
            watch(f"({other.words} instead)", other.apply(before, kin))
        if len(chosen) < len(before):
            gone[f"not in {operator.words}"] = np.setdiff1d(before.row, chosen.row)
    return chosen, {reason: rows for reason, rows in gone.items() if len(rows)}


def _in_order(parts: Iterable[Selected]) -> Selected:
    """All of them by time; of one instant, the lower copy and then the earlier request first."""
    copies = list(parts)
    times = np.concatenate([c.time_ns for c in copies])
    order = np.argsort(times, kind="stable")
    rows = np.concatenate([c.row for c in copies])
    numbers = np.concatenate([c.copy for c in copies])
    return Selected(times[order], rows[order], numbers[order])


def _check_size(option: str, requests: Fraction, copies: int) -> None:
    if requests > MOST_REQUESTS or copies > MOST_COPIES:
        raise UsageError(
            f"{option}: would make {int(requests):,} requests in {copies:,} copies; a plan holds "
            f"{MOST_REQUESTS:,} in {MOST_COPIES:,}"
        )


def _below(draws: Draws, share: Fraction) -> NDArray[np.bool_]:
    """Which draws are below a share of all 64-bit numbers."""
    limit = math.ceil(share * (1 << 64)) - 1  # the largest draw that is kept
    return draws <= np.uint64(limit)


def _scaled(bits: Draws, width_ns: int) -> Ints:
    """32-bit numbers as whole ns below a width, without leaving 64 bits on the way."""
    high, low = divmod(width_ns, 1 << 31)
    part = (bits * np.uint64(low)) >> np.uint64(32)
    whole = (bits * np.uint64(high)) >> np.uint64(1)
    return np.minimum((part + whole).astype(np.int64), width_ns - 1)


def _salt(name: str, seed: int) -> int:
    """64 bits of an operator and a seed."""
    digest = blake2b(f"{name}\0{seed}".encode(), digest_size=8, person=b"tokentape").digest()
    return int.from_bytes(digest, "little")


def _plain(value: Fraction) -> str:
    return f"{float(value):g}"


def _percent(share: Fraction) -> str:
    return f"{float(100 * share):g}%"
