"""Service level objectives on the command line: `ttft=500ms,tpot=50ms,prompt=..4096`."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokentape.cli import units
from tokentape.traces.errors import UsageError

if TYPE_CHECKING:
    from tokentape.analysis.slo import Slo

SLO_FORM = "limits such as ttft=500ms,tpot=50ms or preset=llama3.1-8b-interactive"
Slos = Annotated[
    list[str] | None,
    typer.Option(
        "--slo",
        metavar="LIMITS",
        help="ttft=500ms,tpot=50ms, preset=llama3.1-8b-interactive; for a class: model=M, "
        "tenant=DIGEST, prompt=..4096 (tokens), name=N. Repeatable.",
    ),
]
_CLASS = ("name", "preset", "model", "tenant")
_PROMPT = re.compile(r"(\d{1,9})?\.\.(\d{1,9})?")


def slos(texts: Sequence[str] | None) -> "list[Slo]":
    """The objectives of some `--slo` options; UsageError says what is wrong with one."""
    found = [_slo(text) for text in texts or []]
    names = [slo.name for slo in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"--slo {min(twice)}: is given twice")
    return found


def _slo(text: str) -> "Slo":
    from tokentape.analysis.slo import LIMITS, Slo

    given = units.pairs("--slo", text.split(","))
    told: dict[str, Any] = {key: given.pop(key) for key in _CLASS if key in given}
    if prompt := given.pop("prompt", ""):
        told |= _prompt(prompt)
    if unknown := given.keys() - set(LIMITS):
        raise UsageError(
            f"--slo {min(unknown)}: no such limit; there are {', '.join(LIMITS)}, and preset, "
            "name, model, tenant, prompt"
        )
    limits = {metric: units.duration_ns(f"--slo {metric}", given[metric]) for metric in given}
    if not limits and "preset" not in told:
        raise UsageError(f"--slo {text}: need {SLO_FORM}")
    return Slo(limits_ns=limits, **({"name": text} | told))


def _prompt(text: str) -> dict[str, int | None]:
    match = _PROMPT.fullmatch(text)
    if not match or match[0] == "..":
        raise UsageError(f"--slo prompt={text}: need token counts such as ..4096 or 1024..8192")
    first, last = (int(end) if end else None for end in match.groups())
    return {"prompt_from": first, "prompt_until": last}
