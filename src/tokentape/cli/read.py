"""Verbs that read tapes and change nothing: info, check, report, sql, metrics, export."""

import io
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Literal

import typer

from tokentape.cli import units
from tokentape.cli.objectives import Slos, slos
from tokentape.cli.output import print_json, print_lines, table_lines, write_csv, write_json
from tokentape.cli.record import Json
from tokentape.traces.errors import TapeError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    from tokentape.traces.reader import Tape

Tapes = Annotated[list[Path], typer.Argument(metavar="TAPE...", help="Tapes to read.")]
SkipDamaged = Annotated[
    bool, typer.Option("--skip-damaged", help="Read the other segments of a damaged tape.")
]
CHECK_FAILED = 1
REPORT_COLUMNS = 100  # where there is no terminal


def opened(paths: Sequence[Path], *, skip_damaged: bool) -> "list[Tape]":
    """The tapes that paths or globs name."""
    from tokentape.traces.reader import Tape, open_any

    found: list[Tape] = []
    for path in paths:
        one_or_more = open_any(path, skip_damaged=skip_damaged)
        found += [one_or_more] if isinstance(one_or_more, Tape) else one_or_more
    return found


def info(tapes: Tapes, json: Json = False) -> None:
    """Say what tapes are, what they hold and what they lack.

    Facts, counts and losses; arrivals, lengths, sessions, prefixes. Damaged segments are named, not
    refused.
    """
    from dataclasses import asdict

    from tokentape.cli.holds import lines_of
    from tokentape.traces.summary import summarize

    told = [(_told(tape), summarize(tape)) for tape in opened(tapes, skip_damaged=True)]
    if json:
        print_json([facts | {"holds": asdict(holds)} for facts, holds in told])
        return
    for i, (facts, holds) in enumerate(told):
        width = max(map(len, facts))
        print_lines([""] if i else [])
        print_lines(f"{name:<{width}}  {_short(value)}" for name, value in facts.items())
        print_lines(f"{name:<{width}}  {text}" for name, text in lines_of(holds))


def _told(tape: "Tape") -> dict[str, object]:
    from tokentape.traces.content import bodies

    return {
        "tape": str(tape.path),
        **tape.facts,
        "segments": len(tape.segments),
        "requests": tape.rows,
        "events": tape.events,
        "unsealed": tape.unsealed_rows + tape.open_rows,
        "lost": tape.losses,
        **({"bodies": bodies(tape.path)} if tape.facts.get("content") == "full" else {}),
        "damaged": {str(path): why for path, why in tape.damaged},
    }


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}={_short(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        return " ".join(map(_short, value))
    return "unknown" if value is None else str(value)


def check(tapes: Tapes, json: Json = False) -> None:
    """Check every row of tapes.

    Errors mean that numbers from the tape would be wrong: exit code 1. Warnings say what is missing
    and counted.
    """
    from tokentape.traces.check import check as run

    found = [f for tape in opened(tapes, skip_damaged=True) for f in run(tape)]
    if json:
        print_json([vars(f) for f in found])
    else:
        print_lines(f"{f.severity}: {f.where}: {f.what} ({f.count})" for f in found)
        errors = sum(f.severity == "error" for f in found)
        print_lines([f"{errors} errors, {len(found) - errors} warnings"])
    if any(f.severity == "error" for f in found):
        raise typer.Exit(CHECK_FAILED)


def report(
    tapes: Tapes,
    slo: Slos = None,
    phases: Annotated[
        bool, typer.Option("--phases", help="Queue, prefill and decode, and what prefills cost.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one HTML file with charts that needs no other."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --html.")] = False,
    json: Json = False,
    skip_damaged: SkipDamaged = False,
) -> None:
    """Print the latency, throughput and outcomes of tapes, and their goodput under SLOs.

    Every figure comes with how many values stand behind it.
    """
    if html is not None and html.exists() and not force:
        raise TapeError(f"{html}: exists; --force replaces it, or choose another name")
    print_report(tapes, slo, phases=phases, json=json, skip_damaged=skip_damaged, html=html)


def print_report(
    paths: Sequence[Path],
    slo: Sequence[str] | None = None,
    *,
    phases: bool = False,
    json: bool,
    skip_damaged: bool = False,
    html: Path | None = None,
) -> None:
    """The report on tapes, as text or JSON, and as a page where `html` says."""
    from tokentape.analysis import report as analysis
    from tokentape.analysis.session import connect

    objectives = slos(slo)
    with connect(opened(paths, skip_damaged=skip_damaged), slos=objectives) as session:
        found = analysis.report(session, phases=phases)
        if html is not None:
            from tokentape import __version__
            from tokentape.analysis.report_page import page_of

            html.write_text(page_of(session, found, __version__), encoding="utf-8")
    if json:
        print_json(found.as_dict())
    else:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else REPORT_COLUMNS
        print_lines([found.text(columns).rstrip("\n")])


def metrics(
    json: Json = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print METRICS.md: every definition, every view.")
    ] = False,
) -> None:
    """List every metric with its unit."""
    from tokentape.analysis import catalogue

    found = catalogue.metrics()
    if json:
        print_json([vars(metric) for metric in found])
    elif markdown:
        print_lines([catalogue.markdown().rstrip("\n")])
    else:
        rows = [[m.name, m.unit, m.title] for m in found]
        print_lines(table_lines(["metric", "unit", "title"], rows))


def sql(
    tapes_and_query: Annotated[
        list[str], typer.Argument(metavar="TAPE... QUERY", help="Tapes to read, then one SELECT.")
    ],
    form: Annotated[
        Literal["table", "csv", "json", "parquet"], typer.Option("--format", help="How to print.")
    ] = "table",
    json: Annotated[bool, typer.Option("--json", help="Same as --format json.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write there instead of printing.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    skip_damaged: SkipDamaged = False,
    content_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The key of encrypted bodies, for the view content."),
    ] = None,
) -> None:
    """Run one SELECT over the standard views of tapes.

    The views: requests, events, tapes, losses, content (bodies, where kept), and one per metric.
    `describe requests` lists the columns of one; `tokentape metrics --markdown` describes them all.
    """
    from tokentape.analysis.session import connect
    from tokentape.traces.privacy import load_content_key

    *paths, query = tapes_and_query
    if not paths:
        raise UsageError("sql: give at least one tape, then the query")
    form = "json" if json else form
    if form == "parquet" and out is None and sys.stdout.isatty():
        raise UsageError("--format parquet: give --out FILE; a terminal cannot show it")
    key = load_content_key(content_key_file) if content_key_file else b""
    tapes = opened([Path(p) for p in paths], skip_damaged=skip_damaged)
    with connect(tapes, content_key=key) as session:
        table = session.table(query)
    if out is None:
        _write(table, form, sys.stdout.buffer)
        return
    try:
        with out.open("wb" if force else "xb") as file:
            _write(table, form, file)
    except FileExistsError:
        raise TapeError(f"{out}: exists; --force replaces it, or choose another --out") from None


def _write(table: "pa.Table", form: str, binary: IO[bytes]) -> None:
    if form == "parquet":
        import pyarrow.parquet as pq

        pq.write_table(table, binary)
        return
    names = table.column_names
    columns = [column.to_pylist() for column in table.columns]
    rows = list(zip(*columns, strict=True))
    text = io.TextIOWrapper(binary, encoding="utf-8", newline="\n", write_through=True)
    if form == "csv":
        write_csv(names, rows, text)
    elif form == "json":
        if len(set(names)) < len(names):
            raise UsageError("sql: two columns have one name, which JSON cannot hold; use AS")
        write_json([dict(zip(names, row, strict=True)) for row in rows], text)
        text.write("\n")
    else:
        text.writelines(f"{line}\n" for line in table_lines(names, rows))
    text.detach()


def export(
    tape: Annotated[Path, typer.Argument(metavar="TAPE", help="The tape to read.")],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="agentic-mooncake, aiperf, csv, dynamo, guidellm, mooncake, otlp, perfetto, weka; "
            "sql: our views for a plain duckdb shell.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="PATH", help="What to write; weka makes a folder.")],
    window: Annotated[
        str | None,
        typer.Option(metavar="FROM..TO", help="Only arrivals of this part of the tape: 0s..10m."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace PATH if it exists.")] = False,
    json: Json = False,
    skip_damaged: SkipDamaged = False,
) -> None:
    """Write a tape in another tool's format.

    Rows that the format cannot hold are counted by reason; what else is lost is said.
    """
    from tokentape.traces.exporters import EVERYTHING, export_tape
    from tokentape.traces.reader import open_tape

    part = units.window_ns("--window", window) if window else EVERYTHING
    opened_tape = open_tape(tape, skip_damaged=skip_damaged)
    if form == "sql":
        _export_views(opened_tape, out, window=window, force=force, json=json)
        return
    done = export_tape(opened_tape, form, out, window=part, force=force)
    if json:
        print_json(vars(done))
        return
    dropped = "".join(f", {n} left out ({reason})" for reason, n in sorted(done.dropped.items()))
    print_lines([f"{done.read} requests read, {done.written} written{dropped}", *done.notes])


def _export_views(tape: "Tape", out: Path, *, window: str | None, force: bool, json: bool) -> None:
    """The SQL modules over a tape in one file."""
    from tokentape.analysis.shell import write_views

    if window:
        raise UsageError("--window: views are of the whole tape; use WHERE arrival_ns in SQL")
    made = write_views([tape], out, force=force)
    if json:
        print_json({"views_and_macros": made, "out": str(out)})
    else:
        print_lines([f"{made} views and macros written; in a duckdb shell: .read {out}"])
