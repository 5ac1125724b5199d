"""Adds up what became of the workers of a run, those that died included. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokentape.replay.health import Health
from tokentape.replay.sender import Sent


@dataclass(frozen=True)
class WorkerEnd:
    """The end of a worker with so many requests; `died` says how where `sent` is None."""

    name: str
    requests: int
    sent: Sent | None
    died: str = ""


def tally(
    ends: Sequence[WorkerEnd], t0_ns: int, rows: Mapping[str, int], lost: Mapping[str, int]
) -> Sent:
    """What became of the whole plan.

    Args: rows, lost: by worker, what the sealed tape holds of it and what was lost of that. From
    these follows what a dead one had sent, as far as anybody can know.
    """
    workers: dict[str, dict[str, Any]] = {}
    dead: list[str] = []
    outcomes: dict[str, int] = {}
    sent = not_sent = 0
    for end in ends:
        mine = end.sent
        seen = rows.get(end.name, 0) + lost.get(end.name, 0)
        done = mine.sent if mine is not None else min(seen, end.requests)
        sent += done
        not_sent += end.requests - done
        about = {"requests": end.requests, "sent": done, "rows": rows.get(end.name, 0)}
        if mine is None:
            dead.append(
                f"worker {end.name} died ({end.died}): {rows.get(end.name, 0)} of its "
                f"{end.requests} requests are on the tape, {end.requests - done} were never sent"
            )
            workers[end.name] = about | {"died": end.died}
        else:
            workers[end.name] = about | {"health": mine.health.as_dict()}
            for name, count in mine.outcomes.items():
                outcomes[name] = outcomes.get(name, 0) + count
    living = [end.sent for end in ends if end.sent is not None]
    return Sent(
        t0_ns,
        sent,
        not_sent,
        any(one.stopped for one in living),
        sum(one.warmed for one in living),
        worst([one.health for one in living]),
        outcomes,
        max((one.clock_steps for one in living), default=0),
        sum(one.after_failure for one in living),
        workers,
        dead,
    )


def worst(healths: Sequence[Health]) -> Health:
    """The worst of each figure that is one worker's own; counts are added up."""
    if not healths:
        return Health(0, 0, 0, 0, 0, 0.0, None)

    steals = [h.steal_share for h in healths if h.steal_share is not None]
    windows = [h.windows_closed for h in healths if h.windows_closed is not None]
    return Health(
        ticks=min(h.ticks for h in healths),
        late_p50_ns=max(h.late_p50_ns for h in healths),
        late_p99_ns=max(h.late_p99_ns for h in healths),
        late_max_ns=max(h.late_max_ns for h in healths),
        missed_ticks=sum(h.missed_ticks for h in healths),
        cpu_share=max(h.cpu_share for h in healths),
        steal_share=max(steals, default=None),
        stalls=sum(h.stalls for h in healths),
        gc_runs=sum(h.gc_runs for h in healths),
        gc_ns=max(h.gc_ns for h in healths),
        windows_closed=max(windows, default=None),  # of the network space that they share
    )
