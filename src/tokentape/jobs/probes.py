"""Runs of one tape at several speeds, each kept as a tape in one folder, so that a search resumes.

A run is done once: a later command finds it, if it is whole and of the same options. Between runs
the candidate is given time to become idle. It judges nothing but whether a run can count at all.
"""

import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from tokentape.replay.idle import Idle, answers
from tokentape.replay.run import Plan, Progress, ReplayOptions, RunSummary, make_plan, run_plan
from tokentape.replay.targets import Address
from tokentape.traces import facts as tape_facts
from tokentape.traces.errors import CannotKeepUp, TapeError, TokentapeError

Watch = Callable[[int], AbstractContextManager[Callable[[Progress], None]]]

OTHERWISE = ("namespace", "command")  # options in which two runs of one search may differ


class StoppedEarlyError(Exception):
    """Ctrl-C: the run in hand was cut, those before it are whole."""


@dataclass(frozen=True)
class Done:
    """One run: its tape, what it offered, and whether it was there already."""

    name: str
    tape: Path
    speed: Fraction
    requests: int
    per_s: float
    span_s: float
    verdict: str
    kept: bool = False


@dataclass
class Probes:
    """Makes runs in a folder, of options that differ in speed, candidate and length only.

    duration_ns: how long each run lasts, so it takes so much x speed of the tape; None: all of the
    window, whatever the speed. seen: is given each plan before anything of it is sent.
    accept_invalid: runs count whose verdict blames the client; else one is made once more.
    """

    folder: Path
    options: ReplayOptions
    tell: Callable[[str], None]
    watch: Watch
    seen: Callable[[Plan], None]
    duration_ns: int | None = None
    drain_timeout_s: float = 300.0
    accept_invalid: bool = False

    def __post_init__(self) -> None:
        self._idle: dict[str, Idle] = {}

    def run(self, name: str, speed: Fraction, to: str | None = None) -> Done:
        """The run of that name: made now, or found.

        CannotKeepUp where this machine cannot offer or did not offer the load, StoppedEarlyError
        after Ctrl-C, TokentapeError where the candidate died or does not become idle.
        """
        options = replace(self.options, to=to or self.options.to, speed=speed, namespace=None)
        if self.duration_ns is not None:
            first = options.window[0] or 0
            last = first + int(self.duration_ns * speed)
            ends = [end for end in (options.window[1], last) if end is not None]
            options = replace(options, window=(first, min(ends)))
        tape, facts = self._place(name, options)
        if facts is not None:
            self.tell(f"{tape.name}: is there already")
        else:
            facts = self._make(replace(options, tape=tape))
            if (why := self._fault(facts)) is not None:
                self.tell(f"{tape.name}: once more, {why}")
                tape, _ = self._place(name, options)
                facts = self._make(replace(options, tape=tape))
            if (why := self._fault(facts)) is not None:
                raise CannotKeepUp(f"{name}: two runs say nothing of the candidate, {why}")
        plan, level = facts["plan"], facts["verdict"]["level"]
        kept = facts.get("kept", False)
        load = (plan["requests"], plan["mean_per_s"], plan["span_ns"] / 1e9)
        return Done(name, tape, speed, *load, level, kept)

    def _place(self, name: str, options: ReplayOptions) -> tuple[Path, dict[str, Any] | None]:
        """Where a run goes; its facts if it is there, whole, and of these options."""
        attempt = 1
        while True:
            tape = self.folder / f"{name}{f'-try{attempt}' if attempt > 1 else ''}.tape"
            if not tape.exists() or options.force:
                return tape, None
            facts = tape_facts.read_facts(tape)
            if _whole(facts) and self._fault(facts) is None:
                _refuse_other(tape, facts, options)
                return tape, facts | {"kept": True}
            attempt += 1

    def _make(self, options: ReplayOptions) -> dict[str, Any]:
        assert options.tape is not None
        plan = make_plan(options)
        self.seen(plan)
        impossible = plan.fit.impossible()
        if impossible and not options.force:
            raise CannotKeepUp(
                f"{float(options.speed):g}x: this machine cannot offer it: {'; '.join(impossible)}"
            )
        plan.check()
        idle = self._idle.setdefault(options.to, Idle(plan.target, self.drain_timeout_s))
        try:
            asyncio.run(idle.wait())
        except KeyboardInterrupt:
            raise StoppedEarlyError(f"the wait before {options.tape.name}") from None
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tell(
            f"{options.tape.name}: {len(plan)} requests in {plan.schedule.span_ns / 1e9:.0f} s"
        )
        try:
            with self.watch(len(plan)) as watching:
                done = run_plan(plan, watching)
        except TokentapeError:
            self._refuse_dead(plan, options.tape, "before it took a request")
            raise
        if done.stopped:
            raise StoppedEarlyError(options.tape.name)
        self._refuse_dead(plan, options.tape, _unanswered(done))
        return tape_facts.read_facts(options.tape)

    def _fault(self, facts: dict[str, Any]) -> str | None:
        """Why the client or its machine, not the candidate, decided what was measured; or None."""
        verdict = facts["verdict"]
        if self.accept_invalid or verdict.get("client", verdict["level"]) != "invalid":
            return None
        return next((r for r in verdict["reasons"] if r.startswith("invalid")), "invalid")

    def _refuse_dead(self, plan: Plan, tape: Path, how: str) -> None:
        """TokentapeError where the candidate is gone; the run does not count then."""
        if not how or asyncio.run(answers(plan.target)):
            return
        with tape_facts.changing(tape) as facts:
            facts["run"] = (facts.get("run") or {}) | {"complete": False, "candidate_died": True}
        raise TokentapeError(
            f"{plan.target.address.base}: the candidate died during {tape.name} ({how}); start it "
            "and repeat the command: runs that are whole are not repeated"
        )


def _unanswered(done: RunSummary) -> str:
    """The outcomes that a dead candidate may explain."""
    lost = ("connect_error", "upstream_abort", "timeout")
    return ", ".join(f"{done.outcomes[name]} {name}" for name in lost if done.outcomes.get(name))


def _whole(facts: dict[str, Any]) -> bool:
    """Whether a run ended by itself, with the candidate alive."""
    run = facts.get("run") or {}
    return bool(run.get("complete")) and not run.get("stopped") and "verdict" in facts


def _refuse_other(tape: Path, facts: dict[str, Any], options: ReplayOptions) -> None:
    """TapeError for a run that was made otherwise: it must not be taken for this one."""
    asked = json.loads(json.dumps(options.as_dict()))
    had = facts.get("options") or {}
    other = [n for n in had if n not in OTHERWISE and asked.get(n) != had[n]]
    if facts["candidate"]["url"] != Address.parse(options.to, options.ca).base:
        other.append("candidate")
    source = tape_facts.read_facts(options.source)["tape_id"]
    if facts["source"]["tape_id"] != source:
        other.append("tape")
    if other:
        raise TapeError(
            f"{tape}: was made with another {', '.join(other)}; choose another --folder, or --force"
        )
