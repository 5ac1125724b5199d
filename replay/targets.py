"""Says how a candidate is asked: its URLs, headers, and the bytes of a request body.

Pure: what a candidate takes is found by `probe.py` and held here. Header values and keys are
secrets: they leave this file only inside `Headers.for_sending`, never in a repr, a log, an error or
a tape.
"""

import base64
import ipaddress
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from tokentape.replay.apis import APIS, Endpoint
from tokentape.replay.prompts import Draws, Length, TokenIds, Words, Writing
from tokentape.replay.prose import Prose
from tokentape.traces.errors import UsageError

NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})
OURS = (
    *("model", "prompt", "messages", "input", "text", "input_ids", "inputs", "stream"),
    *("max_tokens", "max_completion_tokens", "max_output_tokens", "sampling_params", "parameters"),
)


class Headers:
    """Request headers whose values are shown to nobody."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(values)

    def __repr__(self) -> str:
        return f"Headers({', '.join(self.names)})"

    @property
    def names(self) -> list[str]:
        """Names only."""
        return sorted(self._values)

    def for_sending(self) -> dict[str, str]:
        """The values, for the wire."""
        return {"Content-Type": "application/json", "Accept": "*/*", **self._values}

    def hide(self, text: str) -> str:
        """A text with every value taken out, should a server have repeated one."""
        for value in self._values.values():
            for secret in {value, value.removeprefix("Bearer ")}:
                text = text.replace(secret, "[hidden]") if len(secret) > 3 else text
        return text

    @classmethod
    def gather(cls, given: Mapping[str, str], key_env: str | None, userinfo: str = "") -> "Headers":
        """Headers from --header, --key-env and the URL; UsageError for one that cannot be sent."""
        values: dict[str, str] = {}
        for name, value in given.items():
            if not HEADER_NAME.fullmatch(name):  # not shown: it may hold the value, as curl's form
                raise UsageError("--header: give NAME=VALUE; a name has no spaces and no colon")
            values[_usual(name)] = value
        if userinfo:
            values["Authorization"] = "Basic " + base64.b64encode(userinfo.encode()).decode()
        if key_env is not None:
            key = os.environ.get(key_env, "").strip()
            if not key:
                raise UsageError(f"--key-env: the variable {key_env} is not set or empty")
            values["Authorization"] = f"Bearer {key}"
        for name, value in values.items():
            if any((ord(c) < 32 and c != "\t") or ord(c) == 127 for c in value):
                given_by = f"--key-env {key_env}" if name == "Authorization" and key_env else name
                raise UsageError(f"{given_by}: the value holds a line break or control character")
        return cls(values)


def _usual(name: str) -> str:
    """One spelling for each header, so that the last one given replaces the others."""
    return "-".join(part.capitalize() for part in name.split("-"))


LOCAL_NAMES = (".local", ".internal", ".lan", ".home.arpa", ".localhost")  # RFC 6762, 8375; ICANN
HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2


@dataclass(frozen=True)
class Address:
    """Where a candidate is, without credentials; `userinfo` is kept apart and never shown.

    ca: PEM of the authority that signed its certificate; None: as this machine trusts.
    """

    base: str  # ends in the API's prefix, such as /v1
    userinfo: str = field(default="", repr=False)
    ca: Path | None = None

    @property
    def root(self) -> str:
        """The server itself: engines answer /tokenize there."""
        return self.base.removesuffix("/v1")

    def path(self, endpoint: Endpoint) -> str:
        """The request path of an endpoint."""
        return urlsplit(self.url(endpoint)).path

    def url(self, endpoint: Endpoint) -> str:
        """The whole URL of an endpoint."""
        api = APIS[endpoint]
        return (self.root if api.at_root else self.base) + api.path

    @property
    def name(self) -> str:
        """Host and port, to tell it from others."""
        return urlsplit(self.base).netloc

    @classmethod
    def parse(cls, to: str, ca: Path | None = None) -> "Address":
        """An address from --to; /v1 is added where no path is given. UsageError names the fault."""
        try:
            url = urlsplit(to)
            port = url.port
        except ValueError:  # its text may repeat a password
            raise UsageError(
                "--to: host or port cannot be read; give a URL such as http://127.0.0.1:8000"
            ) from None
        if url.scheme not in ("http", "https"):
            scheme = f"unknown URL scheme {url.scheme}://" if "://" in to else "not a URL"
            raise UsageError(f"--to: {scheme}; give http://HOST:PORT or https://HOST")
        if ca is not None and url.scheme != "https":
            raise UsageError("--ca: is for an https:// candidate only")
        if not url.hostname or url.query or url.fragment:
            raise UsageError(
                "--to: give a host and at most a path, such as http://127.0.0.1:8000/v1"
            )
        host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
        path = url.path.rstrip("/") or "/v1"
        for tail in ("/chat/completions", "/completions", "/responses", "/messages"):
            path = path.removesuffix(tail)
        userinfo = unquote(url.netloc.rpartition("@")[0])
        return cls(f"{url.scheme}://{host}{f':{port}' if port else ''}{path}", userinfo, ca)


@dataclass(frozen=True)
class Pinning:
    """What of the output length a candidate lets us fix, and what it is called there."""

    limit: str = "max_tokens"
    min_tokens: bool = True
    ignore_eos: bool = True
    include_usage: bool = True

    @property
    def exact(self) -> bool:
        """True when the candidate cannot stop earlier than asked."""
        return self.ignore_eos or self.min_tokens

    def __str__(self) -> str:
        names = [self.limit, *(n for n in ("min_tokens", "ignore_eos") if getattr(self, n))]
        return " + ".join(names) + ("" if self.exact else " only: the candidate may stop earlier")


@dataclass(frozen=True)
class Form:
    """How one endpoint of a candidate is asked: how prompts are written and lengths are fixed.

    `rung` says in words how the prompt length is reached; it stands in the plan and on the tape.
    """

    endpoint: Endpoint
    model: str
    writing: Writing
    length: Length
    pinning: Pinning
    rung: str
    more: Mapping[str, Any] = field(default_factory=dict)  # further fields of each body
    counted: bool = False  # the candidate's usage was seen to follow the prompt

    def body(self, draws: Draws, output_tokens: int, *, stream: bool) -> bytes:
        """The request body; `draws` has one entry per unit that `length` asks for."""
        text, api = self.writing.write(draws), APIS[self.endpoint]
        if isinstance(self.writing, TokenIds) and api.token_ids is not None:
            prompt = api.token_ids + b"[" + text + b"]"
        else:
            prompt = api.prompt[0] + b'"' + text + b'"' + api.prompt[1]
        rest = json.dumps(self.settings(output_tokens, stream=stream), separators=(",", ":"))
        model = json.dumps(self.model).encode()
        return b'{"model":' + model + b"," + prompt + b"," + rest[1:].encode()

    def settings(self, output_tokens: int, *, stream: bool) -> dict[str, Any]:
        """The scalars of a body."""
        pin, api = self.pinning, APIS[self.endpoint]
        settings: dict[str, Any] = {pin.limit: output_tokens}
        if pin.min_tokens:
            settings[api.least] = output_tokens
        if pin.ignore_eos:
            settings["ignore_eos"] = True
        settings |= api.settings
        if api.inside is not None:
            settings = {api.inside: settings}
        settings["stream"] = stream
        if stream and pin.include_usage and api.stream_options:
            settings["stream_options"] = {"include_usage": True}
        return settings | dict(self.more)

    def columns(self, output_tokens: int, *, stream: bool) -> dict[str, Any]:
        """What a row says about such a request."""
        pin, api = self.pinning, APIS[self.endpoint]
        usage = stream and pin.include_usage and api.stream_options
        return {
            "operation": api.operation,
            "wire_format": api.wire_format,
            "stream": stream,
            "model_requested": self.model,
            "n_choices": 1,
            "max_tokens": output_tokens,
            "min_tokens": output_tokens if pin.min_tokens else None,
            "ignore_eos": True if pin.ignore_eos else None,
            "include_usage": True if usage else None,
            "message_count": 1 if api.operation == "chat" else None,
        }


@dataclass(frozen=True)
class Target:
    """A candidate as it will be asked: where, with which headers, in which forms."""

    address: Address
    headers: Headers
    model: str
    forms: dict[Endpoint, Form]
    notes: tuple[str, ...] = ()
    max_model_tokens: int | None = None  # prompt and output together, as its /models says
    models: Mapping[str, str] = field(default_factory=dict)  # recorded: asked; else `model`
    facts: Mapping[str, str] = field(default_factory=dict)  # what it says of itself
    others: tuple[Address, ...] = ()  # alike, and each has its part of the sessions

    @property
    def addresses(self) -> tuple[Address, ...]:
        """All that requests go to."""
        return self.address, *self.others

    def form(self, endpoint: Endpoint, recorded_model: str | None) -> Form:
        """How a request for that model is asked."""
        form = self.forms[endpoint]
        model = self.models.get(recorded_model or "", self.model)
        return form if model == form.model else replace(form, model=model)


def unprobed(
    address: Address,
    headers: Headers,
    model: str,
    endpoints: Iterable[Endpoint],
    *,
    prose: bool = False,
) -> Target:
    """A target nobody has asked: what a plan assumes while it stays offline."""
    forms = {
        endpoint: Form(
            endpoint,
            model,
            Prose() if prose else TokenIds() if APIS[endpoint].token_ids else Words(),
            Length(),
            Pinning(APIS[endpoint].limit),
            "assumed, the candidate was not asked",
        )
        for endpoint in endpoints
    }
    return Target(address, headers, model, forms)


def is_private(url: str) -> bool:
    """True for this machine, private networks and names that only a local resolver knows.

    Names are judged by their form and never looked up: an answer could differ at the next moment.
    """
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith(LOCAL_NAMES)


def redacted(command: Iterable[str]) -> list[str]:
    """A command line as a tape may keep it: no header values, no credentials in URLs."""
    kept: list[str] = []
    for word in command:
        if kept and kept[-1] == "--header":
            kept.append(word.split("=", 1)[0] + "=[hidden]")
        elif word.startswith("--header="):
            kept.append("--header=" + word.split("=", 2)[1] + "=[hidden]")
        elif "://" in word and "@" in word:
            scheme, _, rest = word.partition("://")
            kept.append(f"{scheme}://[hidden]@{rest.rpartition('@')[2]}")
        else:
            kept.append(word)
    return kept
