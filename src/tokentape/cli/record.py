"""Verbs that make or mend a tape: capture, import, generate, recover, compact, merge."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tokentape.cli import units
from tokentape.cli.output import print_json, print_lines
from tokentape.cli.progress import counting, live_line, say
from tokentape.traces.errors import UsageError

if TYPE_CHECKING:
    from tokentape.traces.keep import Keep

TapeToMake = Annotated[Path, typer.Option("--tape", metavar="DIR", help="The tape to write.")]
Facts = Annotated[
    list[str] | None,
    typer.Option(
        "--fact", metavar="NAME=VALUE", help="What the tape shall remember: gpu=H100, tp=2, ..."
    ),
]
MetricsUrls = Annotated[
    list[str] | None,
    typer.Option(
        "--metrics-url",
        metavar="URL",
        help="A Prometheus page to sample each second: an engine's /metrics, DCGM's. Repeatable.",
    ),
]
LocalGpu = Annotated[
    bool, typer.Option("--gpu", help="Sample this machine's GPUs too: energy, power, clocks.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace a tape that exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def command_line() -> list[str]:
    """The command as a tape remembers it; each room hides what is secret in its own options."""
    return ["tokentape", *sys.argv[1:]]


def capture(
    upstream: Annotated[
        str, typer.Option(metavar="URL", help="The server to record: http(s)://HOST:PORT.")
    ],
    tape: TapeToMake,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where clients connect; port 0: any free one.")
    ] = "127.0.0.1:8080",
    content: Annotated[
        Literal["none", "structure", "full"],
        typer.Option(
            help="none: times and lengths; structure: also which prompts share a prefix; "
            "full: bodies too."
        ),
    ] = "structure",
    key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Key of the digests, one per fleet; else the tape's own."
        ),
    ] = None,
    content_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Encrypt bodies: a key of 16 or 32 bytes, in a file of mode 0600."
        ),
    ] = None,
    fact: Facts = None,
    workers: Annotated[
        int, typer.Option(metavar="N", min=1, max=256, help="Processes that share the port.")
    ] = 1,
    sample: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Keep this share of the sessions, such as 10%; errors and slow requests always.",
        ),
    ] = None,
    keep_slower: Annotated[
        str | None,
        typer.Option(
            metavar="ttft=T,e2e=T",
            help="With --sample: what is slow, by default ttft=5s,e2e=1m from arrival.",
        ),
    ] = None,
    session_header: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A header by which clients name their session. Repeatable."
        ),
    ] = None,
    retain: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Delete what was sealed longer ago, such as 7d."),
    ] = None,
    max_disk: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Delete the oldest when the tape is larger, such as 100GB."
        ),
    ] = None,
    event_sizes: Annotated[
        bool,
        typer.Option(
            "--event-sizes/--no-event-sizes",
            help="Tokens of each event of a stream; their sizes betray text.",
        ),
    ] = True,
    fsync: Annotated[
        bool, typer.Option("--fsync", help="The journal survives a power cut, at some cost.")
    ] = False,
    cert: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Serve TLS with this PEM: private key and chain."),
    ] = None,
    upstream_ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="PEM of the authority that signed the upstream."),
    ] = None,
    http2: Annotated[
        bool, typer.Option("--http2", help="Offer HTTP/2 to clients; needs --cert.")
    ] = False,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Serve /metrics (Prometheus) and /healthz there."),
    ] = None,
    metrics_url: MetricsUrls = None,
    gpu: LocalGpu = False,
) -> None:
    """Record the traffic between clients and a server.

    Clients send their requests to the address that is printed; they reach the server unchanged.
    Ctrl-C ends: streams in flight finish first. A tape that exists is continued.
    """
    units.address("--listen", listen)  # before a second goes by with imports
    facts = units.pairs("--fact", fact or [])
    keep = _keep(sample, keep_slower)
    headers = tuple(units.header_name("--session-header", name) for name in session_header or ())
    from tokentape.proxy.capture import capture as run
    from tokentape.proxy.options import CaptureOptions
    from tokentape.proxy.watching import Watching
    from tokentape.traces.sampler import Sources

    options = CaptureOptions(
        upstream=upstream,
        tape=tape,
        listen=listen,
        content=content,
        key_file=key_file,
        content_key_file=content_key_file,
        facts=facts,
        command=command_line(),
        workers=workers,
        event_sizes=event_sizes,
        fsync=fsync,
        http2=http2,
        certificate=cert,
        upstream_ca=upstream_ca,
        metrics=metrics,
        keep=keep,
        retain_s=units.duration_ns("--retain", retain) / 1e9 if retain is not None else None,
        max_disk_bytes=units.size_bytes("--max-disk", max_disk) if max_disk is not None else None,
        session_headers=headers,
        telemetry=Sources(tuple(metrics_url or ()), gpu, upstream_ca),
    )
    with live_line() as tell:
        summary = run(
            options,
            lambda url: say(f"listening on {url}, recording to {tape}; Ctrl-C ends"),
            lambda supervisor: Watching(supervisor, options, tell),
        )
    print_lines([summary.text()])
    if summary.losses:
        lost = sum(summary.losses.values())
        say(f"tokentape: warning: the tape is incomplete: {lost} requests lost; see info {tape}")


def _keep(sample: str | None, slower: str | None) -> "Keep | None":
    """What a capture keeps; None for all. UsageError for a share of nothing."""
    from tokentape.traces.keep import Keep

    if sample is None:
        if slower is not None:
            raise UsageError("--keep-slower: says what is kept beside a sample; give --sample too")
        return None
    share = units.percent("--sample", sample)
    if not share:
        raise UsageError("--sample 0%: nothing would stand for the rest; give a share above 0%")
    limits = units.pairs("--keep-slower", slower.split(",") if slower else [])
    if unknown := limits.keys() - {"ttft", "e2e"}:
        raise UsageError(f"--keep-slower {min(unknown)}: need ttft=TIME, e2e=TIME or both")
    given = {f"{n}_ns": units.duration_ns(f"--keep-slower {n}", t) for n, t in limits.items()}
    return Keep(float(share), **given)


def import_(
    trace_format: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT",
            help="agentic-mooncake, aiperf, azure, bailian, baseten, burstgpt, dynamo, litellm, "
            "mooncake, otel, pcap, ragpulse, servegen, vllm-bench, weka.",
        ),
    ],
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="The trace's files, or its folder.")
    ],
    tape: TapeToMake,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Seed of the draw, where a trace is no record."),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Make a tape of a trace in another tool's format.

    Every row is kept or counted as dropped, with the reason.
    """
    from tokentape.traces.importers import import_trace

    with counting("requests imported") as tell:
        done = import_trace(
            trace_format,
            files,
            tape,
            seed=seed,
            force=force,
            command=command_line(),
            progress=lambda done: tell(done, ""),
        )
    dropped = "".join(f", {n} dropped ({reason})" for reason, n in sorted(done.dropped.items()))
    if json:
        print_json({"read": done.read, "written": done.written, "dropped": done.dropped})
    else:
        print_lines([f"{done.read} rows read, {done.written} requests written{dropped}"])


def generate(
    spec: Annotated[
        str, typer.Argument(metavar="SPEC", help="A TOML file, or its text with ; for new lines.")
    ],
    tape: TapeToMake,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Of all that is drawn; else the description's own."),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Make a tape of a load that is described, not recorded.

    Arrivals constant, Poisson or gamma, in steps and ramps; lengths log-normal or as another tape
    has them; common prefixes; turns with think time. One description and seed make one tape
    everywhere.
    """
    from tokentape.cli.describe import described
    from tokentape.traces.synthetic import generate as run

    load = described(spec, seed)
    with counting("requests drawn") as tell:
        done = run(
            load, tape, force=force, command=command_line(), progress=lambda done: tell(done, "")
        )
    if json:
        print_json(done.as_dict())
    else:
        print_lines([done.text()])


def recover(
    tape: Annotated[Path, typer.Argument(metavar="TAPE", help="A tape whose writer died.")],
    json: Json = False,
) -> None:
    """Seal what a process that died left unsealed.

    Requests that were open are kept with outcome cut.
    """
    from tokentape.traces.recover import recover as run

    done = run(tape)
    if json:
        print_json({"rows": done.rows, "cut": done.cut, "events": done.events})
    else:
        print_lines([f"{done.rows} rows sealed ({done.cut} of them cut), {done.events} events"])


def compact(
    tapes: Annotated[
        list[Path], typer.Argument(metavar="TAPE...", help="Tapes that nobody writes.")
    ],
    json: Json = False,
) -> None:
    """Rewrite the many files of a tape as few, sorted by arrival; a day begins a new one.

    Nothing else changes. The tape is replaced in one step, when all rows are written.
    """
    from tokentape.traces.compact import compact as run

    done = {str(tape): run(tape) for tape in tapes}
    if json:
        print_json([{"tape": tape} | vars(one) for tape, one in done.items()])
    else:
        print_lines(f"{tape}: {one.text()}" for tape, one in done.items())


def merge(
    tapes: Annotated[list[Path], typer.Argument(metavar="TAPE...", help="Captures, two or more.")],
    tape: TapeToMake,
    force: Force = False,
    json: Json = False,
) -> None:
    """Make one tape of several captures, of one fleet or of several days.

    Their times are put on one axis; a request that several have is kept once, and counted.
    """
    from tokentape.traces.compact import merge as run

    done = run(tapes, tape, command=command_line(), force=force)
    if json:
        print_json(vars(done))
    else:
        print_lines([done.text()])


def rekey(
    tape: Annotated[Path, typer.Argument(metavar="TAPE", help="A sealed tape.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The copy to write.")],
    key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Key of the copy's digests; else one that nobody keeps."),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Copy a tape for others: same prefixes, other hashes and ids.

    Two that have copies under different keys cannot join them by any id. Trace and response ids
    and bodies are left out.
    """
    from tokentape.traces.rekey import rekey as run

    rows = run(tape, out, key_file=key_file, command=command_line(), force=force)
    if json:
        print_json({"rows": rows})
    else:
        print_lines([f"{rows} rows written to {out} under another key"])
