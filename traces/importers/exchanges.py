"""The HTTP/1.1 exchanges of a connection's bytes, handed to the assembler as a proxy would.

h11 reads each side. Its objects live for one exchange: what lies behind it begins the next. A
connection that is no HTTP/1.1 (TLS, HTTP/2, anything else) is counted and left alone.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import h11
import msgspec

from tokentape.traces import blocks
from tokentape.traces.assemble import Assembler
from tokentape.traces.importers.segments import Flow, Piece

MOST_HEAD_BYTES = 256 << 10
_encode = msgspec.msgpack.encode


@dataclass
class _Exchange:
    """A request on its way, and the reader of its reply."""

    stream: int
    reply: h11.Connection
    status: int = 0


@dataclass
class _Reading:
    """One connection: its client's side, and the exchanges that wait for a reply, in order."""

    number: int
    request: h11.Connection
    waiting: deque[_Exchange] = field(default_factory=deque)
    current: _Exchange | None = None
    requests: int = 0
    foreign: bool = False


class Exchanges:
    """Feeds an assembler from the pieces of any number of connections."""

    def __init__(self, assembler: Assembler) -> None:
        self._assembler = assembler
        self._readings: dict[Flow, _Reading] = {}
        self._streams = 0
        self.foreign = 0

    def take(self, flow: Flow, piece: Piece) -> None:
        """One side's next bytes, or its end."""
        reading = self._readings.get(flow)
        if reading is None:
            reading = self._readings[flow] = _Reading(flow.number, _requests())
        if piece.reset:
            self._end(
                reading, piece.t_ns, "client_abort" if piece.from_client else "upstream_abort"
            )
            self._readings.pop(flow, None)
        elif not reading.foreign:
            try:
                self._client(reading, piece) if piece.from_client else self._server(reading, piece)
            except h11.ProtocolError:
                reading.foreign = True
                self.foreign += 1
                self._end(reading, piece.t_ns, "upstream_abort")
        if piece.closed and not piece.from_client and flow in self._readings:
            self._end(reading, piece.t_ns, "upstream_abort")

    def counts(self) -> dict[str, int]:
        """What there was, for the tape's facts."""
        return {"connections_without_http": self.foreign}

    def _client(self, reading: _Reading, piece: Piece) -> None:
        if piece.data:
            reading.request.receive_data(piece.data)
        while True:
            event = reading.request.next_event()
            if isinstance(event, h11.Request):
                self._open(reading, piece.t_ns, event)
            elif isinstance(event, h11.Data) and reading.current is not None:
                self._put(blocks.REQUEST_BODY, reading.current, piece.t_ns, bytes(event.data))
            elif isinstance(event, h11.EndOfMessage) and reading.current is not None:
                for column in (b"request_end_ns", b"send_end_ns"):
                    self._put(blocks.MARK, reading.current, piece.t_ns, column)
                rest, _ = reading.request.trailing_data
                reading.request = _requests()
                reading.current = None
                if rest:
                    reading.request.receive_data(rest)
            else:
                return

    def _open(self, reading: _Reading, t_ns: int, event: h11.Request) -> None:
        self._streams += 1
        headers = [(bytes(name), bytes(value)) for name, value in event.headers]
        row = {
            "worker": "pcap",
            "conn_id": reading.number,
            "upstream_reused": reading.requests > 0,
            "arrival_clock": "kernel",
            "send_clock": "kernel",
        }
        reply = h11.Connection(h11.CLIENT, max_incomplete_event_size=MOST_HEAD_BYTES)
        reply.send(event)  # how a reply's body ends depends on the method
        reading.current = _Exchange(self._streams, reply)
        reading.waiting.append(reading.current)
        reading.requests += 1
        head = (bytes(event.method), bytes(event.target), headers)
        self._put(blocks.OPEN, reading.current, t_ns, _encode([row, head]))
        self._put(blocks.MARK, reading.current, t_ns, b"send_ns")

    def _server(self, reading: _Reading, piece: Piece) -> None:
        rest = piece.data
        while reading.waiting:
            exchange = reading.waiting[0]
            if rest:
                exchange.reply.receive_data(rest)
            if piece.closed:
                exchange.reply.receive_data(b"")
            rest = self._reply(exchange, piece.t_ns)
            if exchange.reply.their_state is not h11.DONE:
                return
            reading.waiting.popleft()
            if not rest:
                return

    def _reply(self, exchange: _Exchange, t_ns: int) -> bytes:
        """Reads what there is; the bytes behind the end of the reply."""
        while True:
            event = exchange.reply.next_event()
            if isinstance(event, h11.Response):
                exchange.status = event.status_code
                headers = [(bytes(name), bytes(value)) for name, value in event.headers]
                self._put(blocks.REPLY_HEAD, exchange, t_ns, _encode([exchange.status, headers]))
            elif isinstance(event, h11.Data):
                self._put(blocks.REPLY_DATA, exchange, t_ns, bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                outcome = "http_error" if exchange.status >= 400 else "ok"
                self._close(exchange, t_ns, outcome)
                return bytes(exchange.reply.trailing_data[0])
            elif not isinstance(event, h11.InformationalResponse):
                return b""

    def _end(self, reading: _Reading, t_ns: int, outcome: str) -> None:
        """The connection is over: what has no whole reply broke off."""
        for exchange in reading.waiting:
            self._close(exchange, t_ns, outcome)
        reading.waiting.clear()
        reading.current = None

    def _close(self, exchange: _Exchange, t_ns: int, outcome: str) -> None:
        columns: dict[str, Any] = {"outcome": outcome}
        if exchange.status:
            columns["origin"] = "upstream"
        self._put(blocks.CLOSE, exchange, t_ns, _encode(columns))

    def _put(self, kind: int, exchange: _Exchange, t_ns: int, payload: bytes) -> None:
        record = blocks.RECORD.pack(kind, exchange.stream, t_ns, 0, len(payload))
        self._assembler.take(memoryview(record + payload))


def _requests() -> h11.Connection:
    return h11.Connection(h11.SERVER, max_incomplete_event_size=MOST_HEAD_BYTES)
