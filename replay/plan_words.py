"""A plan in words: what will be sent, what not, and what a reader of the results has to know."""

import math
from fractions import Fraction
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import numpy as np

from tokentape.replay.health import cores
from tokentape.replay.schedule import NS_PER_S
from tokentape.replay.targets import Form, is_private

if TYPE_CHECKING:
    from tokentape.replay.plan import Plan

# Half of what one core was measured to carry without misreporting (docs/accuracy.md).
REQUESTS_PER_WORKER, EVENTS_PER_WORKER = 1_000, 25_000
MULTIPLY_STEP = 0.02  # of the load: what is restored nearer than this is not talked about
COARSE_ARRIVALS_NS = 100_000_000  # arrivals stamped no finer than this come in bursts of their own


def text(plan: "Plan") -> str:
    """The plan for people, printed before anything is sent."""
    f = plan.figures
    recorded, span = _duration(f["recorded_span_ns"]), _duration(f["span_ns"])
    *most, last = (f"{n} {name}" for name, n in f["requests_of_api"].items())
    kinds = " and ".join([", ".join(most), last] if most else [last])
    rate = (
        f"  rate: mean {f['mean_per_s']:.2f}/s, peak {f['peak_per_s']} in one second, "
        f"about {f['estimated_peak_in_flight']} in flight at most"
    )
    shard = f"shard {plan.options.shard}: " if plan.options.shard else ""
    of = f"the plan's {plan.of_requests}" if shard else f["requests_on_tape"]
    lines = [
        f"plan: {shard}{f['requests']} of {of} requests"
        f" ({kinds})" + (f", {f['sessions']} sessions" if f["sessions"] else ""),
        _candidates(plan),
        f"  span: {span} (recorded {recorded}, speed {factor(plan.options.speed)})",
        rate,
        *_worker_lines(plan),
        *plan.turns.lines(len(plan), factor(plan.options.speed)),
        *plan.source.aborts.lines(plan.schedule.source_index),
        f"  tokens: {f['input_tokens']:,} in, {f['output_tokens']:,} out",
        f"  this machine: {plan.fit.text()}",
    ]
    if f["prefix_blocks"]:
        share = 100 * f["prefix_blocks_repeated"] / f["prefix_blocks"]
        of = f["prefix_blocks_of_requests"]
        lines.append(
            f"  prefixes: {share:.1f} % of {f['prefix_blocks']:,} blocks repeat earlier ones"
            + (f", in the first {of:,} requests" if of < len(plan) else "")
        )
    else:
        lines.append("  prefixes: the tape knows none, so no two prompts share one")
    lines.append(f"  cache: {_cache(plan)}")
    if plan.options.warm_up:
        lines.append(f"  before the run: {plan.options.warm_up} requests to warm up")
    if plan.prefixes is not None:
        lines.append(f"  before the run: {len(plan.prefixes)} prefixes to prime the cache")
    for name, form in plan.target.forms.items():
        lines.append(f"  prompts on {name}: {prompts(plan, form)}")
        length = "what each body asks for" if plan.verbatim else str(form.pinning)
        lines.append(f"  output length on {name}: {length}")
    lines += ["  what each step makes of the load:", *plan.shapes.lines()] if plan.shapes else []
    lines += [f"  model {a} is asked as {b}" for a, b in plan.options.models.items()]
    lines += [f"  left out: {n} {reason}" for reason, n in f["left_out"].items()]
    lines += [f"  note: {warning}" for warning in warnings(plan)]
    return "\n".join(lines)


def prompts(plan: "Plan", form: Form) -> str:
    """What prompts are made of, and how their length is reached."""
    return "recorded bodies, all but the model as it came" if plan.verbatim else form.rung


def _cache(plan: "Plan") -> str:
    """Which other runs have the same prompts."""
    if plan.verbatim:
        return "every run of recorded bodies has these prompts: an earlier one may have left them"
    if plan.options.namespace:
        return f"prompts of namespace {plan.options.namespace}; other runs have others"
    return "the prompts of every --warm-cache run of this tape and seed"


def _candidates(plan: "Plan") -> str:
    bases = [address.base for address in plan.target.addresses]
    if plan.places is None:
        return f"  candidate: {bases[0]}, model {plan.target.model}"
    counts = np.bincount(plan.places, minlength=len(bases)).tolist()
    told = ", ".join(f"{base} ({n} requests)" for base, n in zip(bases, counts, strict=True))
    return f"  candidates: sessions take turns between {told}; model {plan.target.model}"


def warnings(plan: "Plan") -> list[str]:
    """What a reader of the results has to know."""
    figures, found = plan.figures, list(plan.target.notes)
    for address in plan.target.addresses:
        if not is_private(address.base):
            host = urlsplit(address.base).hostname
            found.append(f"{host} is not a private address: this load goes out into the world")
    found += _too_much(plan)
    found += [f"impossible here: {reason}" for reason in plan.fit.impossible()]
    step = plan.source_facts.get("arrival_resolution_ns")
    if step and step >= COARSE_ARRIVALS_NS and not plan.options.operators.spread:
        found.append(
            f"the tape's arrivals are {step / NS_PER_S:.1f} s apart or together: its "
            "bursts are those of its clock, not of its users (--spread)"
        )
    found += _sample_notes(plan)
    found += _operator_notes(plan)
    found += plan.turns.notes()
    found += _length_notes(plan)
    if figures["without_output"]:
        found.append(f"{figures['without_output']} requests had no output: one token is asked")
    if figures["several_choices"]:
        found.append(
            f"{figures['several_choices']} requests had several choices: replayed as one "
            "choice with all their tokens"
        )
    if plan.source.approximate_blocks:
        found.append(
            "prefix blocks are counted in bytes: shared prefixes are about right "
            f"({plan.source.rows.bytes_per_token:.2f} bytes per token)"
        )
    for counted in (plan.source.guessed, plan.source.unlike):
        found += [f"{n} {what}" for what, n in counted.items()]
    return found


def _sample_notes(plan: "Plan") -> list[str]:
    """The load that a sampled capture did not keep, and what puts it back."""
    of = plan.source.sampled_of
    if of <= 1:
        return []
    asked = plan.options.operators.multiply
    missing = of / float(asked or 1)
    rate = plan.figures["mean_per_s"]
    if missing <= 1 + MULTIPLY_STEP / 2:
        return [f"the capture kept one session of {of:.4g}; --multiply puts their load back"]
    said = f"the capture kept one session of {of:.4g}: "
    said += f"this plan's {rate:.4g}/s stand for about {rate * missing:.4g}/s of the traffic"
    return [f"{said}; --multiply {round(of, 2):g}x offers as much, sharing no more prefixes"]


def _too_much(plan: "Plan") -> list[str]:
    """What is more than the workers should carry, or the workers more than the machine."""
    figures, count, found = plan.figures, plan.options.workers, list[str]()
    seconds = max(1.0, plan.schedule.span_ns / NS_PER_S)
    events_per_s = figures["output_tokens"] / seconds
    needed = max(
        -(-figures["peak_per_s"] // REQUESTS_PER_WORKER),
        math.ceil(events_per_s / EVENTS_PER_WORKER),
    )
    if needed > count:
        found.append(
            f"up to {figures['peak_per_s']:,} requests/s and a mean of {events_per_s:,.0f} "
            f"tokens/s are more than {count} worker{'s' * (count > 1)} should carry "
            f"({REQUESTS_PER_WORKER:,} and {EVENTS_PER_WORKER:,} each): --workers {needed}"
        )
    if count > cores():
        found.append(f"{count} workers share {cores()} cores: each should have one")
    return found


def _length_notes(plan: "Plan") -> list[str]:
    """Prompts that the candidate cannot be asked as they were."""
    figures, found = plan.figures, list[str]()
    if figures["too_short_for_template"]:
        found.append(
            f"{figures['too_short_for_template']} prompts are shorter than the shortest that "
            "can be sent (template and one token): sent as that, counted as exceptions"
        )
    if plan.clipped:
        found.append(
            f"{plan.clipped} requests are cut to the {plan.target.max_model_tokens:,} tokens "
            "that the candidate takes"
        )
    elif figures["too_long_for_candidate"]:
        found.append(f"{refused(plan)}: it will refuse them")
    return found


def _operator_notes(plan: "Plan") -> list[str]:
    """What an operator had to do without."""
    asked, found = plan.options.operators, list[str]()
    if asked.thin is not None and not plan.figures["sessions"]:
        found.append(
            "the tape knows no sessions: each request was kept or left by itself, so what "
            "conversations shared is cut apart"
        )
    if asked.routing in ("least-loaded", "prefix"):
        found.append(
            "the fleet's router is simulated: each request lasts as recorded or, where the "
            "tape does not say, 0.5 s and 20 ms for each output token"
        )
    return found


def _worker_lines(plan: "Plan") -> list[str]:
    count = plan.options.workers
    if count == 1:
        return []
    sizes = np.bincount(plan.worker_of_each, minlength=count).tolist()
    return [f"  workers: {count}, of {', '.join(f'{n:,}' for n in sizes)} requests"]


def refused(plan: "Plan") -> str:
    """How many requests the candidate cannot take, for a sentence that goes on."""
    return (
        f"{plan.figures['too_long_for_candidate']} requests are longer than the "
        f"{plan.target.max_model_tokens:,} tokens that the candidate takes"
    )


def _duration(ns: int) -> str:
    seconds = ns / NS_PER_S
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def factor(speed: Fraction) -> str:
    """A speed as it is written on the command line."""
    return f"{float(speed):g}x"
