"""How many tokens each event stands for, from what the stream itself told.

Best first: token ids, usage that counts up with the stream, the usage total spread over the
events, one per event. All pure functions and the same answer every time. It never invents tokens:
where the events do not add up to the total, the name of the method says so (`_short`, `_over`).
"""

from array import array
from collections.abc import Sequence
from heapq import heapify, heapreplace
from typing import NamedTuple

NTOK_MAX = (1 << 16) - 1  # the column is UINT16


class Candidate(NamedTuple):
    """A message without text that may have stood for a token; it waits among the aux messages."""

    at_event: int  # events before it
    at_aux: int  # its place among the aux messages
    t_ns: int
    read: int
    choice: int
    finish: bool  # it carried a finish reason


def promoted(candidates: Sequence[Candidate], missing: int, hidden: int) -> list[Candidate]:
    """Candidates that become events, in order of time: as many as tokens are missing.

    Interior ones come first. `hidden` tokens (reasoning that was never sent) are then taken off,
    since a finish message cannot stand for those.
    """
    interior = [c for c in candidates if not c.finish][: max(0, missing)]
    missing -= len(interior)
    missing -= min(hidden, max(0, missing))
    finish = [c for c in candidates if c.finish][: max(0, missing)]
    return sorted(interior + finish, key=lambda c: c.at_aux)


def spread(total: int, text_bytes: Sequence[int]) -> list[int]:
    """A total shared out: 1 each, the excess by most text bytes per token so far.

    With fewer tokens than events, the events with the least text get 0, late ones first.
    Cost: O(n log n) whatever the total.
    """
    n = len(text_bytes)
    if total == n:
        return [1] * n
    if total < n:
        shortest = sorted(range(n), key=lambda i: (text_bytes[i], -i))
        ntok = [1] * n
        for i in shortest[: n - total]:
            ntok[i] = 0
        return ntok
    all_bytes = sum(text_bytes)
    if all_bytes == 0:
        return [total // n + (i < total % n) for i in range(n)] if n else []
    # Handing out one by one gives each event every token whose bytes per token exceed any bound
    # that keeps the sum below the total. This bound leaves at most n to hand out.
    excess = total - n
    ntok = [max(1, -(-b * excess // all_bytes)) for b in text_bytes]
    left = total - sum(ntok)
    if left:
        heap = [(-b / k, k, i) for i, (b, k) in enumerate(zip(text_bytes, ntok, strict=True))]
        heapify(heap)
        for _ in range(left):
            _, k, i = heap[0]
            ntok[i] = k + 1
            heapreplace(heap, (-text_bytes[i] / (k + 1), k + 1, i))
    return ntok


def from_cumulative(
    counts: Sequence[int], choices: Sequence[int], total: int | None
) -> list[int] | None:
    """Steps of a count that came with every event; None where it ran backwards.

    With several choices a server counts over all of them or (vLLM, SGLang) for each alone: the
    reading that meets the total is taken; with no total, a count that stood still or fell between
    two events is one for each choice.
    """
    overall = _steps(counts, [0] * len(counts))
    if not any(choices):
        return overall
    each = _steps(counts, choices)
    readings = [steps for steps in (overall, each) if steps is not None]
    for steps in readings:
        if total is not None and sum(steps) == total:
            return steps
    return overall if overall is not None and all(overall) else each


def _steps(counts: Sequence[int], choices: Sequence[int]) -> list[int] | None:
    seen: dict[int, int] = {}
    steps = []
    for count, choice in zip(counts, choices, strict=True):
        steps.append(count - seen.get(choice, 0))
        seen[choice] = count
    return None if any(step < 0 for step in steps) else steps


def source(method: str, ntok: Sequence[int], total: int | None) -> str:
    """The method's name, with the way in which the events miss the total."""
    have = sum(ntok)
    if total is None or have == total:
        return method
    return f"{method}_{'short' if have < total else 'over'}"


def inserted[T: (array[int], bytearray)](
    values: T, chosen: Sequence[Candidate], new: Sequence[int]
) -> T:
    """A copy of an events' array with one value for each chosen candidate at its place."""
    out = values[:0]
    start = 0
    for candidate, value in zip(chosen, new, strict=True):
        out += values[start : candidate.at_event]
        out.append(value)
        start = candidate.at_event
    out += values[start:]
    return out


def without[T: (array[int], bytearray)](values: T, chosen: Sequence[Candidate]) -> T:
    """A copy of an aux array without the chosen candidates."""
    out = values[:0]
    start = 0
    for candidate in chosen:
        out += values[start : candidate.at_aux]
        start = candidate.at_aux + 1
    out += values[start:]
    return out
