"""Verbs that make load or take it: replay, engine, demo."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tokentape.cli import asking, units
from tokentape.cli.output import print_json, print_lines
from tokentape.cli.progress import in_lines, say
from tokentape.cli.read import print_report
from tokentape.cli.record import Facts, Json, LocalGpu, MetricsUrls
from tokentape.traces.errors import GateNotMet, UsageError

if TYPE_CHECKING:
    from tokentape.replay.calibrate import Floor
    from tokentape.replay.run import Plan, Progress, RunSummary

LEVELS = ("valid", "suspect", "invalid")
INTERRUPTED = 130
CALIBRATE_FROM_NS = 60_000_000_000  # of a plan: a calibration takes up to 20 s


def replay(
    source: asking.TapeToReplay,
    to: Annotated[
        list[str],
        typer.Option(
            "--to",
            metavar="URL",
            help="The candidate: http(s)://HOST:PORT. Several are one: sessions take turns.",
        ),
    ],
    tape: Annotated[
        Path | None, typer.Option("--tape", metavar="DIR", help="The run's tape to write.")
    ] = None,
    speed: Annotated[
        str, typer.Option(metavar="FACTOR", help="2x offers the load in half the time.")
    ] = "1x",
    window: asking.Window = None,
    thin: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Only 50% of the sessions, each whole.")
    ] = None,
    multiply: Annotated[
        str | None,
        typer.Option(metavar="N", help="3 or 2.5x: copies moved in time, no prefix in common."),
    ] = None,
    loop: Annotated[
        str | None,
        typer.Option(metavar="END", help="Repeat the tape for 30m, or 3x; no prefix in common."),
    ] = None,
    spread: Annotated[
        bool,
        typer.Option("--spread", help="Spread arrivals over the step of the tape's coarse clock."),
    ] = False,
    replica: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="What the I-th of N replicas would get; needs --routing."),
    ] = None,
    routing: Annotated[
        Literal["round-robin", "least-loaded", "prefix"] | None,
        typer.Option(help="How the fleet's router chose a replica."),
    ] = None,
    seed: asking.Seed = 0,
    namespace: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Of the prompts: runs that share it share them; else a new one."
        ),
    ] = None,
    warm_cache: Annotated[
        bool,
        typer.Option(
            "--warm-cache", help="The same prompts in each run: a candidate may have them cached."
        ),
    ] = False,
    prompt: asking.Prompt = "random",
    content_key_file: asking.ContentKeyFile = None,
    tokenizer: asking.Tokenizer = None,
    model: asking.Model = None,
    map_model: asking.MapModel = None,
    body: asking.Body = None,
    endpoint: asking.Endpoint = "recorded",
    header: asking.Header = None,
    session_header: asking.SessionHeader = None,
    key_env: asking.KeyEnv = None,
    ca: asking.Ca = None,
    max_requests: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Send no more requests than that.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The same for input and output tokens.")
    ] = None,
    timeout: asking.Timeout = "600s",
    first_byte_timeout: asking.FirstByteTimeout = None,
    precise: asking.Precise = False,
    clip: asking.Clip = False,
    warm_up: asking.WarmUp = 0,
    prime_cache: Annotated[
        bool,
        typer.Option(
            "--prime-cache", help="Send the prefixes that a --window shares with what came before."
        ),
    ] = False,
    sentinels: asking.Sentinels = False,
    include_failed: asking.IncludeFailed = False,
    turns: asking.WhenTurns = "after",
    think: asking.Think = "scaled",
    aborts: asking.WhichAborts = "recorded",
    workers: asking.Workers = 1,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Send the I-th of N parts only; sessions stay whole."),
    ] = None,
    start_at: Annotated[
        str | None,
        typer.Option(metavar="T", help="When all shards start: RFC 3339 or unix seconds."),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Print the plan and send none of it; the candidate is asked a few short things.",
        ),
    ] = False,
    fail_on: Annotated[
        Literal["suspect", "invalid"] | None,
        typer.Option(help="Exit 3 when the verdict is that or worse."),
    ] = None,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="First measure the client on a null server; by itself from a minute's plan on.",
        ),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Tell the progress in lines, on a terminal too.")
    ] = False,
    metrics_url: MetricsUrls = None,
    gpu: LocalGpu = False,
    fact: Facts = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace a tape that exists; try a load beyond this machine."),
    ] = False,
    json: Json = False,
) -> None:
    """Offer the load of a tape to a candidate; record how it does.

    Requests are sent when they are due; a turn waits for those that it waited for when recorded.
    Prompts are synthesized to the recorded lengths. The plan is printed first; the verdict says if
    the client's own clock held.
    """
    shared = asking.asked(locals())
    from tokentape.replay.asked import Asked
    from tokentape.replay.options import ReplayOptions
    from tokentape.replay.run import make_plan
    from tokentape.replay.sessions import Shard
    from tokentape.replay.start import check_start

    if tape is None and not plan:
        raise UsageError("--tape: name the folder of the run's tape (only --plan needs none)")
    if warm_cache and namespace is not None:
        raise UsageError("--warm-cache is the namespace without a name: give it or --namespace")
    if namespace == "":
        raise UsageError("--namespace: give a name, or --warm-cache")
    loop_ns, loop_passes = units.repeats("--loop", loop) if loop is not None else (None, None)
    options = ReplayOptions(
        **shared,
        to=to[0],
        also_to=tuple(to[1:]),
        tape=tape,
        speed=units.factor("--speed", speed),
        namespace="" if warm_cache else namespace,
        max_requests=max_requests,
        max_tokens=max_tokens,
        prime_cache=prime_cache,
        operators=Asked(
            thin=units.percent("--thin", thin) if thin is not None else None,
            multiply=units.times("--multiply", multiply) if multiply is not None else None,
            loop_ns=loop_ns,
            loop_passes=loop_passes,
            spread=spread,
            replica=units.part("--replica", replica) if replica is not None else None,
            routing=routing,
        ),
        shard=Shard(*units.part("--shard", shard)) if shard is not None else None,
        start_at_unix_ns=units.instant_unix_ns("--start-at", start_at) if start_at else None,
    )
    if shard is not None and start_at is None and not plan:
        raise UsageError(f"--shard {shard}: give --start-at T too, the same for every shard")
    begins = check_start(options.start_at_unix_ns) if options.start_at_unix_ns else None
    made = make_plan(options)
    if begins is not None:
        say(begins)
    if plan:
        if json:
            print_json(made.json())
        else:
            print_lines([made.text()])
        return
    _check(made)
    ask_about(made)
    by_itself = made.schedule.span_ns >= CALIBRATE_FROM_NS and not start_at  # it might be missed
    floor = _floor(made) if calibrate or (calibrate is None and by_itself) else None
    _run(made, fail_on, floor, json=json, plain=plain)


def _check(plan: "Plan") -> None:
    """UsageError for a load that this machine cannot offer; its plan is shown then."""
    if plan.fit.impossible():
        say(plan.text())
    plan.check()


def ask_about(plan: "Plan") -> None:
    """On a terminal, ask before a load goes to an address that is not private; typer.Abort on no.

    Elsewhere nobody could answer: the plan's note says it, and whoever wrote the script meant it.
    """
    from tokentape.replay.targets import is_private

    bases = [a.base for a in plan.target.addresses if not is_private(a.base)]
    if bases and sys.stdin.isatty() and sys.stderr.isatty():
        typer.confirm(
            f"{', '.join(bases)} is not private. Send {len(plan)} requests?", abort=True, err=True
        )


def _floor(plan: "Plan") -> "Floor":
    from tokentape.replay.calibrate import SPAN_NS, calibrate

    say(f"calibration: up to {2 * SPAN_NS / 1e9:.0f} s against the built-in null server")
    return calibrate(plan)


@contextmanager
def _watched(total: int, *, plain: bool) -> Iterator["Callable[[Progress], None]"]:
    """Gives what is told of a run: a panel on a terminal, else lines."""
    if sys.stderr.isatty() and not plain:
        from tokentape.cli.panel import live_panel

        with live_panel() as show:
            yield show
        return
    tell = in_lines("requests", total)
    yield lambda now: tell(now.done, standing(now))


def _run(
    plan: "Plan", fail_on: str | None, floor: "Floor | None", *, json: bool, plain: bool
) -> None:
    from tokentape.replay.calibrate import keep_floor
    from tokentape.replay.run import run_plan

    if json:
        say(plan.text())
    else:
        print_lines([plan.text()])
    with _watched(len(plan), plain=plain) as watch:
        done = run_plan(plan, watch)
    if floor is not None:
        keep_floor(done.tape, floor)
    if json:
        measured = floor.as_dict() if floor else None
        print_json({"plan": plan.json(), **_told(done), "noise_floor": measured})
    else:
        beside = floor.text() if floor else "noise floor: not measured (--calibrate)"
        last = f"run: {done.rows} rows, {done.events} events, {done.tape}"
        print_lines([done.verdict.text(), beside, last])
    level = done.verdict.level
    if fail_on is not None and LEVELS.index(level) >= LEVELS.index(fail_on):
        raise GateNotMet(f"--fail-on {fail_on}: the verdict is {level}")
    if done.stopped:
        raise typer.Exit(INTERRUPTED)


def standing(now: "Progress") -> str:
    """How a run stands, on one line: plan, load, replies so far, own punctuality."""
    words = [f"{now.left_s:.0f} s to send" if now.left_s else "all sent"]
    words.append(f"{now.in_flight} in flight")
    means = ((name, now.mean_s(name)) for name in ("TTFT", "TPOT", "ICL"))
    words += [f"mean {name} {1000 * mean_s:.1f} ms" for name, mean_s in means if mean_s is not None]
    words.append(f"{now.late} late by over 1 ms, worst {now.worst_late_ms:.1f} ms")
    if now.moved:
        words.append(f"{now.moved} moved by a predecessor, by {now.most_moved_s:.1f} s at most")
    return ", ".join(words)


def _told(done: "RunSummary") -> dict[str, object]:
    return {
        "tape": str(done.tape),
        "rows": done.rows,
        "events": done.events,
        "sent": done.sent,
        "not_sent": done.not_sent,
        "stopped": done.stopped,
        "outcomes": done.outcomes,
        "losses": done.losses,
        "verdict": done.verdict.as_dict(),
    }


def engine(
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where it serves; port 0: any free one.")
    ] = "127.0.0.1:8000",
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Its speed in numbers, TOML or JSON; else an H100's."),
    ] = None,
) -> None:
    """Serve a simulated LLM over HTTP, for tests without a GPU.

    OpenAI chat and completions, streamed or whole, with usage, /metrics and /health. Ctrl-C ends.
    """
    from tokentape.replay.engine.profile import load_profile
    from tokentape.replay.engine.server import serve

    units.address("--listen", listen)
    serve(listen, load_profile(profile), lambda url: say(f"listening on {url}; Ctrl-C ends"))


def demo(
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where everything is left; else a new demo-1, demo-2, ..."
        ),
    ] = None,
    sample: Annotated[
        bool,
        typer.Option("--sample", help="Run nothing: report on tapes of a real vLLM."),
    ] = False,
    json: Json = False,
) -> None:
    """Record, replay at twice the speed, compare: all simulated.

    Takes less than a minute, needs no GPU and no network. Each step prints its command.
    """
    from tokentape.jobs.demo import demo as run
    from tokentape.jobs.demo import sample_tapes

    if sample:
        tapes = sample_tapes()
        print_report(tapes, json=json)
        say(f"the tapes: {tapes[0]} {tapes[1]}")
        return
    done = run(folder or _new_folder(), say)
    print_report([done.capture, done.run], json=json)
    say(f"everything is in {done.folder}")


def _new_folder() -> Path:
    number = 1
    while Path(f"demo-{number}").exists():
        number += 1
    return Path(f"demo-{number}")
