"""What a capture is asked for, checked before anything is started."""

import ssl
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tokentape.traces.errors import UsageError
from tokentape.traces.keep import Keep
from tokentape.traces.sampler import Sources
from tokentape.traces.words import Mode


@dataclass(frozen=True)
class CaptureOptions:
    """What the command line asks for; `listen` is HOST:PORT, port 0 for any."""

    upstream: str
    tape: Path
    listen: str = "127.0.0.1:8080"
    content: Mode = "structure"
    key_file: Path | None = None
    content_key_file: Path | None = None  # bodies of the mode full are encrypted with its key
    facts: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    drain_s: float = 30.0
    workers: int = 1  # processes that share the port
    event_sizes: bool = True  # tokens of each event; False: only their sum
    fsync: bool = False  # the journal survives a power cut, not only a kill
    http2: bool = False  # on the listening side, where TLS offers it
    certificate: Path | None = None  # PEM with key and chain: the listening side speaks TLS
    upstream_ca: Path | None = None  # PEM of who signed the upstream's certificate
    metrics: str | None = None  # HOST:PORT of /metrics and /healthz
    keep: Keep | None = None  # which finished requests get a row; None: all
    retain_s: float | None = None  # how long what is sealed stays; None: for ever
    max_disk_bytes: int | None = None  # how much of it
    session_headers: tuple[str, ...] = ()  # beside the known ones, in lower case
    telemetry: Sources = field(default_factory=Sources)  # the supervisor's; workers get none


BACKLOG = 4096  # stock: 100, which refuses bursts of new connections
_PATHS = ("tape", "key_file", "content_key_file", "certificate", "upstream_ca")


def to_json(options: CaptureOptions, upstream: str) -> dict[str, Any]:
    """Options for another process, with the checked upstream."""
    plain = {n: str(v) if isinstance(v, Path) else v for n, v in asdict(options).items()}
    del plain["telemetry"]
    return plain | {"upstream": upstream}


def from_json(plain: dict[str, Any]) -> CaptureOptions:
    """The inverse of to_json."""
    paths = {n: Path(plain[n]) for n in _PATHS if plain[n] is not None}
    keep = Keep(**plain["keep"]) if plain["keep"] is not None else None
    headers = tuple(plain["session_headers"])
    return CaptureOptions(**(plain | paths | {"keep": keep, "session_headers": headers}))


def checked_upstream(url: str) -> str:
    """`scheme://host:port` of an upstream; UsageError says what is wrong with anything else."""
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:  # not to be repeated
        raise UsageError("--upstream: leave user and password out; clients send their own keys")
    if parts.scheme not in ("http", "https"):
        raise UsageError(f"--upstream {url}: need http://HOST:PORT or https://HOST:PORT")
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except ValueError:
        raise UsageError(f"--upstream {url}: the port is no number below 65536") from None
    if not parts.hostname:
        raise UsageError(f"--upstream {url}: no host; need http://HOST:PORT")
    if parts.path.strip("/") or parts.query:
        raise UsageError(f"--upstream {url}: give scheme, host and port only; clients keep paths")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{port}"


def checked_listen(listen: str, option: str = "--listen") -> tuple[str, int]:
    """(host, port) of HOST:PORT; UsageError otherwise."""
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"{option} {listen}: need HOST:PORT, such as 127.0.0.1:8080")
    return host.strip("[]"), int(port)


def check_tls(options: CaptureOptions) -> None:
    """UsageError for TLS files that cannot be used."""
    if options.http2 and options.certificate is None:
        raise UsageError("--http2: is agreed on within TLS; give --cert as well")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for name, path, load in (
        (
            "--cert",
            options.certificate,
            lambda p: context.load_cert_chain(p, password=_no_password),
        ),
        ("--upstream-ca", options.upstream_ca, context.load_verify_locations),
    ):
        if path is None:
            continue
        try:
            load(path)
        except ssl.SSLError as error:
            what = "a private key and its chain" if name == "--cert" else "certificates"
            reason = error.reason or error
            raise UsageError(f"{name} {path}: need a PEM file with {what} ({reason})") from None
        except OSError as error:
            raise UsageError(f"{name} {path}: {error.strerror}") from None


def _no_password() -> str:
    raise UsageError("--cert: the private key is encrypted; give one that is not")
