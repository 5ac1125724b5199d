"""Verbs that bring a capture into the path of traffic and out of it: attach, detach."""

from typing import Annotated

import typer

from tokentape.cli import units
from tokentape.cli.output import print_lines
from tokentape.cli.progress import say

NS_PER_S = 1_000_000_000
Port = Annotated[
    int, typer.Option(metavar="PORT", min=1, max=65535, help="Where clients find the server.")
]


def attach(
    port: Port,
    to: Annotated[
        int,
        typer.Option(
            metavar="PORT", min=1, max=65535, help="Where a running capture of it listens."
        ),
    ] = 8080,
    lease: Annotated[
        str, typer.Option(metavar="TIME", help="The kernel ends what is not renewed for so long.")
    ] = "5s",
    probe: Annotated[
        str, typer.Option(metavar="PATH", help="What is asked through the proxy twice a second.")
    ] = "/health",
    duration: Annotated[
        str | None, typer.Option("--for", metavar="TIME", help="Detach after so long.")
    ] = None,
) -> None:
    """Send the clients of a local server through a capture, while that serves them.

    Needs Linux, nftables and root. New connections to the port reach the proxy instead; open ones
    stay as they are. It runs until Ctrl-C or detach, and ends by itself when the proxy fails.
    """
    lease_s = units.duration_ns("--lease", lease) / NS_PER_S
    for_s = units.duration_ns("--for", duration) / NS_PER_S if duration else None
    from tokentape.proxy.attach import AttachOptions
    from tokentape.proxy.attach import attach as run

    options = AttachOptions(port=port, to=to, lease_s=lease_s, probe=probe, for_s=for_s)
    ended = run(options, lambda who: say(f"port {port} goes to {to} for {who}; Ctrl-C ends"))
    print_lines([f"port {port} goes direct again: {ended}"])


def detach(
    port: Annotated[
        int | None,
        typer.Option(metavar="PORT", min=1, max=65535, help="Where clients find the server."),
    ] = None,
) -> None:
    """Let clients go to their server directly again: of one port, or of all.

    Streams that a capture has open end there; attach leaves by itself.
    """
    from tokentape.proxy.attach import detach as run

    done = run(port)
    found = [f"port {at} goes direct again" for at in done]
    print_lines(found or ["nothing was attached"])
