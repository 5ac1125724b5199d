"""Verbs that judge runs: compare, fidelity (a run against its tape), trend, tails."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from tokentape.cli.objectives import Slos, slos
from tokentape.cli.output import print_json, print_lines
from tokentape.cli.read import REPORT_COLUMNS, Tapes, opened
from tokentape.cli.record import Json
from tokentape.traces.errors import GateNotMet, TapeError

Junit = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write JUnit XML too, a case for each gate.")
]
Summary = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Append Markdown, as to $GITHUB_STEP_SUMMARY.")
]


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="The run to compare with; or a glob.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The run that is new; or a glob.")],
    slo: Slos = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-if",
            metavar="GATE",
            help="Exit 3 if so: ttft_p99>+5%, ttft_p99>+20ms (changes), ttft_p99>500ms (B itself), "
            "failed>+1%, slo_attainment<-1%. Repeatable.",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one HTML file that needs no other.")
    ] = None,
    junit: Junit = None,
    summary: Summary = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the files of --html and --junit.")
    ] = False,
    json: Json = False,
) -> None:
    """Say what changed from run A to run B, request by request.

    Both must come from one tape: requests are paired by the request that they repeat. Each change
    has a 95 % interval from a block bootstrap over time; a gate fails only on a clear change. With
    a glob of several runs a side, what runs differ by is in the intervals.
    """
    from tokentape.analysis import compare as analysis
    from tokentape.analysis import comparison_page, verdicts
    from tokentape.analysis.session import connect

    _refuse_existing((html, junit), force=force)
    first, second = opened([a], skip_damaged=False), opened([b], skip_damaged=False)
    with connect([*first, *second], slos=slos(slo)) as session:
        labels = session.labels
        found = analysis.compare(session, labels[: len(first)], labels[len(first) :])
    gates = analysis.judge(found, fail_if or [])
    failures = [why for why in gates.values() if why is not None]
    if html is not None:
        html.write_text(comparison_page.page(found, gates), encoding="utf-8")
    if junit is not None:
        junit.write_text(verdicts.junit(found, gates), encoding="utf-8")
    if summary is not None:
        _append(summary, verdicts.markdown(found, gates))
    if json:
        print_json(found.as_dict() | {"failed_gates": failures})
    else:
        print_lines([found.text(REPORT_COLUMNS).rstrip("\n")])
    if failures:
        raise GateNotMet(f"compare: {'; '.join(failures)}")


def _refuse_existing(files: Iterable[Path | None], *, force: bool) -> None:
    for file in files:
        if file is not None and file.exists() and not force:
            raise TapeError(f"{file}: exists; --force replaces it, or choose another name")


def _append(file: Path, text: str) -> None:
    with file.open("a", encoding="utf-8") as page:
        page.write(text)


def tails(
    tapes: Tapes,
    metric: Annotated[
        str, typer.Option(metavar="NAME", help="ttft, ttft_arrival, ttfa, tpot, e2e, send_lag, ...")
    ] = "ttft",
    above: Annotated[
        str, typer.Option(metavar="PERCENTILE", help="Where the tail begins.")
    ] = "p99",
    json: Json = False,
) -> None:
    """Find what the slowest requests share, and name them.

    Each property comes with its lift: how many times as common it is in the tail as among all. The
    SQL that says the same is printed for `tokentape sql`.
    """
    from tokentape.analysis import tails as analysis
    from tokentape.analysis.session import connect

    with connect(opened(tapes, skip_damaged=False)) as session:
        found = analysis.tails(session, metric, above)
    if json:
        print_json([one.as_dict() for one in found])
    else:
        print_lines(["\n".join(one.text(REPORT_COLUMNS) for one in found).rstrip("\n")])


def trend(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs, in any order.")],
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-if",
            metavar="GATE",
            help="Exit 3 if the latest run is so against those before: ttft_p99>+5%. Repeatable.",
        ),
    ] = None,
    junit: Junit = None,
    summary: Summary = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --junit.")] = False,
    json: Json = False,
) -> None:
    """Say how metrics went over many runs, and from which run on they changed.

    Runs are put in the order in which they were made. Ten are the fewest that can show a change. A
    gate asks whether the latest run lies outside what those before it, five or more, let expect.
    """
    from tokentape.analysis import trend as analysis
    from tokentape.analysis import verdicts
    from tokentape.analysis.session import connect

    _refuse_existing([junit], force=force)
    with connect(opened(runs, skip_damaged=False)) as session:
        found = analysis.trend(session)
    gates = analysis.judge(found, fail_if or [])
    failures = [why for why in gates.values() if why is not None]
    if junit is not None:
        junit.write_text(verdicts.trend_junit(found, gates), encoding="utf-8")
    if summary is not None:
        _append(summary, verdicts.trend_markdown(found, gates))
    if json:
        print_json(found.as_dict() | {"failed_gates": failures})
    else:
        print_lines([found.text(REPORT_COLUMNS).rstrip("\n")])
    if failures:
        raise GateNotMet(f"trend: {'; '.join(failures)}")


def fidelity(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run of replay.")],
    source: Annotated[
        Path | None, typer.Option(metavar="TAPE", help="The tape it replays; else where it was.")
    ] = None,
    json: Json = False,
) -> None:
    """Say how a run differs from the tape that it replays.

    Arrivals, requests in flight, token counts, prefix reuse, the shape of streams and outcomes, a
    number each. The verdict of every replay ends with the short form.
    """
    from tokentape.replay.fidelity import fidelity as compare
    from tokentape.traces.reader import open_tape

    found = compare(open_tape(run), source)
    if json:
        print_json(found.as_dict())
    else:
        print_lines([found.text(), f"in short: {found.line}"])
