"""A replay from end to end: options in, plan out, run on a tape, verdict at the end.

`make_plan` reads the tape and asks the candidate; nothing of the plan is sent before `run_plan`.
The run is a tape like any other; what was planned, sent and judged stands in its tape.json. No
header value and no key may reach it.
"""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tokentape.replay import beforehand, sentinels
from tokentape.replay.crew import Crew, Member
from tokentape.replay.fidelity import fidelity
from tokentape.replay.health import cores, return_memory
from tokentape.replay.options import ReplayOptions
from tokentape.replay.plan import Plan, make_plan
from tokentape.replay.progress import Progress
from tokentape.replay.sender import Sent
from tokentape.replay.sending import run_loop, send_share
from tokentape.replay.start import StartAt
from tokentape.replay.tally import tally
from tokentape.replay.verdict import Verdict, judge_run
from tokentape.traces import facts as tape_facts
from tokentape.traces.errors import TapeError, TokentapeError, UsageError
from tokentape.traces.prepare import make_ready
from tokentape.traces.reader import Tape, open_tape
from tokentape.traces.recording import Recorder
from tokentape.traces.recover import seal_dead
from tokentape.traces.sampler import Sampler, keep_facts

__all__ = ["Plan", "Progress", "ReplayOptions", "RunSummary", "make_plan", "run_plan"]

SEAL_TIMEOUT_S = 60.0  # for what dead workers left


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
    the candidate does not take a single connection, the agreed start is missed, or the tape cannot
    be written.
    """
    options = plan.options
    if options.tape is None:
        raise UsageError("--tape: name the folder of the run's tape")
    if not plan.probed:
        raise UsageError("an offline plan cannot be run: the candidate was not asked")
    run = _by_crew if options.workers > 1 else _alone
    lock_fd = make_ready(options.tape, **_about(plan))
    with os.fdopen(lock_fd):
        earlier = _beforehand(plan)
        before = sentinels.ask(plan.target) if options.sentinels else []
        with _sampled(options, options.tape, lock_fd):
            sent = run(plan, options.tape, lock_fd, StartAt(options.start_at_unix_ns), progress)
        after = sentinels.ask(plan.target) if options.sentinels and not sent.stopped else []
    tape = open_tape(options.tape)
    lost = {name: n for name, n in tape.losses.items() if n}
    verdict = judge_run(
        tape,
        sent,
        shortest_input_tokens=plan.shortest_input_tokens,
        prompts_counted=all(form.counted for form in plan.target.forms.values()),
        losses=lost,
        planned_aborts=plan.source.aborts.count(plan.schedule.source_index),
    )
    for doubt in [*sentinels.doubts(before, after), *(d for s in earlier for d in s.doubts())]:
        verdict.blame("suspect", doubt)
    with suppress(TapeError):  # the source is gone meanwhile
        verdict.figures["fidelity"] = fidelity(tape, options.source).as_dict()
    with tape_facts.changing(options.tape) as facts:
        facts["verdict"] = verdict.as_dict()
        if earlier:
            facts["beforehand"] = {s.what: s.as_dict() for s in earlier}
        if options.sentinels:
            facts["sentinels"] = sentinels.as_facts(before, after)
    return RunSummary(
        verdict=verdict,
        tape=options.tape,
        rows=tape.rows,
        events=tape.events,
        sent=sent.sent,
        not_sent=sent.not_sent,
        stopped=sent.stopped,
        outcomes=verdict.figures["outcomes"],  # as recorded: the wire alone takes a 429 for ok
        losses=lost,
    )


def _beforehand(plan: Plan) -> list[beforehand.Sent]:
    """Send what is asked for before the run: no row and no telemetry knows of it."""
    sent = []
    if plan.options.warm_up:
        sent.append(beforehand.warm_up(plan.whole, plan.options.warm_up))
    if plan.prefixes is not None:
        sent.append(beforehand.prime(plan.whole, plan.prefixes))
    return sent


@contextmanager
def _sampled(options: ReplayOptions, tape: Path, lock_fd: int) -> Iterator[None]:
    """Sample telemetry while the block runs; TokentapeError where a source says nothing now."""
    if not options.telemetry:
        yield
        return
    with Sampler(tape, lock_fd, options.telemetry) as sampler:
        began = sampler.began()
        for source, why in began["failed"].items():
            option = "--gpu" if source == "nvml" else "--metrics-url"
            raise TokentapeError(f"{option}: {source} {why}; nothing was sent")
        keep_facts(tape, began)
        yield


def _alone(
    plan: Plan,
    tape: Path,
    lock_fd: int,
    start: StartAt,
    progress: Callable[[Progress], None] | None,
) -> Sent:
    """Send it all from this process."""
    about = {"worker": plan.worker_names[0], "content": "structure", "key": "", "fsync": False}
    recorder = Recorder(tape, os.dup(lock_fd), about)
    try:
        plan.settle()
        work = send_share(
            plan.whole,
            recorder,
            _stopped_by_signals,
            worker=plan.worker_names[0],
            start=start,
            prepare=plan.outgoing,
            progress=progress,
        )
        sent = run_loop(work)
    except BaseException:
        recorder.finish({"run": {"failed": True}})
        raise
    recorder.finish({"run": _run_facts(sent, start)})
    return sent


def _by_crew(
    plan: Plan,
    tape: Path,
    lock_fd: int,
    start: StartAt,
    progress: Callable[[Progress], None] | None,
) -> Sent:
    """Send it from several processes, each with its own segments of the tape."""
    names, shard = plan.worker_names, plan.worker_of_each
    members = [Member(n, np.flatnonzero(shard == k).astype(np.int32)) for k, n in enumerate(names)]
    crew = Crew(plan.whole, [m for m in members if len(m.numbers)], tape, lock_fd)
    del shard, members
    return_memory()
    run_facts: dict[str, Any] = {"failed": True}
    try:
        asyncio.run(crew.run(_stopped_by_signals, start, progress))
        if any(m.sent is None for m in crew.members):
            seal_dead(tape, SEAL_TIMEOUT_S)
        sealed = open_tape(tape)
        rows, lost = _by_worker(sealed)
        sent = tally([m.end for m in crew.members], start.t0_ns, rows, lost)
        run_facts = _run_facts(sent, start)
    finally:
        with tape_facts.changing(tape) as facts:
            facts["run"] = run_facts
    return sent


def _by_worker(tape: Tape) -> tuple[dict[str, int], dict[str, int]]:
    """(rows, losses) of each worker of a sealed tape."""
    rows: dict[str, int] = {}
    for segment in tape.segments:
        name = segment.metadata["worker"]
        rows[name] = rows.get(name, 0) + segment.rows
    lost: dict[str, int] = {}
    for incarnation, losses in tape.facts["losses"].items():
        name = incarnation.partition("-")[0]
        lost[name] = lost.get(name, 0) + sum(losses.values())
    return rows, lost


def _about(plan: Plan) -> dict[str, Any]:
    """What a run's tape is made with."""
    options = plan.options.as_dict()
    return {
        "role": "replay",
        "command": options["command"],
        "options": options,
        "facts": _facts(plan),
        "content": "structure",
        "force": plan.options.force,
    }


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


def _run_facts(sent: Sent, start: StartAt) -> dict[str, Any]:
    several = {"workers": sent.workers} if sent.workers else {}
    return {
        "sent": sent.sent,
        "not_sent": sent.not_sent,
        "stopped": sent.stopped,
        "complete": not (sent.dead or sent.not_sent),
        "start": start.facts(),
        "connections_warmed": sent.warmed,
        "clock_steps": sent.clock_steps,
        "cores": cores(),
        "health": sent.health.as_dict(),
        **several,
    }
