"""TCP segments to the bytes that each side of a connection sent, in order. Pure: no file, no clock.

Retransmissions and overlaps are cut off, overtaken segments wait for the hole before them; where
the capture missed a segment for good, the connection is given up and counted, not patched.
A client is who sent the first SYN, or the first request where the capture began later.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
MOST_WAITING_BYTES = 4 << 20  # behind a hole; a window is rarely larger
METHODS = (b"GET ", b"POST ", b"PUT ", b"HEAD ", b"DELETE ", b"OPTIONS ", b"PATCH ")
_HALF, _WHOLE = 1 << 31, 1 << 32

Address = tuple[bytes, int]


@dataclass(frozen=True)
class Segment:
    """One segment as it was seen."""

    t_ns: int
    source: Address
    target: Address
    seq: int
    flags: int
    data: bytes


@dataclass(frozen=True)
class Piece:
    """What a side said next: bytes, or its end (`closed`), or that it broke off (`reset`)."""

    t_ns: int
    from_client: bool
    data: bytes = b""
    closed: bool = False
    reset: bool = False


@dataclass
class Side:
    """One direction: the number of the next byte, and what came after a hole."""

    next_seq: int | None = None
    waiting: dict[int, bytes] = field(default_factory=dict)
    fin_seq: int | None = None

    def take(self, segment: Segment) -> bytes | None:
        """The bytes that are readable now; None where the hole grew past its bound."""
        if segment.flags & SYN:
            self.next_seq = (segment.seq + 1) % _WHOLE
            return b""
        if self.next_seq is None:
            self.next_seq = segment.seq
        if segment.flags & FIN:
            self.fin_seq = (segment.seq + len(segment.data)) % _WHOLE
        if segment.data and len(segment.data) > len(self.waiting.get(segment.seq, b"")):
            self.waiting[segment.seq] = segment.data
        ready = self._ready()
        if sum(map(len, self.waiting.values())) > MOST_WAITING_BYTES:
            return None
        return ready

    def _ready(self) -> bytes:
        parts = []
        while self.waiting:
            seq = min(self.waiting, key=self._ahead)
            ahead = self._ahead(seq)
            if ahead > 0:
                break
            data = self.waiting.pop(seq)[-ahead:]
            if data:
                parts.append(data)
                self.next_seq = (self._at + len(data)) % _WHOLE
        return b"".join(parts)

    @property
    def _at(self) -> int:
        assert self.next_seq is not None
        return self.next_seq

    def _ahead(self, seq: int) -> int:
        """How far a number lies after the next one, negative before it, across the wrap."""
        return (seq - self._at + _HALF) % _WHOLE - _HALF

    @property
    def ended(self) -> bool:
        """True when all up to its FIN was read."""
        return self.fin_seq is not None and self._ahead(self.fin_seq) <= 0


@dataclass(eq=False)
class Flow:
    """One connection."""

    number: int
    client: Address | None
    client_side: Side = field(default_factory=Side)
    server_side: Side = field(default_factory=Side)
    given_up: bool = False
    client_closed: bool = False
    server_closed: bool = False


class Flows:
    """All connections of a capture; an address pair that opens anew is a connection of its own."""

    def __init__(self) -> None:
        self._flows: dict[frozenset[Address], Flow] = {}
        self.connections = 0
        self.missed = 0

    def take(self, segment: Segment) -> Iterator[tuple[Flow, Piece]]:
        """What a segment makes readable."""
        key = frozenset((segment.source, segment.target))
        flow = self._flows.get(key)
        opens = segment.flags & SYN and not segment.flags & ACK
        if flow is None or (opens and flow.client_side.next_seq != (segment.seq + 1) % _WHOLE):
            if flow is not None and not flow.given_up:
                yield flow, Piece(segment.t_ns, from_client=True, reset=True)
            flow = self._begin(key, segment, bool(opens))
        if flow is None or flow.given_up:
            return
        from_client = segment.source == flow.client
        if segment.flags & RST:
            yield flow, Piece(segment.t_ns, from_client, reset=True)
            del self._flows[key]
            return
        side = flow.client_side if from_client else flow.server_side
        data = side.take(segment)
        if data is None:
            self.missed += 1
            flow.given_up = True
            yield flow, Piece(segment.t_ns, from_client, reset=True)
            return
        closed = side.ended and not (flow.client_closed if from_client else flow.server_closed)
        if closed and from_client:
            flow.client_closed = True
        elif closed:
            flow.server_closed = True
        if data or closed:
            yield flow, Piece(segment.t_ns, from_client, data, closed=closed)
        if flow.client_closed and flow.server_closed:
            del self._flows[key]

    def _begin(self, key: frozenset[Address], segment: Segment, opens: bool) -> Flow | None:
        """A connection whose client is known; before that its segments tell nothing."""
        answered = segment.flags & SYN and segment.flags & ACK
        if answered:
            client: Address | None = segment.target
        elif opens or segment.data.startswith(METHODS):
            client = segment.source
        else:
            return None
        self.connections += 1
        flow = self._flows[key] = Flow(self.connections, client)
        return flow

    def counts(self) -> dict[str, int]:
        """What there was, for the tape's facts."""
        holes = sum(
            bool(flow.client_side.waiting or flow.server_side.waiting)
            for flow in self._flows.values()
            if not flow.given_up
        )
        missed = self.missed + holes
        return {"connections": self.connections, "connections_with_missed_packets": missed}
