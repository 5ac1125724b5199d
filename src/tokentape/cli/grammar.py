"""The grammar: `tokentape VERB [TAPE...] [--option value-with-unit]`.

Verbs are plain functions in the files beside this one, which hands them to typer with their
examples and runs the one that was asked for. It must never import a room.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

import tokentape
from tokentape.cli import calibrate, drive, judge, operate, read, record, search, size

# Every verb with the example that ends its help; tests run each of them.
VERBS: list[tuple[str, Callable[..., Any], str]] = [
    ("demo", drive.demo, "tokentape demo --folder demo-1"),
    (
        "capture",
        record.capture,
        "tokentape capture --upstream http://127.0.0.1:8000 --tape prod.tape",
    ),
    ("attach", operate.attach, "tokentape attach --port 8000 --to 8080"),
    ("detach", operate.detach, "tokentape detach --port 8000"),
    (
        "replay",
        drive.replay,
        "tokentape replay prod.tape --to http://127.0.0.1:8000 --tape run.tape --speed 2x",
    ),
    ("calibrate", calibrate.calibrate, "tokentape calibrate prod.tape --duration 2s"),
    ("engine", drive.engine, "tokentape engine --listen 127.0.0.1:8000"),
    ("import", record.import_, "tokentape import azure trace.csv --tape azure.tape"),
    (
        "generate",
        record.generate,
        "tokentape generate 'arrivals=\"poisson 5/s for 1m\"; input=9; output=9' --tape new.tape",
    ),
    (
        "export",
        read.export,
        "tokentape export prod.tape --format perfetto --out prod.json",
    ),
    ("info", read.info, "tokentape info prod.tape"),
    ("check", read.check, "tokentape check prod.tape"),
    ("recover", record.recover, "tokentape recover prod.tape"),
    ("compact", record.compact, "tokentape compact prod.tape"),
    ("rekey", record.rekey, "tokentape rekey prod.tape shared.tape"),
    ("merge", record.merge, "tokentape merge prod.tape other.tape --tape both.tape"),
    ("report", read.report, "tokentape report prod.tape run.tape"),
    ("compare", judge.compare, "tokentape compare prod.tape run.tape"),
    ("fidelity", judge.fidelity, "tokentape fidelity run.tape"),
    ("tails", judge.tails, "tokentape tails prod.tape --metric ttft --above p99"),
    ("trend", judge.trend, "tokentape trend prod.tape run.tape"),
    ("frontier", size.frontier, "tokentape frontier run.tape --gpus 1 --slo ttft=5s,tpot=50ms"),
    ("fleet", size.fleet, "tokentape fleet prod.tape run.tape --gpus 1 --slo ttft=5s,tpot=50ms"),
    (
        "capacity",
        search.capacity,
        (
            "tokentape capacity prod.tape --to http://127.0.0.1:8000 --slo ttft=9s,tpot=1s@p95 "
            "--speed 1x..2x --folder found"
        ),
    ),
    (
        "sweep",
        search.sweep,
        "tokentape sweep prod.tape --to http://127.0.0.1:8000 --speed 1x,2x --folder found",
    ),
    ("sql", read.sql, 'tokentape sql prod.tape "select count(*) from requests"'),
    ("metrics", read.metrics, "tokentape metrics"),
]


def parse_and_call(arguments: list[str]) -> int:
    """Run one command line; its exit code. Raises typer's and tokentape's own errors."""
    command = typer.main.get_command(_app())
    result = command.main(
        args=arguments or ["--help"], prog_name="tokentape", standalone_mode=False
    )
    return result if isinstance(result, int) else 0


def _app() -> typer.Typer:
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(help=inspect.cleandoc(tokentape.__doc__ or "").partition("\n")[0])(_every_verb)
    for name, verb, example in VERBS:
        text = f"{inspect.cleandoc(verb.__doc__ or '')}\n\n\b\nExample: {example}"
        app.command(name, help=text)(verb)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"tokentape {tokentape.__version__}\n")
        raise typer.Exit


def _every_verb(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Options that come before the verb."""
