"""Verbs about hardware: frontier places runs, fleet says how many GPUs some traffic needs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokentape.cli import units
from tokentape.cli.objectives import Slos, slos
from tokentape.cli.output import print_json, print_lines
from tokentape.cli.read import REPORT_COLUMNS, opened
from tokentape.cli.record import Json
from tokentape.traces.errors import TapeError, UsageError

if TYPE_CHECKING:
    from tokentape.analysis.hardware import Hardware

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs of replay to place.")]
Gpus = Annotated[
    list[str] | None,
    typer.Option(metavar="N", help="GPUs of every run, or RUN=N of one; else as its tape says."),
]
Price = Annotated[
    list[str] | None,
    typer.Option("--usd-per-gpu-hour", metavar="X", help="Price of a GPU, or RUN=X; likewise."),
]
Attain = Annotated[
    str, typer.Option(metavar="SHARE", help="Part of the requests that must meet the SLO.")
]


def frontier(
    runs: Runs,
    gpus: Gpus = None,
    usd_per_gpu_hour: Price = None,
    slo: Slos = None,
    attain: Attain = "99%",
    baseline: Annotated[
        list[str] | None, typer.Option(metavar="RUN", help="A run of what there is. Repeatable.")
    ] = None,
    model_gb: Annotated[
        float | None, typer.Option("--model-gb", help="Weights that a token reads, 1e9 bytes.")
    ] = None,
    gpu_gb_per_s: Annotated[
        float | None, typer.Option("--gpu-gb-per-s", help="Memory bandwidth of a GPU, 1e9 bytes/s.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one HTML file with charts that needs no other."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --html.")] = False,
    json: Json = False,
) -> None:
    """Place runs by tokens/s for each user and for each GPU.

    Each point has its interval, its cost and energy; dominated runs are marked. With an SLO, the
    operating point is the run with the most tokens/s/GPU that meets it.
    """
    from tokentape.analysis import frontier as analysis
    from tokentape.analysis.session import connect

    if html is not None and html.exists() and not force:
        raise TapeError(f"{html}: exists; --force replaces it, or choose another name")
    if (model_gb is None) != (gpu_gb_per_s is None):
        raise UsageError("--model-gb, --gpu-gb-per-s: the speed of light needs both")
    light = None
    if model_gb is not None and gpu_gb_per_s is not None:
        if model_gb <= 0 or gpu_gb_per_s <= 0:
            raise UsageError("--model-gb, --gpu-gb-per-s: need numbers above zero")
        light = analysis.LightSpeed(model_gb * 1e9, gpu_gb_per_s * 1e9)
    told = _hardware(gpus, usd_per_gpu_hour)
    part = float(units.percent("--attain", attain))
    with connect(opened(runs, skip_damaged=False), hardware=told, slos=slos(slo)) as session:
        found = analysis.frontier(session, baseline=baseline or (), attain=part, light=light)
    if html is not None:
        from tokentape.analysis.frontier_page import page_of

        html.write_text(page_of(found), encoding="utf-8")
    if json:
        print_json(found.as_dict())
    else:
        print_lines([found.text(REPORT_COLUMNS).rstrip("\n")])


def fleet(
    traffic: Annotated[Path, typer.Argument(metavar="TAPE", help="The traffic to serve.")],
    runs: Runs,
    slo: Slos = None,
    attain: Attain = "99%",
    gpus: Gpus = None,
    usd_per_gpu_hour: Price = None,
    headroom: Annotated[str, typer.Option(metavar="SHARE", help="Added to the peak.")] = "20%",
    spare: Annotated[int, typer.Option(min=0, help="Deployments that may fail.")] = 1,
    peak: Annotated[str, typer.Option(metavar="DURATION", help="Length of the peak.")] = "1h",
    json: Json = False,
) -> None:
    """Say how many GPUs some traffic needs, and what they cost.

    The runs are replays at several loads: the one with most tokens/s/GPU that met the SLO is the
    capacity of a deployment. The answer lists what it assumes.
    """
    from tokentape.analysis import fleet as analysis
    from tokentape.analysis.session import connect

    objectives = slos(slo)
    if not objectives:
        raise UsageError("fleet: give an --slo, such as --slo ttft=500ms,tpot=50ms")
    tapes = [*opened([traffic], skip_damaged=False), *opened(runs, skip_damaged=False)]
    told = _hardware(gpus, usd_per_gpu_hour)
    with connect(tapes, hardware=told, slos=objectives) as session:
        found = analysis.fleet(
            session,
            session.labels[0],
            attain=float(units.percent("--attain", attain)),
            headroom=float(units.percent("--headroom", headroom)),
            spare=spare,
            peak_ns=max(units.duration_ns("--peak", peak), 1),
        )
    if json:
        print_json(found.as_dict())
    else:
        print_lines([found.text().rstrip("\n")])


def _hardware(gpus: Sequence[str] | None, prices: Sequence[str] | None) -> "dict[str, Hardware]":
    """Facts by run label from `N` and `RUN=N`; those of one run go before those of all."""
    from tokentape.analysis.hardware import Hardware

    counts, costs = _numbers("--gpus", gpus), _numbers("--usd-per-gpu-hour", prices)
    return {
        run: Hardware(counts.get(run, counts.get("")), costs.get(run, costs.get("")))
        for run in {*counts, *costs}
    }


def _numbers(option: str, texts: Sequence[str] | None) -> dict[str, float]:
    found = {}
    for text in texts or []:
        run, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise UsageError(f"{option} {text}: need a number above zero, or RUN=NUMBER")
        found[run] = value
    return found
