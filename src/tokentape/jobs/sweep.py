"""A tape at several speeds against one or more candidates: the runs of a frontier, or an A/B test.

Several candidates take turns at each speed (ABAB), so that what drifts on the way drifts for all.
"""

from collections.abc import Sequence
from fractions import Fraction

from tokentape.jobs.probes import Done, Probes
from tokentape.traces.errors import CannotKeepUp


def order(
    candidates: Sequence[str], speeds: Sequence[Fraction], repeat: int
) -> list[tuple[str, Fraction, str]]:
    """(name, speed, candidate) of each run, in the order in which they are made."""
    runs = []
    for speed in speeds:
        for again in range(repeat):
            for letter, to in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", candidates, strict=False):
                parts = [letter] if len(candidates) > 1 else []
                parts += [f"{float(speed):g}x", *([str(again + 1)] if repeat > 1 else [])]
                runs.append(("-".join(parts), speed, to))
    return runs


def sweep(
    probes: Probes, runs: Sequence[tuple[str, Fraction, str]], done: list[Done]
) -> list[CannotKeepUp]:
    """Make the runs, into `done` as they end; what this machine could not offer is returned.

    A speed that it cannot offer is left out, and so is every higher one.
    """
    refused: list[CannotKeepUp] = []
    limit: Fraction | None = None
    for name, speed, to in runs:
        if limit is not None and speed >= limit:
            continue
        try:
            done.append(probes.run(name, speed, to))
        except CannotKeepUp as error:
            refused.append(error)
            limit = speed
            probes.tell(str(error))
    return refused
