"""What a writer process takes over from the one that died before it: nothing ends with a writer.

The hot process sends again what the dead one had not confirmed; the journal says which of it had
been read all the same. So a successor goes on at the very record, with the same clock, and the rows
look as if nothing had happened. Only what a parser held of an unfinished message is lost.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokentape.traces import facts as tape_facts
from tokentape.traces import journal
from tokentape.traces.clock import TapeClock
from tokentape.traces.recover import Leftover, Recovered, count_killed, replay_journal


@dataclass(frozen=True)
class Inheritance:
    """What one dead writer left; `skip` blocks of those that come again are in it already."""

    tape: Path
    incarnation: str
    file: Path
    left: Leftover
    finished: list[dict[str, Any]]  # rows that no segment has
    sealed_rows: int
    sealed_events: int
    skip: int

    @property
    def clock(self) -> TapeClock:
        """The clock that goes on, so that times before and after can be compared to the ns."""
        epoch_unix_ns = tape_facts.read_facts(self.tape)["wall_epoch_unix_ns"]
        return TapeClock.resume(epoch_unix_ns, self.left.clock)

    @property
    def recovered(self) -> Recovered:
        """What the dead writer itself has brought to the tape."""
        return Recovered(0, 0, self.sealed_events, self.sealed_rows)

    def account(self) -> None:
        """Write to tape.json what the dead writer has seen: what it sealed; the rest is ours."""
        with tape_facts.changing(self.tape) as facts:
            count_killed(facts, self.incarnation, self.sealed_rows, 0, 0)

    def clear(self) -> None:
        """Delete its small files, and its journal where that is still there."""
        for file in (self.tape / "journal").glob(f"{self.incarnation}[.-]*"):
            file.unlink(missing_ok=True)


def inherit(tape: Path, ancestors: dict[str, int]) -> Inheritance | None:
    """The journal of the last of these dead writers that has one, read; None where there is none.

    Args: ancestors: by name, how many blocks the hot process knows to be done with; the block
    after those is the first that comes again.
    """
    files = dict(journal.leftovers(tape))
    name = next((n for n in reversed(ancestors) if n in files), None)
    if name is None:
        return None
    left = replay_journal(files[name], whole_blocks=True)
    if not left.clock["anchors"]:  # torn within its first record
        return None
    finished = journal.without_sealed(tape, name, left.finished)
    skip = max(left.blocks - ancestors.get(left.counted_by, left.blocks), 0)
    counts = journal.sealed_counts(tape, name)
    return Inheritance(tape, name, files[name], left, finished, *counts, skip)
