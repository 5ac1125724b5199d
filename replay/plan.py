"""The plan of a replay: everything that will be sent, and everything that will not, said before.

Reads the source tape, asks the candidate what it takes, and adds it up. It sends nothing of the
plan itself. The figures follow from the tape and the options; only how a prompt is written depends
on the candidate.
"""

import asyncio
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from tokentape.replay import plan_words
from tokentape.replay.ahead import Outgoing
from tokentape.replay.apis import ENDPOINTS, Endpoint, endpoint
from tokentape.replay.beforehand import Prefixes
from tokentape.replay.bodies import read_bodies
from tokentape.replay.capacity import STREAM_GAP_S, TOKEN_BYTES, Demand, Fit, Machine
from tokentape.replay.options import ReplayOptions
from tokentape.replay.probe import find_target
from tokentape.replay.reuse import names_of, repeated_blocks
from tokentape.replay.schedule import NS_PER_S, Offered, Schedule, ScheduleOptions, make_schedule
from tokentape.replay.sessions import Numbers, of_copies, shard_of
from tokentape.replay.shape import Shapes
from tokentape.replay.share import Share
from tokentape.replay.source import Source, read_source
from tokentape.replay.targets import (
    Address,
    Headers,
    Target,
    unprobed,
)
from tokentape.replay.tokenizer_file import TokenizerFile
from tokentape.replay.turns import TurnPlan, check_ring, make_waits
from tokentape.traces.errors import UsageError
from tokentape.traces.privacy import load_content_key
from tokentape.traces.reader import Tape, open_tape

NO_BODY = "has no whole recorded body"


@dataclass
class Plan:
    """What will be sent; `outgoing(i)` builds the i-th request."""

    options: ReplayOptions
    source: Source
    schedule: Schedule
    target: Target
    source_facts: dict[str, Any]
    probed: bool
    turns: TurnPlan
    of_requests: int = 0  # of all shards
    shapes: Shapes | None = None  # of the load before and after each operator
    prefixes: Prefixes | None = None  # of prompts, that came before the window
    places: Numbers | None = None  # of several candidates: which one each request goes to
    clipped: int = 0  # requests that were longer than the candidate takes

    def __len__(self) -> int:
        return len(self.schedule.due_ns)

    @cached_property
    def whole(self) -> Share:
        """All of it, as one worker's share."""
        source, schedule = self.source, self.schedule
        return Share(
            due_ns=schedule.due_ns,
            waits=self.turns.waits,
            aborts=source.aborts,
            positions=schedule.source_index,
            copies=schedule.copy_index,
            input_tokens=source.input_tokens,
            output_tokens=source.output_tokens,
            apis=source.apis,
            stream=source.stream,
            places=self.places,
            by_row=True,
            rows=source.rows,
            tape_id=source.tape_id,
            seed=self.options.seed,
            namespace=self.options.namespace or "",
            session_header=self.options.session_header,
            wanted_endpoint=self.options.endpoint,
            target=self.target,
            peak_in_flight=schedule.peak_in_flight,
            timeout_ns=self.options.timeout_ns,
            first_byte_timeout_ns=self.options.first_byte_timeout_ns,
            precise=self.options.precise,
            verbatim=self.verbatim,
        )

    @property
    def verbatim(self) -> bool:
        """Whether recorded bodies are sent again."""
        return self.source.rows.bodies is not None

    def outgoing(self, number: int) -> Outgoing:
        """The i-th request of the schedule, body and all."""
        return self.whole.outgoing(number)

    @cached_property
    def worker_names(self) -> list[str]:
        """The names of the workers; those of a shard differ from those of others."""
        shard = f"s{self.options.shard.index}" if self.options.shard else ""
        return [f"{shard}w{n}" for n in range(self.options.workers)]

    @property
    def worker_of_each(self) -> Numbers:
        """The worker that sends each request of the schedule."""
        return shard_of(self.source.groups(self.schedule), self.options.workers)

    @property
    def sessions(self) -> Numbers:
        """The session of each request of the schedule, -1 where it has none."""
        schedule = self.schedule
        return of_copies(self.source.sessions[schedule.source_index], schedule.copy_index)

    def settle(self) -> None:
        """Work the figures out, and let go of what a single worker does not need: 50 MB of 500."""
        assert self.figures
        nothing = self.source.sessions[:0]
        empty = self.source.several_choices[:0]
        self.source = replace(
            self.source,
            sessions=nothing.copy(),
            kept_together=nothing.copy(),
            several_choices=empty.copy(),
        )

    # -- figures --------------------------------------------------------------------------------

    @property
    def shortest_input_tokens(self) -> int:
        """Requests planned shorter than this are exceptions: the template alone is longer."""
        return max((f.length.shortest_tokens for f in self.target.forms.values()), default=0)

    @cached_property
    def figures(self) -> dict[str, Any]:
        """All numbers of the plan."""
        schedule, source = self.schedule, self.source
        index = schedule.source_index
        inputs, outputs = source.input_tokens[index], source.output_tokens[index]
        sessions = self.sessions
        repeated, blocks, counted = repeated_blocks(source, index, schedule.copy_index)
        return {
            "requests": len(self),
            "requests_on_tape": len(source),
            "requests_of_api": self._requests_of_api(),
            "sessions": int(np.count_nonzero(np.bincount(sessions[sessions >= 0]))),
            "recorded_span_ns": schedule.recorded_span_ns,
            "span_ns": schedule.span_ns,
            "mean_per_s": round(schedule.mean_per_s, 4),
            "peak_per_s": schedule.peak_per_s,
            "estimated_peak_in_flight": schedule.peak_in_flight,
            "input_tokens": int(inputs.sum()),
            "output_tokens": int(np.maximum(outputs, 1).sum()),
            "prefix_blocks": blocks,
            "prefix_blocks_repeated": repeated,
            "prefix_blocks_of_requests": counted,
            "left_out": {reason: len(rows) for reason, rows in schedule.left_out.items()},
            "too_short_for_template": self._too_short(inputs, index),
            "too_long_for_candidate": self._too_long(inputs, outputs),
            "prefixes_before": len(self.prefixes) if self.prefixes is not None else None,
            "without_output": int((outputs < 1).sum()),
            "several_choices": int(source.several_choices[index].sum()),
            "sampled_of": source.sampled_of,
        }

    def clip(self) -> None:
        """Cut what is longer than the candidate takes, where it says how much that is."""
        most = self.target.max_model_tokens
        if most is None:
            return
        long = self.source.input_tokens + np.maximum(self.source.output_tokens, 1) > most
        self.clipped = int(np.count_nonzero(long[self.schedule.source_index]))
        self.source = self.source.clipped(most)

    def _too_short(self, inputs: Any, index: Any) -> int:
        apis, short = self.source.apis[index], 0
        for kind in np.unique(apis).tolist():
            form = self.target.forms[endpoint(self.options.endpoint, kind)]
            short += int((inputs[apis == kind] < form.length.shortest_tokens).sum())
        return short

    def _requests_of_api(self) -> dict[str, int]:
        counts = np.bincount(self.source.apis[self.schedule.source_index])
        if self.options.endpoint != "recorded":
            return {self.options.endpoint: len(self)}
        return {ENDPOINTS[k]: n for k, n in enumerate(counts.tolist()) if n}

    def _too_long(self, inputs: Any, outputs: Any) -> int:
        most = self.target.max_model_tokens
        return 0 if most is None else int((inputs + np.maximum(outputs, 1) > most).sum())

    @cached_property
    def fit(self) -> Fit:
        """What the plan asks of this machine, beside what it has."""
        figures, span_s = self.figures, self.schedule.span_ns / NS_PER_S
        lasting_s = STREAM_GAP_S * figures["output_tokens"] / len(self)
        seconds = max(1.0, span_s + lasting_s)
        demand = Demand(
            workers=self.options.workers,
            requests_per_s=len(self) / seconds,
            events_per_s=figures["output_tokens"] / seconds,
            peak_requests_per_s=figures["peak_per_s"],
            in_flight=self.schedule.peak_in_flight,
            body_bytes=TOKEN_BYTES * figures["input_tokens"] / len(self),
        )
        return Fit(demand, Machine.here())

    def check(self) -> None:
        """UsageError for a load that cannot be offered or taken, unless it is to be tried."""
        if self.figures["too_long_for_candidate"] and not self.options.force:
            raise UsageError(
                f"{plan_words.refused(self)}: --clip cuts their prompts, --force sends them all "
                "the same"
            )
        reasons = self.fit.impossible()
        if reasons and not self.options.force:
            raise UsageError(
                f"this machine cannot offer this load: {'; '.join(reasons)}. "
                "Use --shard over several machines, a lower --speed or --max-requests; "
                "--force tries it all the same"
            )

    # -- words ----------------------------------------------------------------------------------

    def json(self) -> dict[str, Any]:
        """The plan for machines, and for the run's tape."""
        return {
            **self.figures,
            "speed": str(self.options.speed),
            "loads": [shape.as_dict() for shape in self.shapes.found] if self.shapes else [],
            "workers": self.options.workers,
            "shard": str(self.options.shard) if self.options.shard else None,
            "requests_of_all_shards": self.of_requests,
            **self.turns.as_dict(),
            "planned_aborts": self.source.aborts.count(self.schedule.source_index),
            "seed": self.options.seed,
            "namespace": self.options.namespace,
            "candidate": self.candidate(),
            "capacity": self.fit.as_dict(),
            "warnings": self.warnings(),
        }

    def candidate(self) -> dict[str, Any]:
        """What is known of the candidate, without credentials."""
        forms = self.target.forms.items()
        return {
            **self.target.facts,
            **self.options.facts,  # what was asked of the candidate outranks what was said of it
            "given": self.options.facts,
            "url": self.target.address.base,
            "urls": [address.base for address in self.target.addresses],
            "model": self.target.model,
            "prompts": {name: plan_words.prompts(self, form) for name, form in forms},
            "output_pinning": {name: str(form.pinning) for name, form in forms},
            "asked": self.probed,
        }

    def warnings(self) -> list[str]:
        """What a reader of the results has to know."""
        return plan_words.warnings(self)

    def text(self) -> str:
        """The plan for people, printed before anything is sent."""
        return plan_words.text(self)


def make_plan(options: ReplayOptions, *, offline: bool = False) -> Plan:
    """Plan a replay; asks the candidate what it takes unless `offline`.

    Raises UsageError for an option that cannot be right, TapeError for a source that cannot be
    read, TokentapeError for a candidate that is dead or refuses.
    """
    if options.namespace is None:
        options = replace(options, namespace=options.fresh_namespace())
    where = _where(options)
    options.check()
    tape = open_tape(options.source)
    step_ns = tape.facts.get("arrival_resolution_ns")
    operators = options.operators.operators(options.seed, options.speed, step_ns)
    source, offered = _offered(options, tape, with_kin=bool(operators))
    shapes = Shapes(source, operators) if operators or options.speed != 1 else None
    wanted = ScheduleOptions(
        options.speed, options.window, options.max_requests, options.max_tokens, operators
    )
    try:
        schedule = make_schedule(offered, wanted, shapes)
    except ValueError as error:
        raise UsageError(f"--speed: {error}") from None
    whole = len(schedule.due_ns)
    if shapes is not None and options.speed != 1:
        shapes.sped(plan_words.factor(options.speed), schedule, scaled_think=options.scaled_think)
    if whole and options.shard:
        shard = shard_of(source.groups(schedule), options.shard.count)
        schedule = schedule.part(shard == options.shard.index, offered.duration_ns)
        if not len(schedule.due_ns):
            raise UsageError(f"--shard {options.shard}: has none of the plan's {whole} requests")
    prefixes = Prefixes.of(source, offered, schedule) if options.prime_cache else None
    del offered  # what is long is not kept
    if not len(schedule.due_ns):
        why = ", ".join(f"{len(v)} {name}" for name, v in schedule.left_out.items())
        raise UsageError(f"{options.source}: nothing to replay ({why})")
    check_ring(options.turns, source.links, options.source, source.rows.request_id)
    turns = make_waits(
        source.links, schedule, options.turns, options.speed, scaled_think=options.scaled_think
    )
    recorded = np.unique(source.apis[schedule.source_index]).tolist()
    endpoints = sorted({endpoint(options.endpoint, kind) for kind in recorded})
    asking = _assumed if offline else _asked
    target = asking(options, *where, endpoints)
    made = Plan(options, source, schedule, target, tape.facts, not offline, turns, whole, shapes)
    made.prefixes = prefixes
    if target.others:
        made.places = shard_of(made.sessions, len(target.addresses))
    if options.clip:
        made.clip()
    return made


def _offered(options: ReplayOptions, tape: Tape, *, with_kin: bool) -> tuple[Source, Offered]:
    """What the tape offers; with its recorded bodies, what has none is left out."""
    source, offered = read_source(
        tape,
        include_failed=options.include_failed,
        with_kin=with_kin,
        with_aborts=options.replay_aborts,
        any_api=options.endpoint != "recorded",
    )
    if options.prompt == "recorded":
        key_file = options.content_key_file
        bodies = read_bodies(tape, load_content_key(key_file) if key_file else b"")
        source.rows.bodies = bodies
        without = (bodies.place < 0) & (offered.reason == 0)
        reason = np.where(without, len(offered.reasons), offered.reason).astype(np.int8)
        offered = replace(offered, reason=reason, reasons=(*offered.reasons, NO_BODY))
    if offered.kin is not None:
        names = partial(names_of, source)
        offered = replace(offered, kin=replace(offered.kin, prefixes=names))
    return source, offered


def _where(options: ReplayOptions) -> tuple[tuple[Address, ...], Headers]:
    """The candidates, the one that stands for all first, and what they are sent to let us in."""
    addresses = tuple(Address.parse(to, options.ca) for to in (options.to, *options.also_to))
    distinct = len({address.base for address in addresses}) == len(addresses)
    if not distinct or any(address.userinfo for address in addresses[1:]):
        raise UsageError("--to: several URLs must differ; credentials: --header or --key-env")
    return addresses, Headers.gather(options.headers, options.key_env, addresses[0].userinfo)


def _assumed(
    options: ReplayOptions, addresses: tuple[Address, ...], headers: Headers, apis: list[Endpoint]
) -> Target:
    """Candidates that nobody has asked."""
    model, prose = options.model or "unknown", options.prompt == "text"
    target = unprobed(addresses[0], headers, model, apis, prose=prose)
    return replace(target, others=addresses[1:])


def _asked(
    options: ReplayOptions, addresses: tuple[Address, ...], headers: Headers, apis: list[Endpoint]
) -> Target:
    """Candidates as they say that they are; TokentapeError where one is dead or refuses."""
    asking = find_target(
        addresses[0],
        headers,
        options.model,
        apis,
        models=options.models,
        more=options.body,
        prose=options.prompt == "text",
        tokenizer=TokenizerFile(options.tokenizer) if options.tokenizer else None,
        others=addresses[1:],
    )
    return asyncio.run(asking)
