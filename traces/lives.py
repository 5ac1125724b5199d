"""What the writers of one hot process brought to the tape, added up over their lives."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Summary:
    """What became of everything seen: seen = rows + unsealed + sampled_out + losses of whole rows.

    `unsealed` rows are safe in the journal, but a full disk kept them from their segment.
    `lost_reads` are pieces of replies that no row holds, because a process was killed.
    """

    seen: int
    rows: int
    events: int
    losses: dict[str, int] = field(default_factory=dict)
    unsealed: int = 0
    lost_reads: int = 0
    sampled_out: int = 0  # by intent, see `keep.py`


class Past:
    """What dead writers left on the tape, by what was recovered of each."""

    def __init__(self) -> None:
        self._rows = self._events = self._killed = self._lost_reads = self._sampled_out = 0
        self._served: dict[str, float] = {}

    def add(self, recovered: dict[str, int] | None) -> None:
        """Count what one recovery found: `Recovered` as a dictionary."""
        if recovered is not None:
            self._rows += recovered["rows_on_tape"]
            self._events += recovered["events"]
            self._killed += recovered["lost_requests"]
            self._lost_reads += recovered["lost_reads"]
            self._sampled_out += recovered["sampled_out"]

    def served_with(self, served: dict[str, float]) -> dict[str, float]:
        """Counts of all writers together."""
        added = {n: v + self._served.get(n, 0.0) for n, v in served.items()}
        return self._served | added

    def keep_served(self, served: dict[str, float]) -> None:
        """A writer has died: its counts stay."""
        self._served = self.served_with(served)

    def summary(
        self,
        seen: int,
        rows: int,
        events: int,
        losses: dict[str, int],
        unsealed: int = 0,
        lost_reads: int = 0,
        sampled_out: int = 0,
    ) -> Summary:
        """The last writer's summary with all before it."""
        killed = {"killed": self._killed + losses.get("killed", 0)} if self._killed else {}
        return Summary(
            seen + self._rows + self._killed + self._sampled_out,
            rows + self._rows,
            events + self._events,
            losses | killed,
            unsealed,
            lost_reads + self._lost_reads,
            sampled_out + self._sampled_out,
        )
