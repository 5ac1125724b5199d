"""A replay from end to end: options in, plan out, run on a tape, verdict at the end.

`make_plan` reads the tape and asks the candidate; nothing of the plan is sent before `run_plan`.
The run is a tape like any other; what was planned, sent and judged stands in its tape.json. No
header value and no key may reach it.
"""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import uvloop
except ImportError:  # it is for Linux only
    uvloop = None  # type: ignore[assignment]

from tokentape.replay.health import cores
from tokentape.replay.plan import Plan, ReplayOptions, make_plan
from tokentape.replay.progress import Progress
from tokentape.replay.sender import Sent
from tokentape.replay.sending import send_share
from tokentape.replay.verdict import Verdict, judge_run
from tokentape.traces import facts as tape_facts
from tokentape.traces.errors import UsageError
from tokentape.traces.reader import open_tape
from tokentape.traces.recording import Recorder

__all__ = ["Plan", "Progress", "ReplayOptions", "RunSummary", "make_plan", "run_plan"]


@dataclass(frozen=True)
class RunSummary:
    """How a run ended. `stopped`: by a signal before its end, the tape holds what was sent."""

    verdict: Verdict
    tape: Path
    rows: int
    events: int
    sent: int
    not_sent: int
    stopped: bool
    outcomes: dict[str, int] = field(default_factory=dict)
    losses: dict[str, int] = field(default_factory=dict)


def run_plan(plan: Plan, progress: Callable[[Progress], None] | None = None) -> RunSummary:
    """Send a plan, record it as a tape, judge it.

    Ctrl-C and SIGTERM stop the sending; the tape is sealed all the same. Raises TokentapeError when
    the candidate does not take a single connection, or the tape cannot be written.
    """
    options = plan.options
    if options.tape is None:
        raise UsageError("--tape: name the folder of the run's tape")
    if not plan.probed:
        raise UsageError("an offline plan cannot be run: the candidate was not asked")
    recorder = Recorder.start(
        options.tape,
        role="replay",
        command=options.as_dict()["command"],
        options=options.as_dict(),
        facts=_facts(plan),
        content="structure",
        force=options.force,
    )
    try:
        work = send_share(
            plan.whole,
            recorder,
            _stopped_by_signals,
            prepare=plan.outgoing,
            progress=progress,
        )
        sent = run_loop(work)
    except BaseException:
        recorder.finish({"run": {"failed": True}})
        raise
    summary = recorder.finish({"run": _run_facts(sent)})
    lost = {name: n for name, n in summary.losses.items() if n}
    verdict = judge_run(
        open_tape(options.tape),
        sent,
        shortest_input_tokens=plan.shortest_input_tokens,
        prompts_counted=all(form.counted for form in plan.target.forms.values()),
        losses=lost,
    )
    _add_facts(options.tape, {"verdict": verdict.as_dict()})
    return RunSummary(
        verdict=verdict,
        tape=options.tape,
        rows=summary.rows,
        events=summary.events,
        sent=sent.sent,
        not_sent=sent.not_sent,
        stopped=sent.stopped,
        outcomes=verdict.figures["outcomes"],  # as recorded: the wire alone takes a 429 for ok
        losses=lost,
    )


def run_loop[T](work: Coroutine[Any, Any, T]) -> T:
    """Run it to its end on uvloop, where that exists; asyncio's own loop does it as well."""
    return asyncio.run(work, loop_factory=uvloop.new_event_loop if uvloop else None)


@contextmanager
def _stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM call `stop` while the block runs, in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _facts(plan: Plan) -> dict[str, Any]:
    """What the run's tape.json says from the start."""
    figures = plan.json()
    return {
        "candidate": figures.pop("candidate"),
        "source": {"tape_id": plan.source.tape_id, "path": str(plan.options.source)},
        "plan": figures,
    }


def _run_facts(sent: Sent) -> dict[str, Any]:
    return {
        "sent": sent.sent,
        "not_sent": sent.not_sent,
        "stopped": sent.stopped,
        "connections_warmed": sent.warmed,
        "clock_steps": sent.clock_steps,
        "cores": cores(),
        "health": sent.health.as_dict(),
    }


def _add_facts(tape: Path, changes: dict[str, Any]) -> None:
    """Change tape.json of a sealed tape under its lock."""
    held = tape_facts.lock(tape)
    try:
        tape_facts.replace_facts(tape, tape_facts.read_facts(tape) | changes)
    finally:
        with contextlib.suppress(OSError):
            os.close(held)
