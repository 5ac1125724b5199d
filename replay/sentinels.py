"""A few fixed questions before and after a run: a candidate that answers garbage fast must not win.

Each is asked alone, greedily, with the same few tokens. Of the answers only digests are kept. Two
answers of one candidate to one question, with nothing else running, should be the same; those of
two candidates may differ by their arithmetic alone, so a difference there is said, not judged.
"""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

from tokentape.replay.apis import APIS
from tokentape.replay.targets import Form, Target
from tokentape.replay.transport import NO_REPLY, fetch
from tokentape.traces.errors import TokentapeError

VERSION = 1  # of the questions: digests of two versions cannot be compared
QUESTIONS = (
    "The capital of France is",
    "1, 2, 3, 4, 5, 6,",
    "def fibonacci(n):",
    "Wasser kocht bei einer Temperatur von",
)
ANSWER_TOKENS = 24
TIMEOUT_S = 60.0
_SAID = frozenset(("content", "reasoning_content", "reasoning", "text", "generated_text"))


@dataclass(frozen=True)
class Answer:
    """One answer: `digest` of its text, or what went wrong."""

    digest: str | None
    trouble: str | None = None


def ask(target: Target) -> list[Answer]:
    """The candidate's answers, in the order of QUESTIONS; never raises for what it answers."""
    return asyncio.run(_ask_all(target))


async def _ask_all(target: Target) -> list[Answer]:
    form = next(iter(target.forms.values()))  # one is as good as another
    return [await _ask(target, form, question) for question in QUESTIONS]


async def _ask(target: Target, form: Form, question: str) -> Answer:
    api = APIS[form.endpoint]
    settings: dict[str, Any] = {form.pinning.limit: ANSWER_TOKENS, "temperature": 0}
    if api.inside is not None:
        settings = {api.inside: settings}
    rest = json.dumps({"model": form.model, "stream": False} | settings).encode()
    prompt = api.prompt[0] + json.dumps(question).encode() + api.prompt[1]
    try:
        status, _, body = await fetch(
            "POST",
            target.address.url(form.endpoint),
            {**api.headers, **target.headers.for_sending()},
            b"{" + prompt + b"," + rest[1:],
            TIMEOUT_S,
            target.address.ca,
        )
    except TimeoutError:
        return Answer(None, f"no answer within {TIMEOUT_S:.0f} s")
    except (*NO_REPLY, TokentapeError) as error:
        return Answer(None, type(error).__name__)
    if status != 200:
        return Answer(None, f"status {status}")
    text = _text(body)
    if not text:
        return Answer(None, "no text")
    return Answer(blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest())


def _text(body: bytes) -> str:
    """The text of a whole reply of any API, reasoning included; empty where there is none."""
    try:
        found = json.loads(body)
    except ValueError:
        return ""
    return "".join(_texts(found))


def _texts(value: Any) -> Iterator[str]:
    """What lies under the keys that APIs give to what a model said, in order."""
    if isinstance(value, list):
        for item in value:
            yield from _texts(item)
    for key, item in value.items() if isinstance(value, dict) else ():
        if key in _SAID and isinstance(item, str):
            yield item
        elif isinstance(item, dict | list):
            yield from _texts(item)


def as_facts(before: list[Answer], after: list[Answer]) -> dict[str, Any]:
    """What the run's tape keeps."""
    return {
        "version": VERSION,
        "before": [asdict(answer) for answer in before],
        "after": [asdict(answer) for answer in after],
    }


def doubts(before: list[Answer], after: list[Answer]) -> list[str]:
    """What the answers of one candidate say against its run."""
    found = []
    for when, answers in (("before", before), ("after", after)):
        bad = [answer.trouble for answer in answers if answer.trouble]
        if bad:
            kinds = ", ".join(sorted(set(bad)))
            found.append(f"{len(bad)} of {len(answers)} sentinels had no answer {when} it: {kinds}")
    pairs = [(a.digest, b.digest) for a, b in zip(before, after, strict=False)]
    changed = sum(a != b for a, b in pairs if a and b)
    if changed:
        found.append(
            f"{changed} of {len(before)} sentinels were answered otherwise after it than before"
        )
    return found
