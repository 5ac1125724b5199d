"""Verbs that replay one tape at many speeds: capacity searches, sweep gives a frontier."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokentape.cli import asking, size, units
from tokentape.cli.drive import INTERRUPTED, ask_about, standing
from tokentape.cli.objectives import Slos, slos
from tokentape.cli.output import print_json, print_lines
from tokentape.cli.progress import in_lines, say
from tokentape.cli.record import Facts, Json, LocalGpu, MetricsUrls
from tokentape.traces.errors import TokentapeError, UsageError

if TYPE_CHECKING:
    from tokentape.analysis.slo import Slo
    from tokentape.jobs.probes import Probes
    from tokentape.replay.run import Plan, Progress

Folder = Annotated[Path, typer.Option(metavar="DIR", help="Where the runs' tapes are kept.")]
Duration = Annotated[
    str | None,
    typer.Option(metavar="DURATION", help="Each run lasts so long: a faster one takes more tape."),
]
DrainTimeout = Annotated[
    str, typer.Option(metavar="DURATION", help="Longest wait for an idle candidate before a run.")
]
Force = Annotated[bool, typer.Option("--force", help="Make runs anew that are there already.")]
AcceptInvalid = Annotated[
    bool, typer.Option("--accept-invalid", help="Count runs too whose verdict blames the client.")
]

_PERCENTILE = re.compile(r"@p(\d{1,2}(?:\.\d{1,4})?)$")


def capacity(
    source: asking.TapeToReplay,
    to: Annotated[str, typer.Option("--to", metavar="URL", help="The candidate.")],
    folder: Folder,
    slo: Slos = None,
    speed: Annotated[
        str, typer.Option(metavar="FROM..TO", help="Speeds to search in.")
    ] = "0.1x..100x",
    first: Annotated[str, typer.Option(metavar="FACTOR", help="The speed to begin with.")] = "1x",
    tolerance: Annotated[
        str, typer.Option(metavar="SHARE", help="How near the ends of the bracket shall be.")
    ] = "5%",
    window: asking.Window = None,
    duration: Duration = None,
    seed: asking.Seed = 0,
    prompt: asking.Prompt = "random",
    content_key_file: asking.ContentKeyFile = None,
    tokenizer: asking.Tokenizer = None,
    model: asking.Model = None,
    map_model: asking.MapModel = None,
    body: asking.Body = None,
    endpoint: asking.Endpoint = "recorded",
    turns: asking.WhenTurns = "open",
    think: asking.Think = "scaled",
    aborts: asking.WhichAborts = "recorded",
    warm_up: asking.WarmUp = 0,
    sentinels: asking.Sentinels = False,
    include_failed: asking.IncludeFailed = False,
    clip: asking.Clip = False,
    header: asking.Header = None,
    session_header: asking.SessionHeader = None,
    key_env: asking.KeyEnv = None,
    ca: asking.Ca = None,
    timeout: asking.Timeout = "600s",
    first_byte_timeout: asking.FirstByteTimeout = None,
    precise: asking.Precise = False,
    workers: asking.Workers = 1,
    metrics_url: MetricsUrls = None,
    gpu: LocalGpu = False,
    fact: Facts = None,
    drain_timeout: DrainTimeout = "300s",
    accept_invalid: AcceptInvalid = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Find the highest speed of a tape at which a candidate meets an SLO.

    Each speed is a run that is kept as a tape; a repeated command goes on from those. The limits
    must hold together for 99% of the requests, or as --slo ...@p95 says. Exit 3: no speed meets the
    SLO; 4: this machine cannot offer more.
    """
    from tokentape.jobs.capacity import Capacity, needed
    from tokentape.jobs.capacity import capacity as run
    from tokentape.jobs.probes import StoppedEarlyError

    objectives, attain = _objectives(slo)
    if not objectives:
        raise UsageError("capacity: give an --slo, such as --slo ttft=500ms,tpot=50ms@p99")
    least, most = _span(speed)
    probes = _probes(locals(), lambda plan: say(f"how long is enough: {needed(plan, attain)}"))
    found = Capacity(attain)
    ends: dict[str, Any] = {"first": units.factor("--first", first), "least": least, "most": most}
    ends["tolerance"] = float(units.percent("--tolerance", tolerance))
    try:
        run(probes, objectives, found, **ends)
    except StoppedEarlyError as stopped:
        say(f"stopped during {stopped}; repeat the command to go on. {found.bracket.text()}")
        raise typer.Exit(INTERRUPTED) from None
    except TokentapeError:
        if found.done:
            _print(found, json=json)
        raise
    _print(found, json=json)


def _print(found: Any, *, json: bool) -> None:
    if json:
        print_json(found.as_dict())
    else:
        print_lines([found.text()])


def sweep(
    source: asking.TapeToReplay,
    to: Annotated[
        list[str], typer.Option("--to", metavar="URL", help="A candidate; several take turns.")
    ],
    folder: Folder,
    speed: Annotated[
        str, typer.Option(metavar="FACTORS", help="The speeds, with commas between them.")
    ] = "0.5x,1x,2x,4x",
    repeat: Annotated[int, typer.Option(metavar="N", min=1, help="Runs of each speed.")] = 1,
    slo: Slos = None,
    gpus: size.Gpus = None,
    usd_per_gpu_hour: size.Price = None,
    window: asking.Window = None,
    duration: Duration = None,
    seed: asking.Seed = 0,
    prompt: asking.Prompt = "random",
    content_key_file: asking.ContentKeyFile = None,
    tokenizer: asking.Tokenizer = None,
    model: asking.Model = None,
    map_model: asking.MapModel = None,
    body: asking.Body = None,
    endpoint: asking.Endpoint = "recorded",
    turns: asking.WhenTurns = "open",
    think: asking.Think = "scaled",
    aborts: asking.WhichAborts = "recorded",
    warm_up: asking.WarmUp = 0,
    sentinels: asking.Sentinels = False,
    include_failed: asking.IncludeFailed = False,
    clip: asking.Clip = False,
    header: asking.Header = None,
    session_header: asking.SessionHeader = None,
    key_env: asking.KeyEnv = None,
    ca: asking.Ca = None,
    timeout: asking.Timeout = "600s",
    first_byte_timeout: asking.FirstByteTimeout = None,
    precise: asking.Precise = False,
    workers: asking.Workers = 1,
    metrics_url: MetricsUrls = None,
    gpu: LocalGpu = False,
    fact: Facts = None,
    drain_timeout: DrainTimeout = "300s",
    accept_invalid: AcceptInvalid = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Replay a tape at several speeds, then print the frontier of the runs.

    Each run is kept as a tape; a repeated command makes only those that are missing. Several
    candidates take turns (A, B, A, B, ...) at each speed. Exit 4: this machine could not offer all.
    """
    from tokentape.jobs.capacity import needed
    from tokentape.jobs.probes import Done, StoppedEarlyError
    from tokentape.jobs.sweep import order
    from tokentape.jobs.sweep import sweep as run

    _, attain = _objectives(slo)
    speeds = sorted({units.factor("--speed", text) for text in speed.split(",")})
    probes = _probes(locals(), lambda plan: say(f"how long is enough: {needed(plan, attain)}"))
    runs = order(to, speeds, repeat)
    done: list[Done] = []
    try:
        refused = run(probes, runs, done)
    except StoppedEarlyError as stopped:
        say(f"stopped during {stopped}: {len(done)} of {len(runs)} runs; repeat it to go on")
        raise typer.Exit(INTERRUPTED) from None
    if done:
        size.frontier(
            [one.tape for one in done],
            gpus=gpus,
            usd_per_gpu_hour=usd_per_gpu_hour,
            slo=_without_percentile(slo),
            attain=f"{100 * attain:.10g}%",
            json=json,
        )
    if refused:
        raise refused[0]


def _objectives(texts: list[str] | None) -> "tuple[list[Slo], float]":
    """The limits, and the share of the requests that shall meet them: `@p95` is 0.95."""
    told = {match[1] for text in texts or [] if (match := _PERCENTILE.search(text))}
    if len(told) > 1:
        raise UsageError(f"--slo: one percentile for all, not {', '.join(sorted(told))}")
    share = float(min(told, default="99")) / 100
    if not 0 < share < 1:
        raise UsageError("--slo ...@p0: need a percentile between p0 and p100, such as @p99")
    return slos(_without_percentile(texts)), share


def _without_percentile(texts: list[str] | None) -> list[str] | None:
    return [_PERCENTILE.sub("", text) for text in texts] if texts else None


def _span(text: str) -> tuple[Fraction, Fraction]:
    first, dots, last = text.partition("..")
    if not dots:
        raise UsageError(f"--speed {text}: need FROM..TO, such as 0.5x..8x")
    least, most = units.factor("--speed", first), units.factor("--speed", last)
    if least > most:
        raise UsageError(f"--speed {text}: FROM is above TO")
    return least, most


def _probes(given: dict[str, Any], before: "Callable[[Plan], None]") -> "Probes":
    """What makes the runs, of the options that both verbs have."""
    from tokentape.jobs.probes import Probes
    from tokentape.replay.run import ReplayOptions

    to = given["to"]
    options = ReplayOptions(**asking.asked(given), to=to if isinstance(to, str) else to[0])
    shown = set[str]()

    def seen(plan: "Plan") -> None:
        base = plan.target.address.base
        if not shown:
            say(plan.text())
            before(plan)
        if base not in shown:
            ask_about(plan)
        shown.add(base)

    lasting = given["duration"]
    return Probes(
        folder=given["folder"],
        options=options,
        tell=say,
        watch=_watched,
        seen=seen,
        duration_ns=units.duration_ns("--duration", lasting) if lasting else None,
        accept_invalid=given["accept_invalid"],
        drain_timeout_s=units.duration_ns("--drain-timeout", given["drain_timeout"]) / 1e9,
    )


@contextmanager
def _watched(total: int) -> "Iterator[Callable[[Progress], None]]":
    tell = in_lines("requests", total)
    yield lambda now: tell(now.done, standing(now))
