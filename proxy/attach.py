"""Transparent mode: a watchdog that keeps clients going through the proxy while that serves them.

It probes through the proxy and renews the kernel's lease on the redirect after each good round. A
probe that fails, a proxy that is gone, `detach` or a signal ends the redirect at once; when the
watchdog itself is gone or stopped, the kernel ends it with the lease. Open connections are never
touched, in either direction.
"""

import contextlib
import http.client
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokentape.proxy import redirect
from tokentape.proxy.redirect import Redirect
from tokentape.traces.errors import TokentapeError, UsageError

PROBE_EVERY_S = 0.5
PROBE_TIMEOUT_S = 1.0
BAD_ROUNDS = 2  # in a row, of a proxy that listens and does not answer
MOST_PROBES = 8  # in a round: the kernel spreads them over the workers
UNREACHED = (502, 504)  # of a proxy that does not reach its upstream
MIN_LEASE_S = BAD_ROUNDS * (PROBE_EVERY_S + PROBE_TIMEOUT_S)
_LOOPBACK = {"ipv4": "127.0.0.1", "ipv6": "::1"}
_LISTENING = "0A"


@dataclass(frozen=True)
class AttachOptions:
    """Clients of `port` on this host shall go to the proxy that listens on port `to`."""

    port: int
    to: int
    lease_s: float = 5.0
    probe: str = "/health"
    for_s: float | None = None  # no longer than this


@dataclass(frozen=True)
class Listener:
    """A listening TCP socket of this host: where (any, loopback or else), and whose."""

    family: str
    where: str
    uid: int


class NoAnswerError(Exception):
    """A probe failed; `gone` when nobody listens any more."""

    def __init__(self, why: str, *, gone: bool = False) -> None:
        super().__init__(why)
        self.gone = gone


def attach(options: AttachOptions, on_ready: Callable[[str], None]) -> str:
    """Redirect until a signal, `detach` or the end of `for_s`; says which.

    `on_ready` gets who is redirected. UsageError for a proxy that clients cannot be sent to,
    TokentapeError when the proxy fails: the redirect has ended by then.
    """
    _check(options)
    wanted, workers = found_proxy(options)
    stop = threading.Event()
    with _signals(stop):
        for _ in range(workers):
            _probe_or_fail(options)
        redirect.take(wanted, _lease_ms(options))
        try:
            on_ready(_who(wanted))
            return _watch(options, wanted, workers, stop)
        finally:
            redirect.let_go(options.port)


def _watch(options: AttachOptions, wanted: Redirect, workers: int, stop: threading.Event) -> str:
    began_s = renewed_s = time.monotonic()
    bad = 0
    while not stop.wait(PROBE_EVERY_S):
        if options.for_s is not None and time.monotonic() - began_s >= options.for_s:
            return "its time is over"
        try:
            for _ in range(workers):
                probe(options.to, options.probe)
        except NoAnswerError as why:
            bad += 1
            if why.gone or bad >= BAD_ROUNDS:
                redirect.let_go(options.port)
                raise TokentapeError(
                    f"attach: {why}; port {options.port} goes direct again"
                ) from None
            continue
        bad = 0
        if redirect.renew(wanted, _lease_ms(options)):
            renewed_s = time.monotonic()
        elif time.monotonic() - renewed_s < options.lease_s:
            return "detached by someone else"
        else:  # we were stopped for longer than the lease; the proxy has just answered
            redirect.take(wanted, _lease_ms(options))
            renewed_s = time.monotonic()
    return "told to stop"


def detach(port: int | None = None) -> list[int]:
    """End the redirects of a port, or all; the ports that had one. Their watchdogs leave."""
    ports = list(redirect.redirected()) if port is None else [port]
    return [at for at in ports if redirect.let_go(at)]


def probe(port: int, path: str, timeout_s: float = PROBE_TIMEOUT_S) -> int:
    """The status of a GET through the proxy; NoAnswerError where none comes, or a 502."""
    connection = http.client.HTTPConnection("localhost", port, timeout=timeout_s)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        status = connection.getresponse().status
    except ConnectionRefusedError:
        raise NoAnswerError(f"nobody listens on port {port}", gone=True) from None
    except (OSError, http.client.HTTPException) as error:
        why = str(error) or type(error).__name__
        raise NoAnswerError(f"no answer through the proxy on port {port} ({why})") from None
    finally:
        connection.close()
    if status in UNREACHED:
        raise NoAnswerError(f"the proxy on port {port} does not reach its upstream ({status})")
    return status


def found_proxy(options: AttachOptions) -> tuple[Redirect, int]:
    """(the redirect to the proxy that listens, how many of its workers to probe).

    Others' clients are redirected only to a proxy that listens on every address.
    """
    listeners = [one for one in _listeners(options.to) if one.where != "else"]
    if not listeners:
        elsewhere = any(_listeners(options.to))
        raise UsageError(
            f"--to {options.to}: nobody listens on that port"
            + (" at loopback or every address, where redirected clients arrive" * elsewhere)
            + "; start tokentape capture with --listen first"
        )
    uids = {one.uid for one in listeners}
    if len(uids) > 1:
        raise UsageError(f"--to {options.to}: several users listen on that port; choose another")
    local = tuple(f for f in _LOOPBACK if _answers(f, options.to))
    wide = {one.family for one in listeners if one.where == "any"}
    if "ipv6" in wide:  # such a socket takes both, unless told otherwise
        wide.add("ipv4")
    remote = tuple(f for f in local if f in wide)
    workers = min(sum(one.family == listeners[0].family for one in listeners), MOST_PROBES)
    return Redirect(options.port, options.to, local, remote, uids.pop()), workers


def _check(options: AttachOptions) -> None:
    if options.port == options.to:
        raise UsageError(f"--to {options.to}: is the port that clients use; name the proxy's")
    if options.lease_s < MIN_LEASE_S:
        raise UsageError(
            f"--lease {options.lease_s:g}s: need {MIN_LEASE_S:g}s at least, as a bad proxy takes "
            "that long to be found"
        )
    if options.port in redirect.redirected():
        raise UsageError(
            f"--port {options.port}: is attached already; tokentape detach --port {options.port} "
            "ends that, or it ends with its lease"
        )


def _probe_or_fail(options: AttachOptions) -> None:
    try:
        probe(options.to, options.probe)
    except NoAnswerError as why:
        raise TokentapeError(f"attach: {why}; nothing was redirected") from None


def _lease_ms(options: AttachOptions) -> int:
    return int(options.lease_s * 1000)


def _who(wanted: Redirect) -> str:
    others = "every client" if wanted.remote else "clients of this host only"
    return f"{others}, but processes of uid {wanted.own_uid} on it ({', '.join(wanted.local)})"


def _answers(family: str, port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((_LOOPBACK[family], port), timeout=1).close()
        return True
    return False


def _listeners(port: int) -> list[Listener]:
    """Who listens on a TCP port of this network namespace."""
    found = []
    for family, file in (("ipv4", "tcp"), ("ipv6", "tcp6")):
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/net", file).read_text().splitlines()[1:]:
                fields = line.split()
                address, _, number = fields[1].rpartition(":")
                if fields[3] == _LISTENING and int(number, 16) == port:
                    found.append(Listener(family, _where(address), int(fields[7])))
    return found


def _where(address: str) -> str:
    """Of an address as /proc/net/tcp writes it: words of four bytes, each in the host's order."""
    if not address.strip("0"):
        return "any"
    loopback = ("0100007F", "7F000001", "0" * 24 + "01000000", "0" * 31 + "1")
    return "loopback" if address in loopback else "else"


@contextlib.contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    before = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
