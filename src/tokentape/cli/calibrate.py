"""The verb calibrate: a replay's own error on this machine, by a server that does nothing."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tokentape.cli import units
from tokentape.cli.output import print_json, print_lines
from tokentape.cli.progress import say
from tokentape.cli.record import Json
from tokentape.traces.errors import UsageError


def calibrate(
    source: Annotated[
        Path | None,
        typer.Argument(metavar="[TAPE]", help="Take the shape of its busiest seconds."),
    ] = None,
    speed: Annotated[
        str, typer.Option(metavar="FACTOR", help="As the replay will have it.")
    ] = "1x",
    rate: Annotated[
        str, typer.Option(metavar="RATE", help="Requests, where no tape is given.")
    ] = "100/s",
    tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens of each, where no tape is given.")
    ] = 100,
    duration: Annotated[
        str, typer.Option(metavar="DURATION", help="Of the load; its last streams last as long.")
    ] = "10s",
    json: Json = False,
) -> None:
    """Measure the client itself: a plan's shape against a server that does nothing.

    That server stamps each event as it sends it, so the error is a subtraction. It runs on this
    machine and shares its cores; the network to a candidate is not in it.
    """
    from tokentape.replay.calibrate import calibrate as measure
    from tokentape.replay.calibrate import plain_plan
    from tokentape.replay.options import ReplayOptions
    from tokentape.replay.plan import make_plan

    span_ns = units.duration_ns("--duration", duration)
    if span_ns <= 0:
        raise UsageError(f"--duration {duration}: need a duration above zero, such as 10s")
    say(f"about {2 * span_ns / 1e9:.0f} s against the built-in null server")
    if source is None:
        with tempfile.TemporaryDirectory(prefix="tokentape-calibrate-") as folder:
            per_s = float(units.rate_per_s("--rate", rate))
            floor = measure(plain_plan(Path(folder), per_s, tokens, span_ns), span_ns)
    else:
        nowhere = "http://127.0.0.1:1"  # only the null server is asked
        factor = units.factor("--speed", speed)
        options = ReplayOptions(source=source, to=nowhere, speed=factor, model="null")
        floor = measure(make_plan(options, offline=True), span_ns)
    if json:
        print_json(floor.as_dict())
    else:
        print_lines([floor.text()])
