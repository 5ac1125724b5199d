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
    """What one dead writer left; `skip` blocks of those that come again are in it already.

    `gap`: blocks were given up, or confirmed without a journal, so streams that go on have a hole.
    """

    tape: Path
    names: list[str]  # of all dead writers whose shares are not on the tape's books yet
    file: Path
    left: Leftover
    finished: list[dict[str, Any]]  # rows that no segment has
    sealed_rows: int
    sealed_events: int
    skip: int
    gap: bool

    @property
    def clock(self) -> TapeClock:
        """The clock that goes on, so that times before and after can be compared to the ns."""
        epoch_unix_ns = tape_facts.read_facts(self.tape)["wall_epoch_unix_ns"]
        return TapeClock.resume(epoch_unix_ns, self.left.clock)

    @property
    def recovered(self) -> Recovered:
        """What the dead writers themselves have brought to the tape."""
        return Recovered(0, 0, self.sealed_events, self.sealed_rows)

    def settle(self) -> None:
        """Say in tape.json what the dead writers have sealed, then delete what they left."""
        with tape_facts.changing(self.tape) as facts:
            for name in self.names:
                sealed_rows, _ = journal.sealed_counts(self.tape, name)
                if sealed_rows or name in facts["losses"]:
                    count_killed(facts, name, sealed_rows, 0, 0)
        for name in self.names:
            for file in (self.tape / "journal").glob(f"{name}[.-]*"):
                file.unlink(missing_ok=True)


def inherit(tape: Path, ancestors: dict[str, int]) -> Inheritance | None:
    """The journal of the last of these dead writers that has one, read; None where there is none.

    Args: ancestors: by name, oldest first, how many of the blocks sent to it are done with. What
    follows them was sent to the next one, so the counts of all from one on add up.
    """
    files = dict(journal.leftovers(tape))
    name = next((n for n in reversed(ancestors) if n in files), None)
    if name is None:
        return None
    left = replay_journal(files[name], whole_blocks=True)
    if not left.clock["anchors"]:  # torn within its first record
        return None
    unsealed = journal.without_sealed(
        tape, name, [*left.finished, *(u.row for u in left.open.values())]
    )
    ids = {row["request_id"] for row in unsealed}
    finished = [row for row in left.finished if row["request_id"] in ids]
    left.open = {s: u for s, u in left.open.items() if u.row["request_id"] in ids}
    names = list(ancestors)
    every = [journal.sealed_counts(tape, n) for n in names]
    known = left.blocks
    if left.counted_by in ancestors:
        known -= sum(ancestors[n] for n in names[names.index(left.counted_by) :])
    else:
        known = 0
    left.telemetry = journal.samples_without_sealed(tape, name, left.telemetry)
    return Inheritance(
        tape,
        names,
        files[name],
        left,
        finished,
        sealed_rows=sum(rows for rows, _ in every),
        sealed_events=sum(events for _, events in every),
        skip=max(known, 0),
        gap=known < 0,
    )
