"""The capture command: workers in front of one upstream, and a tape behind them.

Runs until SIGINT or SIGTERM, then drains: streams in flight end, and only then is the tape sealed.
"""

import asyncio
import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokentape.proxy.keeping import kept_within
from tokentape.proxy.options import (
    BACKLOG,
    CaptureOptions,
    check_tls,
    checked_listen,
    checked_upstream,
    to_json,
)
from tokentape.proxy.supervisor import Supervisor, bind
from tokentape.traces import facts as tape_facts
from tokentape.traces.errors import TokentapeError, UsageError
from tokentape.traces.prepare import make_ready
from tokentape.traces.privacy import KEY_BYTES, Privacy, content_key_id, load_content_key, load_key
from tokentape.traces.recording import say
from tokentape.traces.sampler import Sampler, keep_facts

SEAL_TIMEOUT_S = 60.0


@dataclass
class CaptureSummary:
    """What was captured, and what was not; seen = rows + unsealed + sampled_out + losses."""

    seen: int = 0
    rows: int = 0
    events: int = 0
    losses: dict[str, int] = field(default_factory=dict)
    unsealed: int = 0
    lost_reads: int = 0
    sampled_out: int = 0
    deleted: int = 0  # of the tape's rows, by its limits
    proxy_errors: int = 0

    def add(self, seen: int, rows: int, events: int, losses: dict[str, int]) -> None:
        """Add what one life of one worker had."""
        self.seen += seen
        self.rows += rows
        self.events += events
        for reason, n in losses.items():
            self.losses[reason] = self.losses.get(reason, 0) + n

    def text(self) -> str:
        """One line for people."""
        lost = ", ".join(f"{n} lost ({reason})" for reason, n in sorted(self.losses.items()))
        tail = f"; {lost}" if lost else "; nothing lost"
        out = f", {self.sampled_out} sampled out" if self.sampled_out else ""
        if self.lost_reads:
            tail += f"; {self.lost_reads} pieces of streams lost"
        if self.unsealed:
            tail += f"; {self.unsealed} wait in the journal for `tokentape recover`"
        if self.deleted:
            tail += f"; {self.deleted} old rows deleted"
        errors = f"; {self.proxy_errors} proxy errors" if self.proxy_errors else ""
        kept = f"{self.rows} rows{out}, {self.events} events"
        return f"{self.seen} requests seen, {kept}{tail}{errors}"


def capture(
    options: CaptureOptions,
    on_ready: Callable[[str], None],
    watch: Callable[[Supervisor], Any] | None = None,
) -> CaptureSummary:
    """Proxy and record until a signal; `on_ready` gets the URL that clients should use.

    `watch` is called once with the running supervisor, in its event loop. UsageError for an
    upstream or address that cannot be used, TapeError for the tape.
    """
    upstream = checked_upstream(options.upstream)
    host, port = checked_listen(options.listen)
    check_tls(options)
    options.telemetry.check()
    tape_facts.refuse_foreign(options.tape)  # before a key is made beside it
    try:
        sockets = bind(host, port, options.workers, BACKLOG)
    except OSError as error:
        raise UsageError(
            f"--listen {options.listen}: {error.strerror}; choose another port, or 0 for a free one"
        ) from None
    try:
        content_key = _content_key(options)
        lock_fd, key = _ready_tape(options, upstream, content_key)
        before = set(tape_facts.read_facts(options.tape).get("seen", {}))
        hello = {"options": to_json(options, upstream), "key": key.hex()}
        hello["content_key"] = content_key.hex()
        url = _url(sockets[0], options)
        deleted = -_deleted(options.tape)
        limits = (options.retain_s, options.max_disk_bytes)
        with (
            os.fdopen(lock_fd),
            _sampled(options, lock_fd),
            kept_within(options.tape, *limits),
        ):
            done, deaths = asyncio.run(_run(sockets, hello, lock_fd, lambda: on_ready(url), watch))
            total = _total(options, done, deaths, before)
        total.deleted = deleted + _deleted(options.tape)
        return total
    finally:
        for bound in sockets:
            bound.close()


@contextlib.contextmanager
def _sampled(options: CaptureOptions, lock_fd: int) -> Iterator[None]:
    """Sample telemetry while the block runs; a source that says nothing keeps nobody waiting."""
    if not options.telemetry:
        yield
        return
    with Sampler(options.tape, lock_fd, options.telemetry) as sampler:
        threading.Thread(target=_hear, args=(sampler, options.tape), daemon=True).start()
        yield


def _hear(sampler: Sampler, tape: Path) -> None:
    """Say which sources say nothing, and keep what the GPUs are."""
    with contextlib.suppress(TokentapeError):
        began = sampler.began()
        for source, why in began["failed"].items():
            say(f"telemetry: {source} {why}; it is asked again each second")
        keep_facts(tape, began)


async def _run(
    sockets: list[socket.socket],
    hello: dict[str, Any],
    lock_fd: int,
    on_ready: Callable[[], None],
    watch: Callable[[Supervisor], Any] | None,
) -> tuple[list[dict[str, Any]], int]:
    supervisor = Supervisor(sockets, hello, lock_fd)
    watching = watch(supervisor) if watch is not None else None
    try:
        return await supervisor.run(on_ready), supervisor.deaths
    finally:
        if watching is not None:
            watching.close()


def _url(bound: socket.socket, options: CaptureOptions) -> str:
    at, number = bound.getsockname()[:2]
    scheme = "https" if options.certificate else "http"
    return f"{scheme}://[{at}]:{number}" if ":" in at else f"{scheme}://{at}:{number}"


def _content_key(options: CaptureOptions) -> bytes:
    """The key of the bodies; none where there are none, or where they lie in the clear."""
    if options.content_key_file is None:
        if options.content == "full":
            say("--content full: bodies are written readable; --content-key-file encrypts them")
        return b""
    if options.content != "full":
        raise UsageError("--content-key-file: encrypts bodies; give --content full as well")
    return load_content_key(options.content_key_file)


def _ready_tape(options: CaptureOptions, upstream: str, content_key: bytes) -> tuple[int, bytes]:
    """(the lock's descriptor, the tape's key) of the tape, new or going on."""
    if options.content == "none":
        key, key_id = secrets.token_bytes(KEY_BYTES), None  # groups callers within this life only
    else:
        key = load_key(options.tape, options.key_file)
        key_id = Privacy(options.content, key).key_id
    given: dict[str, Any] = {
        "upstream": upstream,
        "listen": options.listen,
        "content": options.content,
    }
    if options.keep is not None:
        given["keep"] = options.keep.as_dict()
    if options.session_headers:
        given["session_headers"] = options.session_headers
    lock_fd = make_ready(
        options.tape,
        role="capture",
        command=options.command,
        options=given | {"workers": options.workers},
        facts={"candidate": {"url": upstream, "given": options.facts}, "key_id": key_id}
        | ({} if options.event_sizes else {"event_sizes": False})
        | ({"content_key_id": content_key_id(content_key)} if content_key else {}),
        content=options.content,
        append=True,
    )
    return lock_fd, key


def _deleted(tape: Path) -> int:
    """Rows that limits have deleted so far."""
    return sum(tape_facts.read_facts(tape).get("deleted", {}).values())


def _total(
    options: CaptureOptions, done: list[dict[str, Any]], deaths: int, before: set[str]
) -> CaptureSummary:
    """All lives of all workers: those that ended well told it, the others' tell their segments."""
    total = CaptureSummary()
    told = set(before)
    for one in done:
        total.add(one["seen"], one["rows"], one["events"], one["losses"])
        total.unsealed += one["unsealed"]
        total.lost_reads += one["lost_reads"]
        total.sampled_out += one["sampled_out"]
        total.proxy_errors += one["proxy_errors"]
        told |= set(one["incarnations"])
    if deaths:
        from tokentape.traces.recover import seal_dead

        seal_dead(options.tape, SEAL_TIMEOUT_S)
        _add_dead(total, options, told)
    return total


def _add_dead(total: CaptureSummary, options: CaptureOptions, told: set[str]) -> None:
    from tokentape.traces.reader import open_tape

    tape = open_tape(options.tape)
    for name, seen in tape.facts.get("seen", {}).items():
        if name not in told:
            own = [s for s in tape.segments if s.metadata.get("incarnation", "").startswith(name)]
            losses = tape.facts["losses"].get(name, {})
            total.add(seen, sum(s.rows for s in own), sum(s.events for s in own), losses)
            total.lost_reads += tape.facts.get("lost_reads", {}).get(name, 0)
            total.sampled_out += tape.facts.get("sampled_out", {}).get(name, 0)
