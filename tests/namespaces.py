"""Two network namespaces with a wire between them, for tests of what the kernel redirects."""

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HOST, OUTSIDE = "10.77.0.1", "10.77.0.2"
SOMEONE_ELSE = 12345  # a uid that the proxy does not have


@dataclass(frozen=True)
class Network:
    """A host with a server on it, and the outside from which clients come."""

    host: Path
    outside: Path


def nft_program() -> str | None:
    return shutil.which("nft") or shutil.which("nft", path="/usr/sbin:/sbin")


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """The two namespaces; skips where they cannot be made."""
    if os.geteuid():
        pytest.skip("needs root for network namespaces; try: unshare -rn ./run test FILE")
    if nft_program() is None:
        pytest.skip("nft is not installed; .ci/run installs it")
    names = [f"tt-host-{os.getpid()}", f"tt-out-{os.getpid()}"]
    with contextlib.ExitStack() as undo:
        for name in names:
            made = subprocess.run(
                ["ip", "netns", "add", name], capture_output=True, text=True, check=False
            )
            if made.returncode:
                pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
            undo.callback(subprocess.run, ["ip", "netns", "del", name], check=True)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", names[0], "link", "add", "in0", "type", "veth", "peer", "out0", "netns", names[1])
        for name, device, address in zip(names, ("in0", "out0"), (HOST, OUTSIDE), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
        yield Network(*(Path("/run/netns", name) for name in names))


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def inside(namespace: Path) -> Iterator[None]:
    """Sockets and processes that this thread makes meanwhile belong to the namespace."""
    with Path("/proc/thread-self/ns/net").open() as home, namespace.open() as there:
        os.setns(there.fileno(), os.CLONE_NEWNET)
        try:
            yield
        finally:
            os.setns(home.fileno(), os.CLONE_NEWNET)


@contextlib.contextmanager
def someone_else() -> Iterator[None]:
    """Sockets that this thread makes meanwhile belong to another user."""
    libc = ctypes.CDLL(None)
    libc.setfsuid(SOMEONE_ELSE)
    try:
        yield
    finally:
        libc.setfsuid(os.geteuid())
