"""Packet captures of cleartext HTTP/1.1: what passed on a wire becomes rows, as a proxy's would.

Files of tcpdump and Wireshark (pcap, pcapng) are read by dpkt, HTTP by h11, bodies and streams by
traces/assemble.py and traces/wire, so a taped and a proxied stream are read alike. Times are the
packets' own: an event came when the packet came that completed it; a piece that was overtaken on
the wire came when the hole before it was filled. Here nothing was in the traffic's path, so
`send_ns` is the arrival of the request's head. pcapng files are read to 1 us, pcap files as they
are. Encrypted, foreign and half-seen connections are counted, never guessed at.
"""

import contextlib
import hashlib
import importlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

from tokentape.traces.assemble import Assembler
from tokentape.traces.clock import Anchor, TapeClock
from tokentape.traces.errors import TapeError, UsageError
from tokentape.traces.importers.exchanges import Exchanges
from tokentape.traces.importers.segments import Flows, Segment
from tokentape.traces.privacy import Privacy, load_key
from tokentape.traces.writer import SEAL_BYTES, TapeWriter

NS_PER_US = 1_000
ETHERNET, LOOPBACK, RAW_IP, LINUX_COOKED, RAW_IP_OLD, LINUX_COOKED_2 = 1, 0, 101, 113, 12, 276


class _Rows:
    """Where the assembler's rows go: to the tape, segment by segment."""

    def __init__(self, writer: TapeWriter) -> None:
        self._writer = writer
        self.written = 0

    def opened(self, stream: int, row: dict[str, Any]) -> None:
        """A file needs no journal."""

    def learned(self, stream: int, columns: dict[str, Any]) -> None:
        """As opened."""

    def left_out(self, stream: int, row: dict[str, Any]) -> None:
        """Never: all rows are kept."""

    def sampled(self, samples: list[tuple[int, int, str, str, str, float]]) -> None:
        """A packet capture has no telemetry."""

    def bodies(self, row: dict[str, Any]) -> None:
        """An import keeps no bodies."""

    def finished(self, stream: int, row: dict[str, Any]) -> None:
        """Keeps a row."""
        self._writer.append(row)
        self.written += 1
        if self._writer.pending_bytes >= SEAL_BYTES:
            self._writer.seal()


def import_packets(
    files: Sequence[Path],
    tape: Path,
    *,
    force: bool = False,
    command: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> tuple[int, dict[str, int]]:
    """Makes a tape of one packet capture; (requests written, requests lost by reason).

    Raises UsageError where dpkt is missing or there is not one file, TapeError for a file that is
    no packet capture or holds no request; there is no new tape then.
    """
    if len(files) != 1:
        raise UsageError(f"pcap: give one file, not {len(files)}; mergecap joins several")
    (path,) = files
    first_ns, packets = _survey(path)
    facts: dict[str, Any] = {
        "content": "structure",
        "source": {
            "format": "pcap",
            "licence": "the user's own capture",
            "wall_epoch_known": True,
            "files": [{"name": path.name, "sha256": _sha256(path), "packets": packets}],
        },
    }
    privacy = Privacy("structure", load_key(tape, None))
    facts["key_id"] = privacy.key_id
    writer = TapeWriter.create(
        tape,
        role="import",
        command=list(command),
        options={"format": "pcap", "files": [str(path)]},
        facts=facts,
        wall_epoch_unix_ns=first_ns,
        force=force,
    )
    try:
        written, counts = _write(path, writer, first_ns, privacy, progress)
        _refuse_empty(path, written, counts)
    except BaseException:
        with contextlib.suppress(OSError):
            writer.close()
        shutil.rmtree(tape, ignore_errors=True)  # half a capture must not pass for the whole
        raise
    facts["source"] |= {"read": written, "written": written, "dropped": {}, **counts}
    writer.close(source=facts["source"])
    return written, counts


def _refuse_empty(path: Path, written: int, counts: dict[str, int]) -> None:
    if not written:
        said = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
        raise TapeError(f"{path}: no HTTP/1.1 request in it ({said})")


def _write(
    path: Path,
    writer: TapeWriter,
    first_ns: int,
    privacy: Privacy,
    progress: Callable[[int], None] | None,
) -> tuple[int, dict[str, int]]:
    clock = TapeClock(first_ns, Anchor(0, 0, 0), "packets")  # stamps are unix ns already
    rows = _Rows(writer)
    assembler = Assembler(clock, privacy, rows)
    exchanges = Exchanges(assembler)
    flows = Flows()
    t_ns = first_ns
    for segment in _segments(path):
        t_ns = segment.t_ns
        for flow, piece in flows.take(segment):
            exchanges.take(flow, piece)
        if progress:
            progress(rows.written)
    assembler.cut(t_ns)
    writer.seal()
    return rows.written, flows.counts() | exchanges.counts()


def _survey(path: Path) -> tuple[int, int]:
    """(unix ns of the first packet, packets); TapeError for a file that cannot be read whole."""
    first_ns, packets = None, 0
    for t_ns, _, _ in _packets(path):
        first_ns = t_ns if first_ns is None else min(first_ns, t_ns)
        packets += 1
    if first_ns is None:
        raise TapeError(f"{path}: no packet in it")
    return first_ns, packets


def _packets(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(unix ns, kind of link, bytes) of every packet."""
    dpkt = _dpkt()
    if not path.is_file():
        raise TapeError(f"{path}: no such file")
    with path.open("rb") as file:
        try:
            reader = dpkt.pcap.UniversalReader(_Whole(file))
            link = reader.datalink()
            for t_s, data in reader:
                yield _unix_ns(t_s), link, data
        except (ValueError, dpkt.Error, EOFError, IndexError, KeyError) as error:
            raise TapeError(f"{path}: not a whole packet capture ({error})") from error


class _Whole:
    """A file that says when it ends within what was asked for; dpkt would take that for its end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.name = file.name

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        if data and len(data) < size:
            raise EOFError("it ends within a packet; cut off?")
        return data

    def seek(self, at: int) -> int:
        return self._file.seek(at)


def _unix_ns(t_s: float | Decimal) -> int:
    if isinstance(t_s, Decimal):  # dpkt has these for captures with ns
        return int(t_s * 10**9)
    return round(t_s * 10**6) * NS_PER_US


def _segments(path: Path) -> Iterator[Segment]:
    """The TCP segments of a capture, in its order."""
    dpkt = _dpkt()
    for t_ns, link, data in _packets(path):
        try:
            ip = _network(dpkt, link, data)
            tcp = ip.data if ip is not None else None
            if isinstance(tcp, dpkt.tcp.TCP):
                yield Segment(
                    t_ns,
                    (bytes(ip.src), tcp.sport),
                    (bytes(ip.dst), tcp.dport),
                    tcp.seq,
                    tcp.flags,
                    bytes(tcp.data),
                )
        except (dpkt.Error, IndexError, AttributeError, ValueError):
            continue  # a packet of something else, or a damaged one: TCP sends it again


def _network(dpkt: Any, link: int, data: bytes) -> Any:
    """The IP packet in a frame, or None."""
    if link == ETHERNET:
        inner = dpkt.ethernet.Ethernet(data).data
    elif link == LINUX_COOKED:
        inner = dpkt.sll.SLL(data).data
    elif link == LINUX_COOKED_2:
        inner = dpkt.sll2.SLL2(data).data
    elif link == LOOPBACK:
        inner = dpkt.loopback.Loopback(data).data
    elif link in {RAW_IP, RAW_IP_OLD}:
        inner = dpkt.ip6.IP6(data) if data[:1] and data[0] >> 4 == 6 else dpkt.ip.IP(data)
    else:
        return None
    return inner if isinstance(inner, dpkt.ip.IP | dpkt.ip6.IP6) else None


def _dpkt() -> Any:
    try:
        return importlib.import_module("dpkt")
    except ImportError:
        raise UsageError("import pcap: needs dpkt; pip install 'tokentape[pcap]'") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
