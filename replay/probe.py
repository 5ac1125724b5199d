"""Asks a candidate once, before a run, what it takes: model, prompts, lengths, pinning.

A probe costs the candidate a few requests of one token. Each refusal steps one rung down a fixed
ladder, and the rung reached is said in the plan. It must end in one clear line when the candidate
is dead or does not let us in, and never shows a header's value.
"""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from time import monotonic_ns
from typing import Any

from tokentape.replay.apis import APIS, Endpoint
from tokentape.replay.prompts import WORDS, Draws, Length, PromptSource, TokenIds, Words, Writing
from tokentape.replay.prose import Prose
from tokentape.replay.targets import (
    NOTHING,
    Address,
    Form,
    Headers,
    Pinning,
    Target,
)
from tokentape.replay.tokenizer_file import TokenizerFile
from tokentape.replay.transport import NO_REPLY, fetch
from tokentape.replay.trust import why_untrusted
from tokentape.traces.errors import TokentapeError, UsageError
from tokentape.traces.wire import reply_parser

PROBE_TIMEOUT_S = 60.0  # an engine may compile on its first request
SHORT, LONG = 8, 40  # units of the two prompts that find the length rule
# Fields that force a form: vLLM, SGLang, llama.cpp; its guided_ ones are known by their beginning.
FORCING = frozenset(
    ("response_format", "structured_outputs", "grammar", "json_schema", "regex", "ebnf")
)
FEWEST_WORDS = 32  # that a tokenizer file must know as one token, to write with these alone
REFUSED = (400, 415, 422, 501)  # the server read the request and does not take it as it is

# Engines by the `owned_by` of their models.
ENGINES = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp", "tokentape": "tokentape"}
# Where engines tell about themselves, and our names for what they say: vLLM, SGLang, TGI.
PAGES: dict[str, dict[str, str]] = {
    "/version": {"version": "engine_version"},
    "/get_server_info": {
        "version": "engine_version",
        "tp_size": "tp",
        "dp_size": "dp",
        "dtype": "dtype",
        "quantization": "quantization",
        "kv_cache_dtype": "kv_cache_dtype",
        "speculative_algorithm": "speculation",
        "disable_radix_cache": "prefix_cache_off",
    },
    "/info": {
        "version": "engine_version",
        "model_dtype": "dtype",
        "router": "engine",
    },
}
FACT_CHARS = 64

# What the candidate is asked to fix, from most to least; the first set that it takes is used.
LADDER = (
    Pinning(),
    Pinning(min_tokens=False),
    Pinning(min_tokens=False, ignore_eos=False),
    Pinning("max_completion_tokens", min_tokens=False, ignore_eos=False),
    Pinning(min_tokens=False, ignore_eos=False, include_usage=False),
)
# Where usage comes unasked.
SHORTER = LADDER[:3]


@dataclass(frozen=True)
class Answer:
    """One probe's reply: HTTP status, the prompt tokens that it counted, and its error text."""

    status: int
    prompt_tokens: int | None = None
    message: str = ""


class Probe:
    """Questions to one candidate."""

    def __init__(
        self,
        address: Address,
        headers: Headers,
        more: Mapping[str, Any] = NOTHING,
        *,
        prose: bool = False,
        tokenizer: TokenizerFile | None = None,
    ) -> None:
        """Args: prose: write text-like prompts; tokenizer: to count them with beforehand."""
        self._more = more
        self._tokenizer = tokenizer
        self._writings = _writings(tokenizer, prose=prose)
        self.notes: list[str] = []
        if form := forced_form(more):
            self.notes.append(
                f"--body {form} forces a form on the output: ignore_eos, which would break it, is "
                "not asked"
            )
        self.offered: list[str] = []  # models, where the candidate lists them
        self._owner = ""
        self._address = address
        self._headers = headers
        self._numbers = itertools.count()
        self._prompts = PromptSource(f"probe {monotonic_ns()}", 0)  # never cached by the candidate

    async def model(self, wanted: str | None) -> tuple[str, int | None]:
        """The model to ask for, else the first offered; the most tokens it takes, where it says."""
        try:
            status, _, body = await self._fetch("GET", self._address.base + "/models", None)
        except TokentapeError:
            if wanted is None:
                raise
            return wanted, None  # not every candidate has that page
        offered = [m for m in _list(_json(body), "data") if "id" in m] if status == 200 else []
        self.offered = [str(m["id"]) for m in offered]
        self._owner = str(offered[0].get("owned_by")) if offered else ""
        if wanted is None:
            if status != 200:
                raise TokentapeError(
                    f"{self._address.base}/models answers {status}: name the model with --model"
                )
            if not offered:
                raise TokentapeError(f"{self._address.base}/models names no model: use --model")
            wanted = str(offered[0]["id"])
            if len(offered) > 1:
                self.notes.append(
                    f"the candidate offers {len(offered)} models; {wanted} is asked where the tape "
                    "names none of them"
                )
        elif offered and wanted not in self.offered:
            shown = ", ".join(self.offered[:3])
            self.notes.append(f"--model {wanted}: the candidate lists {shown}, and not that one")
        limits = [m.get("max_model_len") for m in offered if str(m["id"]) == wanted]
        return wanted, limits[0] if limits and isinstance(limits[0], int) else None

    async def facts(self) -> dict[str, str]:
        """What the candidate says of itself: engine, version, and flags that alter its speed."""
        told = {"engine": ENGINES[self._owner]} if self._owner in ENGINES else {}
        for path, names in PAGES.items():
            with contextlib.suppress(TokentapeError):  # no candidate needs to have such a page
                status, _, body = await self._fetch("GET", self._address.root + path, None)
                said = _json(body) if status == 200 else {}
                found = {ours: _word(said.get(theirs)) for theirs, ours in names.items()}
                told |= {name: value for name, value in found.items() if value}
                if "engine_version" in told:
                    break
        return told

    async def form(self, endpoint: Endpoint, model: str) -> Form:
        """How an endpoint is to be asked; TokentapeError when it takes no rung of the ladder."""
        answer = Answer(0)
        draws = self._draws(SHORT)
        for form in _rungs(endpoint, model, self._writings, self._more):
            answer = await self._ask(form, draws)
            if answer.status == 200:
                return await self._with_length(form, draws, answer.prompt_tokens)
            if answer.status not in REFUSED:
                break
        raise self._refusal(endpoint, answer)

    def _refusal(self, endpoint: Endpoint, answer: Answer) -> TokentapeError:
        url = self._address.url(endpoint)
        if answer.status == 404:
            other = "chat" if endpoint == "completions" else "completions"
            said = f" ({answer.message})" if answer.message else ""
            return TokentapeError(
                f"{url} answers 404{said}: check --to and --model, or try --endpoint {other}"
            )
        return TokentapeError(
            f"{url} answers {answer.status}: {answer.message or 'no reason given'}"
        )

    async def _with_length(self, form: Form, draws: Draws, used: int | None) -> Form:
        """The form with the length rule that two counted prompts give.

        Args: draws, used: of the short prompt, which the candidate's usage counted so. /tokenize
        is believed first, then usage, then the tokenizer file; but usage, where /tokenize says
        something else: it counts what was computed.
        """
        units = _units(form.writing)
        pair = (draws, self._draws(LONG))
        if units != "token ids":
            asked = (await self._tokenize(form, pair[0]), await self._tokenize(form, pair[1]))
            rule = _rule(*asked)
            if rule is not None and used in (asked[0], None):
                self._compare_file(form, pair, asked)
                return _found(form, rule, _said(units, rule, "/tokenize"))
            if rule is not None:
                self.notes.append(
                    f"/tokenize counts {asked[0]} tokens where usage counts {used} on "
                    f"{form.endpoint}: usage is believed"
                )
        long = await self._ask(form, pair[1])
        by_usage = (used, long.prompt_tokens)
        rule = _rule(*by_usage)
        self._compare_file(form, pair, by_usage)
        if rule is not None:
            return _found(form, rule, _said(units, rule, "usage"))
        ours = self._counts(form, pair)
        if ours is not None and (rule := _rule(*ours)) is not None:
            said = _said(units, rule, "the tokenizer file alone, without the candidate's template")
            return replace(form, length=rule, rung=said)
        rung = f"{units}, one each; the candidate's usage does not count them, so not verified"
        return replace(form, rung=rung)

    def _counts(self, form: Form, pair: tuple[Draws, Draws]) -> tuple[int, int] | None:
        """Tokens of both prompts by the tokenizer file, where they are text and there is one."""
        if self._tokenizer is None or isinstance(form.writing, TokenIds):
            return None
        short, long = (self._tokenizer.count(form.writing.write(d).decode()) for d in pair)
        return short, long

    def _compare_file(
        self, form: Form, pair: tuple[Draws, Draws], counted: tuple[int | None, int | None]
    ) -> None:
        """Note a tokenizer file that counts a longer text otherwise than the candidate does.

        Templates are not in the file, so what is compared is what the longer prompt has more.
        """
        ours, (short, long) = self._counts(form, pair), counted
        if ours is None or short is None or long is None:
            return
        by_file, by_candidate = ours[1] - ours[0], long - short
        if by_file != by_candidate:
            self.notes.append(
                f"the tokenizer file disagrees with the candidate on {form.endpoint}: "
                f"{LONG - SHORT} words are {by_file} tokens by the file and {by_candidate} by the "
                "candidate, which is believed; is it another model's file?"
            )

    async def _ask(self, form: Form, draws: Draws) -> Answer:
        body = form.body(draws, 1, stream=True)
        url = self._address.url(form.endpoint)
        status, kind, reply = await self._fetch("POST", url, body, APIS[form.endpoint].headers)
        parser = reply_parser(APIS[form.endpoint].wire_format, True, status, kind, "")
        parser.feed(reply, monotonic_ns(), 1)
        columns = parser.finish(monotonic_ns(), complete=True).columns
        message = "" if status == 200 else self._message(reply)
        return Answer(status, columns.get("input_tokens"), message)

    async def _tokenize(self, form: Form, draws: Draws) -> int | None:
        """Tokens of such a prompt by vLLM's /tokenize; None where there is no such thing."""
        asked = json.loads(form.body(draws, 1, stream=False))
        question = {k: v for k, v in asked.items() if k in ("model", "prompt", "messages")}
        url = self._address.root + "/tokenize"
        try:
            status, _, reply = await self._fetch("POST", url, json.dumps(question).encode())
        except TokentapeError:  # a gateway may let nobody ask here; there is another rung
            return None
        count = _json(reply).get("count") if status == 200 else None
        return count if isinstance(count, int) else None

    def _draws(self, units: int) -> Draws:
        return self._prompts.draws(next(self._numbers).to_bytes(8), units)

    async def _fetch(
        self, method: str, url: str, body: bytes | None, more: Mapping[str, str] = NOTHING
    ) -> tuple[int, str, bytes]:
        headers = {**more, **self._headers.for_sending()}
        try:
            status, kind, reply = await fetch(
                method, url, headers, body, PROBE_TIMEOUT_S, self._address.ca
            )
        except TimeoutError:
            raise TokentapeError(
                f"{url}: no reply within {PROBE_TIMEOUT_S:.0f} s; is the candidate ready?"
            ) from None
        except NO_REPLY as error:
            if (untrusted := why_untrusted(error)) is not None:
                raise TokentapeError(f"{url}: {untrusted}") from None
            why = self._headers.hide(str(error))[:160]
            raise TokentapeError(
                f"{url}: nothing answers ({why}); start it or check --to"
            ) from None
        if status in (401, 403):
            how = "the given credential is refused" if self._headers.names else "give --key-env VAR"
            raise TokentapeError(f"{url} answers {status}: {how}")
        return status, kind, reply

    def _message(self, reply: bytes) -> str:
        """The server's own reason, on one line."""
        error = _json(reply).get("error", _json(reply).get("message"))
        text = error.get("message") if isinstance(error, dict) else error
        shown = str(text) if text else reply.decode(errors="replace")
        return self._headers.hide(" ".join(shown.split()))[:200]


def _writings(tokenizer: TokenizerFile | None, *, prose: bool) -> list[Writing]:
    """Ways to write prompts, the best first; with words that a tokenizer file knows as one token.

    Where it knows too few of them so, all are used, and the length rule has to tell.
    """
    if tokenizer is None:
        return [Prose()] if prose else [TokenIds(), Words()]
    if prose:
        return [Prose(tokenizer.one_token)]
    known = [word for word in WORDS if tokenizer.one_token(word)]
    ids = TokenIds(high=max(TokenIds.LOW, min(TokenIds.HIGH, tokenizer.tokens - 1)))
    return [ids, Words(known if len(known) >= FEWEST_WORDS else WORDS)]


def _units(writing: Writing) -> str:
    if isinstance(writing, TokenIds):
        return "token ids"
    return "words of text-like sentences" if isinstance(writing, Prose) else "words"


def _found(form: Form, rule: Length, rung: str) -> Form:
    return replace(form, length=rule, rung=rung, counted=True)


def forced_form(more: Mapping[str, Any]) -> str | None:
    """The first further field that makes an engine decode under a grammar; None: there is none."""
    for name, value in more.items():
        kind = value.get("type") if isinstance(value, dict) else value
        forces = name in FORCING or name.startswith("guided_")
        if forces and value is not None and not (name == "response_format" and kind == "text"):
            return name
        if name == "tool_choice" and kind not in (None, "none", "auto"):
            return name
    return None


def _rungs(
    endpoint: Endpoint, model: str, writings: Iterable[Writing], more: Mapping[str, Any]
) -> Iterator[Form]:
    """Forms to try, token ids only where the endpoint may take them."""
    api = APIS[endpoint]
    ladder = LADDER if api.stream_options else tuple(replace(p, limit=api.limit) for p in SHORTER)
    if forced_form(more):
        ladder = tuple(dict.fromkeys(replace(p, ignore_eos=False) for p in ladder))
    for writing in writings:
        if isinstance(writing, TokenIds) and api.token_ids is None:
            continue
        for pinning in ladder:
            yield Form(endpoint, model, writing, Length(), pinning, "", dict(more))


def _word(value: Any) -> str | None:
    """A number, a flag or a short text as a fact; nothing else."""
    if isinstance(value, bool | int | float):
        return str(value).lower()
    return value if isinstance(value, str) and 0 < len(value) <= FACT_CHARS else None


def _rule(short: int | None, long: int | None) -> Length | None:
    if short is None or long is None:
        return None
    return Length.through((SHORT, short), (LONG, long))


def _said(units: str, rule: Length, by: str) -> str:
    if not rule.exact:
        return f"{units}, {rule.per_unit:.2f} tokens each by {by}: lengths are about right"
    template = f" + {rule.overhead:.0f} of the template" if rule.overhead else ""
    return f"{units}, one token each{template} by {by}: lengths are exact"


def _json(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _list(value: dict[str, Any], name: str) -> list[dict[str, Any]]:
    items = value.get(name)
    return [i for i in items if isinstance(i, dict)] if isinstance(items, list) else []


async def find_target(
    address: Address,
    headers: Headers,
    model: str | None,
    endpoints: Iterable[Endpoint],
    *,
    models: Mapping[str, str] = NOTHING,
    more: Mapping[str, Any] = NOTHING,
    prose: bool = False,
    tokenizer: TokenizerFile | None = None,
    others: tuple[Address, ...] = (),
) -> Target:
    """Ask the candidate everything that a run needs to know.

    Args: models: which model to ask for where the tape names one; where none is wanted for all,
    those that the candidate offers under their recorded names are asked for as well. more: further
    fields of each body. prose, tokenizer: as of `Probe`. others: candidates that must
    take requests as the first one does.
    Raises TokentapeError (dead, refusing, or not speaking the endpoint) with one line to act on.
    """
    probe = Probe(address, headers, more, prose=prose, tokenizer=tokenizer)
    name, most_tokens = await probe.model(model)
    forms = {endpoint: await probe.form(endpoint, name) for endpoint in endpoints}
    missing = sorted(set(models.values()) - set(probe.offered)) if probe.offered else []
    if missing:
        raise UsageError(f"--map-model: the candidate does not offer {', '.join(missing)}")
    alike = {} if model is not None or len(probe.offered) < 2 else {n: n for n in probe.offered}
    notes = tuple(probe.notes)
    facts = await probe.facts()
    for other in others:
        twin = Probe(other, headers, more, prose=prose, tokenizer=tokenizer)
        for endpoint, form in forms.items():
            _refuse_unlike(form, await twin.form(endpoint, name), address, other)
    known = alike | dict(models)
    return Target(address, headers, name, forms, notes, most_tokens, known, facts, others)


def _refuse_unlike(form: Form, its_form: Form, first: Address, other: Address) -> None:
    """UsageError for a candidate that cannot be sent what the first one is sent."""
    for ours, its in ((form.rung, its_form.rung), (form.pinning, its_form.pinning)):
        if ours != its:
            raise UsageError(
                f"--to {other.base}: differs from {first.base} on {form.endpoint} ({its}; {ours}); "
                "replay each by itself"
            )
