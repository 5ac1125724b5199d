"""The kernel's part of transparent mode: connections to a port go to the proxy, on a lease.

What redirects is an element of an nftables map that the kernel itself drops when its time is over,
so a redirect whose owner is gone ends by itself: nobody has to find it. The table, its maps and
chains stay and do nothing: the kernel stops translating open connections with the last nat chain,
and they would be cut.
"""

import json
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from tokentape.traces.errors import TokentapeError

TABLE = "inet tokentape"
OWN_LEASES = 2  # what keeps the proxy from itself outlives what sends others to it
# Only a SYN: when the first nat chain appears, the kernel meets connections that are long under way
# as new ones, and a redirect would cut them. Only to this host: what it routes is not ours.
_RULES = f"""
table {TABLE} {{
  map from_local {{ typeof meta nfproto . tcp dport : tcp dport; flags timeout; }}
  map from_remote {{ typeof meta nfproto . tcp dport : tcp dport; flags timeout; }}
  set own {{ typeof meta skuid . tcp dport; flags timeout; }}
  chain remote {{ type nat hook prerouting priority dstnat - 10; policy accept; }}
  chain local {{ type nat hook output priority -110; policy accept; }}
}}
flush chain {TABLE} remote
flush chain {TABLE} local
add rule {TABLE} remote fib daddr type local tcp flags & (fin|syn|rst|ack) == syn \
  redirect to :meta nfproto . tcp dport map @from_remote
add rule {TABLE} local meta skuid . tcp dport @own return
add rule {TABLE} local fib daddr type local tcp flags & (fin|syn|rst|ack) == syn \
  redirect to :meta nfproto . tcp dport map @from_local
"""
_LIST = '{"nftables": [{"list": {"table": {"family": "inet", "name": "tokentape"}}}]}'


@dataclass(frozen=True)
class Redirect:
    """New connections to `port` go to `to`; families are ipv4, ipv6.

    `local` are those of this host's clients, `remote` those of others'. Connections of `own_uid`
    from this host are left alone, since the proxy's own must reach the server.
    """

    port: int
    to: int
    local: tuple[str, ...]
    remote: tuple[str, ...]
    own_uid: int

    def elements(self, lease_ms: int) -> Iterable[tuple[str, str, str]]:
        """(map or set, key, value with its time) of each element."""
        yield "own", f"{self.own_uid} . {self.port}", f"timeout {OWN_LEASES * lease_ms}ms"
        for name, families in (("from_local", self.local), ("from_remote", self.remote)):
            for family in families:
                yield name, f"{family} . {self.port}", f"timeout {lease_ms}ms : {self.to}"


def take(redirect: Redirect, lease_ms: int) -> None:
    """Make the redirect, for `lease_ms`; TokentapeError says what nft misses."""
    added = [
        f"add element {TABLE} {m} {{ {key} {v} }}" for m, key, v in redirect.elements(lease_ms)
    ]
    _nft("\n".join([_RULES, *added]))


def renew(redirect: Redirect, lease_ms: int) -> bool:
    """Lengthen the lease; False where the redirect is there no longer.

    One transaction, since a kernel before 6.13 changes no timeout in place: no connection finds the
    map without the element.
    """
    lines = []
    for name, key, value in redirect.elements(lease_ms):
        lines.append(f"delete element {TABLE} {name} {{ {key} }}")
        lines.append(f"add element {TABLE} {name} {{ {key} {value} }}")
    return _nft("\n".join(lines), absent_ok=True) is not None


def let_go(port: int) -> bool:
    """End every redirect of a port: new connections go direct, open ones stay as they are.

    False when there was none.
    """
    gone = [
        f"delete element {TABLE} {name} {{ {family} . {port} }}"
        for name, family, at, _ in _elements()
        if at == port
    ]
    return bool(gone) and _nft("\n".join(gone), absent_ok=True) is not None


def redirected() -> dict[int, int]:
    """port: where its new connections go now."""
    return {port: to for _, _, port, to in _elements()}


def _elements() -> list[tuple[str, str, int, int]]:
    """(map, family, port, to) of each element in force."""
    said = _nft(_LIST, "-j", absent_ok=True)
    found = []
    for item in json.loads(said)["nftables"] if said else []:
        for key, to in item.get("map", {}).get("elem", []):
            family, port = key["elem"]["val"]["concat"]
            found.append((item["map"]["name"], family, port, to))
    return found


def _nft(script: str, *options: str, absent_ok: bool = False) -> str | None:
    """What nft prints; None where something named is absent and may be."""
    program = shutil.which("nft") or shutil.which("nft", path="/usr/sbin:/sbin")
    if program is None:
        raise TokentapeError("attach: no nft here; install nftables (apt-get install nftables)")
    done = subprocess.run(
        [program, *options, "-f", "-"], input=script, capture_output=True, text=True, check=False
    )
    if not done.returncode:
        return done.stdout
    if absent_ok and "No such file or directory" in done.stderr:
        return None
    if "Operation not permitted" in done.stderr:
        raise TokentapeError(
            "attach: the kernel's rules are root's; run it as root (CAP_NET_ADMIN)"
        )
    raise TokentapeError(f"attach: nft refuses: {done.stderr.strip().partition(chr(10))[0]}")
