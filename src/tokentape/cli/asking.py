"""How a candidate is asked: the options that replay, capacity and sweep share, and what they mean.

Each option stands here once, so that a verb that makes runs cannot lack one, or mean another thing
by it. A verb takes them as parameters of these types and hands its `locals()` to `asked`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tokentape.cli import units
from tokentape.cli.record import command_line
from tokentape.traces.errors import UsageError

TapeToReplay = Annotated[Path, typer.Argument(metavar="TAPE", help="The tape to replay.")]
Window = Annotated[
    str | None, typer.Option(metavar="FROM..TO", help="Only what arrived then, such as 0s..10m.")
]
Seed = Annotated[
    int, typer.Option(metavar="N", help="Of the synthesized prompts, and of what is drawn.")
]
Prompt = Annotated[
    Literal["random", "text", "recorded"],
    typer.Option(
        help="Of what: random tokens or words; sentences that look like text; or the bodies that a "
        "capture with --content full kept, all but the model as they came."
    ),
]
ContentKeyFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Key of the recorded bodies, for --prompt.")
]
Tokenizer = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The model's tokenizer.json, to count prompts with."),
]
Model = Annotated[
    str | None, typer.Option(metavar="NAME", help="Model to ask for; else the candidate's own.")
]
MapModel = Annotated[
    list[str] | None,
    typer.Option(metavar="RECORDED=NAME", help="What to ask for where that model was asked."),
]
Body = Annotated[
    list[str] | None,
    typer.Option(metavar="FIELD=JSON", help="A further field of each request's body."),
]
Endpoint = Annotated[
    Literal["recorded", "completions", "chat", "responses", "anthropic", "sglang", "tgi"],
    typer.Option(help="Which API to ask; recorded: the one that each request came in."),
]
Header = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Sent with each request, never recorded."),
]
SessionHeader = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Tell each request's session in this header."),
]
KeyEnv = Annotated[
    str | None, typer.Option(metavar="VAR", help="Environment variable that holds the API key.")
]
Ca = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="PEM of the authority that signed the candidate."),
]
Timeout = Annotated[str, typer.Option(metavar="DURATION", help="Longest that a request may take.")]
FirstByteTimeout = Annotated[
    str | None,
    typer.Option(metavar="DURATION", help="Longest wait for a stream's first body byte."),
]
Precise = Annotated[
    bool,
    typer.Option("--precise", help="Wait for due times awake: exacter sends, a busier core."),
]
Clip = Annotated[
    bool, typer.Option("--clip", help="Cut prompts that are longer than the candidate takes.")
]
WarmUp = Annotated[
    int, typer.Option(metavar="N", min=0, help="Requests to send before a run, apart from it.")
]
Sentinels = Annotated[
    bool,
    typer.Option(
        "--sentinels", help="Ask a few fixed questions before and after; changed answers count."
    ),
]
IncludeFailed = Annotated[
    bool, typer.Option("--include-failed", help="Also what never reached an engine.")
]
WhenTurns = Annotated[
    Literal["after", "think", "open"],
    typer.Option(
        "--turns",
        help="When a turn goes out that waited for others: after them, but not before its own "
        "time; a think time after them; or at its own time, whatever they do.",
    ),
]
Think = Annotated[
    Literal["scaled", "recorded"],
    typer.Option(help="Whether --speed divides think times, as all other times."),
]
WhichAborts = Annotated[
    Literal["recorded", "ignore"],
    typer.Option(
        "--aborts", help="Whether replies are left where their recorded clients left them."
    ),
]
Workers = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=1,
        help="Processes that send; one should carry 1,000 requests/s, 25,000 tokens/s.",
    ),
]


def asked(given: dict[str, Any]) -> dict[str, Any]:
    """What ReplayOptions is told, of the `locals()` of a verb that has all options of this file.

    UsageError for a value that cannot be read.
    """
    from tokentape.traces.sampler import Sources

    window, first_byte = given["window"], given["first_byte_timeout"]
    as_they_are = (
        *(
            "source",
            "seed",
            "prompt",
            "content_key_file",
            "tokenizer",
            "model",
            "endpoint",
            "session_header",
        ),
        *("key_env", "ca", "precise", "clip", "warm_up", "sentinels", "include_failed"),
        *("turns", "workers", "force"),
    )
    return {
        **{name: given[name] for name in as_they_are},
        "window": (None, None) if window is None else units.window_ns("--window", window),
        "models": units.pairs("--map-model", given["map_model"] or []),
        "body": units.json_pairs("--body", given["body"] or []),
        "headers": units.pairs("--header", given["header"] or []),
        "timeout_ns": _some_time("--timeout", given["timeout"]),
        "first_byte_timeout_ns": None
        if first_byte is None
        else _some_time("--first-byte-timeout", first_byte),
        "replay_aborts": given["aborts"] == "recorded",
        "scaled_think": given["think"] == "scaled",
        "telemetry": Sources(tuple(given["metrics_url"] or ()), given["gpu"], given["ca"]),
        "facts": units.pairs("--fact", given["fact"] or []),
        "command": command_line(),
    }


def _some_time(option: str, text: str) -> int:
    """A duration above zero in ns."""
    duration_ns = units.duration_ns(option, text)
    if duration_ns <= 0:
        raise UsageError(f"{option} {text}: need a duration above zero, such as 600s")
    return duration_ns
