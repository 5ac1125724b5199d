"""What a user asks of a replay, checked as far as that goes without the tape and the candidate."""

import secrets
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from tokentape.replay.apis import ENDPOINTS, Wanted
from tokentape.replay.asked import Asked
from tokentape.replay.sessions import Shard
from tokentape.replay.targets import HEADER_NAME, OURS, redacted
from tokentape.replay.trust import trust
from tokentape.replay.turns import Turns
from tokentape.traces.errors import UsageError
from tokentape.traces.sampler import Sources


@dataclass
class ReplayOptions:
    """What a user asks for. `to`, `headers` and the variable `key_env` may hold secrets."""

    source: Path
    to: str = field(repr=False)  # may hold credentials
    tape: Path | None = None
    also_to: tuple[str, ...] = field(default=(), repr=False)  # candidates beside it, taking turns
    speed: Fraction = Fraction(1)
    window: tuple[int | None, int | None] = (None, None)  # ns after the tape's first arrival
    seed: int = 0
    namespace: str | None = None  # of the prompts; None: one that no other run has
    session_header: str | None = None  # by which each request tells its session
    prompt: Literal["random", "text", "recorded"] = "random"  # what prompts are made of
    content_key_file: Path | None = None  # of recorded bodies
    tokenizer: Path | None = None  # a tokenizer.json to count them with
    model: str | None = None
    models: dict[str, str] = field(default_factory=dict)  # to ask for, by the recorded one
    body: dict[str, Any] = field(default_factory=dict)  # further fields of each request
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    key_env: str | None = None
    ca: Path | None = None  # PEM of who signed the candidate's certificate
    endpoint: Wanted = "recorded"
    max_requests: int | None = None
    max_tokens: int | None = None
    timeout_ns: int | None = None  # per request; None waits for ever
    first_byte_timeout_ns: int | None = None  # of a stream's body
    warm_up: int = 0  # requests before the run
    prime_cache: bool = False  # send what a cache would hold when the window begins
    sentinels: bool = False  # ask a few fixed questions before and after
    precise: bool = False  # wait for each due time awake: a core is busier, sends are exacter
    include_failed: bool = False
    turns: Turns = "after"
    scaled_think: bool = True  # --speed divides think times, too
    replay_aborts: bool = True  # leave replies where their recorded clients did
    workers: int = 1
    shard: Shard | None = None
    start_at_unix_ns: int | None = None
    clip: bool = False  # cut prompts to what the candidate takes
    force: bool = False
    operators: Asked = field(default_factory=Asked)
    telemetry: Sources = field(default_factory=Sources)  # what is sampled meanwhile
    facts: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The options as a tape keeps them: header names without values."""
        return {
            "source": str(self.source),
            "speed": str(self.speed),
            "window_ns": list(self.window),
            "seed": self.seed,
            "namespace": self.namespace,
            "session_header": self.session_header,
            "prompt": self.prompt,
            "content_key_file": str(self.content_key_file) if self.content_key_file else None,
            "tokenizer": str(self.tokenizer) if self.tokenizer else None,
            "model": self.model,
            "models": self.models,
            "body": self.body,
            "header_names": sorted(self.headers),
            "key_env": self.key_env,
            "ca": str(self.ca) if self.ca else None,
            "endpoint": self.endpoint,
            "max_requests": self.max_requests,
            "max_tokens": self.max_tokens,
            "timeout_ns": self.timeout_ns,
            "first_byte_timeout_ns": self.first_byte_timeout_ns,
            "warm_up": self.warm_up,
            "prime_cache": self.prime_cache,
            "sentinels": self.sentinels,
            "precise": self.precise,
            "clip": self.clip,
            "include_failed": self.include_failed,
            "turns": self.turns,
            "aborts": "recorded" if self.replay_aborts else "ignore",
            "think": "scaled" if self.scaled_think else "recorded",
            **self.operators.as_dict(),
            "workers": self.workers,
            "shard": str(self.shard) if self.shard else None,
            "start_at_unix_ns": self.start_at_unix_ns,
            "metrics_urls": self.telemetry.names,
            "gpu": self.telemetry.gpu,
            "command": redacted(self.command),
        }

    def check(self) -> None:
        """UsageError for what can be seen to be wrong here."""
        self.telemetry.check()
        if self.ca is not None:
            trust(self.ca)
        if self.session_header is not None and not HEADER_NAME.fullmatch(self.session_header):
            raise UsageError("--session-header: a header's name has no spaces and no colon")
        if self.prime_cache and (not self.window[0] or self.operators.other_requests):
            raise UsageError(
                "--prime-cache: is for a --window that begins later than the tape, without "
                "--thin, --multiply, --loop and --replica"
            )
        self._check_recorded()
        if ours := sorted(self.body.keys() & set(OURS)):
            raise UsageError(f"--body {ours[0]}: that field follows from the tape and the options")
        if self.endpoint not in ("recorded", *ENDPOINTS):
            known = ", ".join(ENDPOINTS)
            raise UsageError(f"--endpoint {self.endpoint}: give recorded, {known}")

    def _check_recorded(self) -> None:
        """UsageError for what recorded bodies cannot do."""
        if self.prompt != "recorded":
            if self.content_key_file is not None:
                raise UsageError("--content-key-file: is for --prompt recorded")
            return
        asked = {
            "--endpoint": self.endpoint != "recorded",
            "--body": self.body,
            "--tokenizer": self.tokenizer,
            "--clip": self.clip,
            "--prime-cache": self.prime_cache,
            "--multiply and --loop": self.operators.copies,
        }
        if refused := [name for name, given in asked.items() if given]:
            raise UsageError(
                f"{refused[0]}: not with --prompt recorded, which sends bodies as they came"
            )

    def fresh_namespace(self) -> str:
        """A namespace that no run has had: no candidate's cache holds prompts of it.

        All shards of a run have one: it follows from the instant at which they start.
        """
        if self.shard is not None:
            return f"start-{self.start_at_unix_ns}"
        return secrets.token_hex(8)
