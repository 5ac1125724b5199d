"""Raw records in, rows out: one state per open request, driven by blocks of records.

Runs in the writer process. Bodies are held only until they are parsed; what goes to the journal and
to the rows has passed the privacy mode. It never raises on what a client or a server sent.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import msgspec
import numpy as np

from tokentape.traces import blocks
from tokentape.traces.blocks import MAX_BODY_BYTES
from tokentape.traces.chunked import ChunkDecoder
from tokentape.traces.clock import TapeClock
from tokentape.traces.content import Bodies, Keeper
from tokentape.traces.event_lists import mark_early, stream_columns
from tokentape.traces.identity import request_id
from tokentape.traces.keep import UNTIL_ITS_END, Keep
from tokentape.traces.open_request import OpenRequest, State, Unfinished
from tokentape.traces.privacy import Privacy
from tokentape.traces.retry_after import retry_after_s
from tokentape.traces.schema import INSTANTS, INTEGER_BOUNDS, allowed
from tokentape.traces.turns import Turns
from tokentape.traces.wire import Reply, ReplyParser, head_columns, read_request, wire_format
from tokentape.traces.wire.encoding import CODINGS, coding_of, decoded
from tokentape.traces.wire.reply import StreamParser

MAX_EVENTS = 1 << 20  # of one request, those beyond are counted: 5 hours at 50 tokens a second
MAX_BODIES_BYTES = 256 << 20  # of all requests together that wait to be parsed
CREDENTIALS = (b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key")
MAX_ENDPOINT_CHARS = 256
METHODS = (b"GET", b"HEAD", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"CONNECT", b"TRACE")
# Columns that this process made itself, which a row keeps whatever else was wrong with it.
_ALWAYS_SOUND = frozenset(
    {"request_id", "arrival_ns", "send_ns", "host", "worker", "outcome", "parse_status", "end_ns"}
    | UNTIL_ITS_END.keys()
)
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_REPLY = (blocks.REPLY_CHUNKED, blocks.REPLY_DATA)
_decode = msgspec.msgpack.Decoder().decode


class Sink(Protocol):
    """Where an assembler's results go."""

    def opened(self, stream: int, row: dict[str, Any]) -> None:
        """A request was opened; `row` is what is known."""

    def learned(self, stream: int, columns: dict[str, Any]) -> None:
        """More columns of an open request."""

    def finished(self, stream: int, row: dict[str, Any]) -> None:
        """A request's final row."""

    def left_out(self, stream: int, row: dict[str, Any]) -> None:
        """A request has ended whose row is not kept, by intent."""

    def bodies(self, row: dict[str, Any]) -> None:
        """The bodies of a request that is about to be finished, a row of `content.CONTENT`."""

    def sampled(self, samples: list[tuple[int, int, str, str, str, float]]) -> None:
        """Telemetry samples, in tape time."""


class Assembler:
    """Turns blocks into rows. `seen` counts requests opened, `open` holds those that still run."""

    def __init__(
        self,
        clock: TapeClock,
        privacy: Privacy,
        sink: Sink,
        keep: Keep | None = None,
        session_headers: Iterable[bytes] = (),
    ) -> None:
        self._clock = clock
        self._privacy = privacy
        self._sink = sink
        self._allowed = allowed(privacy.mode)
        self.open: dict[int, OpenRequest] = {}
        self.seen = 0
        self.reads = 0  # pieces of replies
        self.lost_reads = 0  # of requests that another writer had, or whose row is closed
        self._bodies_bytes = 0
        self.sampled_out = 0
        self._keep = keep  # None: every row
        self._turns = Turns(privacy, session_headers)
        self._keeps_bodies = privacy.mode == "full"
        self._keeper = Keeper()

    def take(self, block: memoryview) -> None:
        """Read every record of a block."""
        at, end = 0, len(block)
        unpack, size = blocks.RECORD.unpack_from, blocks.RECORD.size
        while at < end:
            kind, stream, t_ns, lag_us, length = unpack(block, at)
            at += size
            payload = bytes(block[at : at + length])
            at += length
            try:
                if kind in _REPLY:
                    self.reads += 1
                    self._reply_data(kind, stream, t_ns, lag_us, payload)
                else:
                    self._control(kind, stream, t_ns, payload)
                    self._late(kind, stream, lag_us)
            except Exception:  # noqa: BLE001 - one odd request must not end the recording of others
                self._spoil(kind, stream, t_ns)

    def _control(self, kind: int, stream: int, t_ns: int, payload: bytes) -> None:
        if kind == blocks.OPEN:
            self._open(stream, t_ns, payload)
        elif kind == blocks.TELEMETRY:
            self._telemetry(t_ns, payload)
        elif (request := self.open.get(stream)) is None:
            return
        elif kind == blocks.GAP:
            self._gap(request)
        elif kind == blocks.REQUEST_BODY:
            self._request_body(request, payload)
        elif kind == blocks.MARK:
            self._mark(stream, request, t_ns, payload.decode())
        elif kind == blocks.REPLY_HEAD:
            self._reply_head(stream, request, t_ns, payload)
        elif kind == blocks.CLOSE:
            self._close(stream, request, t_ns, _decode(payload))
        else:
            self._unkept(kind, request, blocks.LENGTH.unpack(payload)[0])

    def _unkept(self, kind: int, request: OpenRequest, size: int) -> None:
        """Body bytes that passed, and that nobody will read."""
        if kind == blocks.UNKEPT_REPLY:
            request.reply_bytes += size
            if request.bodies is not None:
                request.bodies.holes.add("response")
        else:
            request.body_bytes += size
            self._give_up_body(request)

    def _late(self, kind: int, stream: int, lag_us: int) -> None:
        """Keep the longest time that a read of this request waited for the process."""
        request = self.open.get(stream)
        if request is not None and lag_us != blocks.NO_STAMP and lag_us > request.lag_max_us:
            request.lag_max_us = lag_us
        elif request is not None and kind == blocks.REPLY_HEAD and lag_us == blocks.NO_STAMP:
            request.stamps_missing = True

    def _give_up_body(self, request: OpenRequest) -> None:
        """The body will not be parsed; its bytes still count."""
        if request.body is not None:
            self._bodies_bytes -= len(request.body)
            if request.bodies is not None:
                self._keeper.request(request.bodies, request.body)
            request.body = None
            request.row["parse_status"] = "partial"

    def _spoil(self, kind: int, stream: int, t_ns: int) -> None:
        """A record could not be read: its request goes on with bytes and times only."""
        request = self.open.get(stream)
        if request is None:
            return
        self._give_up_body(request)
        request.parser = None
        request.row["parse_status"] = "error"
        if kind == blocks.CLOSE:
            kept = {n: v for n, v in request.row.items() if n in _ALWAYS_SOUND}
            self._hand_over_bodies(request)
            del self.open[stream]
            self._sink.finished(stream, self._visible({"end_ns": t_ns, "outcome": "cut"} | kept))

    def _gap(self, request: OpenRequest) -> None:
        """Pieces were dropped here: neither a body nor a reply with a hole is believed."""
        if request.bodies is not None:
            request.bodies.holes.add("request" if request.parser is None else "response")
        if request.parser is None:
            self._give_up_body(request)
        elif request.parser.decoder is not None:
            request.parser.decoder.lose_place()
        if request.framing is not None:
            request.framing.lose_place()
        request.row["parse_status"] = "partial"

    def _open(self, stream: int, t_ns: int, payload: bytes) -> None:
        row, head = _decode(payload)
        row.setdefault("arrival_ns", t_ns)
        if "request_id" not in row:  # a replay names those that others wait for
            row["request_id"] = request_id(self._clock.unix_ns(row["arrival_ns"]))
        request = OpenRequest(row)
        if head is not None:
            row.update(self._head_columns(*head))
            request.turn = self._turns.told_by_head(head[2])
            row.update(self._turns.named(request.turn))
            request.coding = coding_of(_coding(head[2]) or "")
            if self._keeps_bodies:
                request.bodies = Bodies()
                request.bodies.told("request", head[2])
        else:
            request.body = None
        if self._keep is not None:
            row.update(UNTIL_ITS_END)
        self.open[stream] = request
        self.seen += 1
        self._sink.opened(stream, self._visible(row))

    def _head_columns(self, method: bytes, target: bytes, headers: list[Any]) -> dict[str, Any]:
        """What a request head tells; the query and every header value stay out."""
        endpoint = target.split(b"?", 1)[0].decode("latin-1")[:MAX_ENDPOINT_CHARS]
        spoken = wire_format(endpoint)
        if spoken == "unknown" and self._privacy.mode == "none":
            endpoint = self._privacy.digest(endpoint.encode(), "endpoint")
        else:
            endpoint = self._privacy.path(endpoint)
        columns: dict[str, Any] = {"endpoint": endpoint, "wire_format": spoken}
        if method != b"POST":
            columns["operation"] = method.decode().lower() if method in METHODS else "other"
        for name, value in headers:
            lower = name.lower()
            if lower in CREDENTIALS:
                columns["tenant_digest"] = self._privacy.digest(value, "tenant")
            elif lower == b"traceparent" and (parent := _TRACEPARENT.fullmatch(value)):
                columns["trace_id"] = parent[1].decode()
        return columns

    def _request_body(self, request: OpenRequest, data: bytes) -> None:
        request.body_bytes += len(data)
        if request.body is None:
            return
        request.body += data
        self._bodies_bytes += len(data)
        if len(request.body) > MAX_BODY_BYTES or self._bodies_bytes > MAX_BODIES_BYTES:
            self._give_up_body(request)

    def _mark(self, stream: int, request: OpenRequest, t_ns: int, column: str) -> None:
        request.row[column] = t_ns
        self._sink.learned(stream, self._visible({column: t_ns}))
        if column == "request_end_ns":
            self._read_request(stream, request)

    def _read_request(self, stream: int, request: OpenRequest) -> None:
        """Parse the request's body once, and let go of it."""
        columns: dict[str, Any] = {"prompt_bytes": request.body_bytes}
        if request.body is not None:
            body, request.body = request.body, None
            self._bodies_bytes -= len(body)
            if request.bodies is not None:
                self._keeper.request(request.bodies, body)
        elif request.row.get("prompt_bytes") is None and request.body_bytes:
            body = bytearray()  # given up
        else:
            return
        trouble = None
        if body and request.coding:
            body, trouble = decoded(body, request.coding, MAX_BODY_BYTES)
        if trouble is not None:
            columns["parse_status"] = trouble
        elif body:
            facts = read_request(request.row["endpoint"], body)
            if request.turn is not None:
                self._turns.told_by_body(request.turn, facts)
                columns |= self._turns.named(request.turn)
            columns |= facts.columns | self._privacy.blocks(facts.prompt)
        request.row.update(columns)
        self._sink.learned(stream, self._visible(columns))

    def _reply_head(self, stream: int, request: OpenRequest, t_ns: int, payload: bytes) -> None:
        status, headers = _decode(payload)
        found = {name.lower(): value.decode("latin-1") for name, value in headers}
        columns = {
            "response_headers_ns": t_ns,
            "http_status": status,
            "content_encoding": _coding(headers),
        }
        if b"retry-after" in found:
            columns["retry_after_s"] = retry_after_s(found)
        columns |= head_columns(request.row.get("wire_format") or "", found)
        request.row.update(columns)
        if request.bodies is not None:
            request.bodies.told("response", headers)
        self._sink.learned(stream, self._visible(columns))
        request.read_reply_as(found.get(b"content-type", ""))

    def _reply_data(self, kind: int, stream: int, t_ns: int, lag_us: int, data: bytes) -> None:
        request = self.open.get(stream)
        if request is None:
            self.lost_reads += 1
            return
        if kind == blocks.REPLY_CHUNKED:
            if request.framing is None:
                request.framing = ChunkDecoder()
            data = request.framing.feed(data)
            if not data:  # framing only
                return
        if lag_us == blocks.NO_STAMP:
            request.stamps_missing = True
        elif lag_us > request.lag_max_us:
            request.lag_max_us = lag_us
        if t_ns != request.last_ns:
            self._new_read(stream, request, t_ns)
        request.reply_bytes += len(data)
        self._read_reply(request, t_ns, data)

    def _read_reply(self, request: OpenRequest, t_ns: int, data: bytes) -> None:
        if request.bodies is not None:
            self._keeper.response(request.bodies, data)
        parser = request.parser
        if parser is None:
            return
        if len(parser.t_ns) + len(parser.aux_t_ns) < MAX_EVENTS:
            parser.feed(data, t_ns, request.read)
        else:
            request.beyond += 1

    def _new_read(self, stream: int, request: OpenRequest, t_ns: int) -> None:
        request.read += 1
        request.last_ns = t_ns
        if "first_byte_ns" not in request.row:
            request.row["first_byte_ns"] = t_ns
            self._sink.learned(stream, self._visible({"first_byte_ns": t_ns}))

    def _close(self, stream: int, request: OpenRequest, t_ns: int, columns: dict[str, Any]) -> None:
        self._read_request(stream, request)
        row = request.row
        row.update(columns)
        row.setdefault("end_ns", t_ns)
        if row.get("http_status") is not None:
            row["response_bytes"] = request.reply_bytes
            row.setdefault("event_clock", "callback" if request.stamps_missing else "kernel")
        if request.lag_max_us >= 0:
            row["lag_max_us"] = request.lag_max_us
        if request.parser is not None:
            reply = request.parser.finish(t_ns, row["outcome"] == "ok")
            _merge_reply(row, reply, streamed=isinstance(request.parser, StreamParser))
        if request.beyond or request.missed or row.get("events_dropped"):
            _admit_unread(row, request.beyond, request.missed)
        mark_early(row)
        if request.turn is not None:
            row.update(self._turns.close(request.turn, row))
        kept = self._kept(request)
        visible = self._visible(row if kept is None else row | kept)
        self._hand_over_bodies(request, wanted=kept is not None)
        del self.open[stream]
        if kept is None:
            self.sampled_out += 1
            self._sink.left_out(stream, visible)
        else:
            self._sink.finished(stream, visible)

    def _kept(self, request: OpenRequest) -> dict[str, Any] | None:
        """The sample columns of a request that has ended; None when it gets no row."""
        if self._keep is None:
            return {}
        draw = request.turn.draw if request.turn is not None else self._turns.alone(request.row)
        return self._keep.judge(draw, request.row)

    def _hand_over_bodies(self, request: OpenRequest, *, wanted: bool = True) -> None:
        """Before the row: a row whose bodies are lost says less than bodies without a row."""
        bodies, request.bodies = request.bodies, None
        if bodies is None:
            return
        self._keeper.release(bodies)
        if wanted:
            request_id = request.row["request_id"]
            self._sink.bodies(bodies.row(request_id, request.body_bytes, request.reply_bytes))

    def _telemetry(self, t_ns: int, payload: bytes) -> None:
        end_ns, source, samples = _decode(payload)
        begin, end = self._clock.tape_ns(t_ns), self._clock.tape_ns(end_ns)
        self._sink.sampled(
            [(begin, end, source, name, labels, value) for name, labels, value in samples]
        )

    def cut(self, t_ns: int) -> int:
        """Close every open request as `cut`; the number of them."""
        count = len(self.open)
        for stream, request in list(self.open.items()):
            self._close(stream, request, t_ns, {"outcome": "cut"})
        return count

    def adopt(self, stream: int, left: Unfinished, *, gap: bool = False) -> None:
        """Go on with a request of a writer that is dead; `gap`: not all since then comes again."""
        request = self.open[stream] = OpenRequest.resume(left, self._clock.offset_ns)
        if self._keeps_bodies:
            request.bodies = Bodies()
            if request.reply_bytes:  # its beginning died with the writer
                request.bodies.holes.add("response")
        if gap:
            request.missed += 1
            self._gap(request)

    def news(self) -> Iterator[tuple[int, list[bytes] | None, State]]:
        """(stream, new events as raw arrays in the journal's order, state) of what has changed."""
        for stream, request in self.open.items():
            state = request.changed_state()
            if state is None:
                continue
            raw, parser = None, request.parser
            if parser is not None:
                first, first_aux = request.journaled
                request.journaled = (len(parser.t_ns), len(parser.aux_t_ns))
                if request.journaled != (first, first_aux):
                    raw = self._raw(parser, first, first_aux)
                self._name_reply(stream, request.row, parser)
            yield stream, raw, state

    def _name_reply(self, stream: int, row: dict[str, Any], parser: ReplyParser) -> None:
        """Let the journal have the names that a server gives only once."""
        for column in ("model", "response_id"):
            name = getattr(parser.facts, column)
            if name is not None and row.get(column) is None:
                row[column] = name
                self._sink.learned(stream, self._visible({column: name}))

    def snapshot(self) -> Iterator[tuple[int, dict[str, Any], list[bytes] | None, State]]:
        """(stream, visible row, all events so far, state) of every open request."""
        for stream, request in self.open.items():
            raw = self._raw(request.parser, 0, 0) if request.parser else None
            yield stream, self._visible(request.row), raw, request.current_state()

    def _raw(self, parser: ReplyParser, first: int, first_aux: int) -> list[bytes]:
        offset = self._clock.offset_ns
        t_ns = np.asarray(parser.t_ns[first:], dtype=np.int64) + offset
        aux_ns = np.asarray(parser.aux_t_ns[first_aux:], dtype=np.int64) + offset
        ntok = np.asarray(parser.ntok[first:], dtype=np.uint16)
        return [
            t_ns.tobytes(),
            ntok.tobytes(),
            bytes(parser.cls[first:]),
            bytes(parser.choice[first:]),
            aux_ns.tobytes(),
            bytes(parser.aux_cls[first_aux:]),
        ]

    def _visible(self, row: dict[str, Any]) -> dict[str, Any]:
        """The columns that the mode allows, in tape time, each value as its type can hold it."""
        offset = self._clock.offset_ns
        seen: dict[str, Any] = {}
        for name, value in row.items():
            if name not in self._allowed or value is None:
                continue
            if name in INSTANTS:
                seen[name] = value + offset
            elif (bounds := INTEGER_BOUNDS.get(name)) is not None:
                seen[name] = value if bounds[0] <= value <= bounds[1] else None
            elif isinstance(value, str) and not value.isascii():
                seen[name] = value.encode("utf-8", "replace").decode()  # JSON may hold half a pair
            else:
                seen[name] = value
        return seen


def _coding(headers: list[Any]) -> str | None:
    """The coding of a body: a word of a closed list; None where no header tells it."""
    told = [value.decode("latin-1") for key, value in headers if key.lower() == b"content-encoding"]
    if not told:
        return None
    coding = coding_of(",".join(told))
    return coding if coding in CODINGS else "other" if coding else "identity"


def _merge_reply(row: dict[str, Any], reply: Reply, *, streamed: bool) -> None:
    """The parsed reply's columns, and the outcome that only the body can tell.

    A reply that was not read as a stream has NULL event lists: whole, encoded or unknown.
    """
    told = row.get("parse_status")  # what speaks against the request
    row.update({name: value for name, value in reply.columns.items() if value is not None})
    if told is not None and row["parse_status"] == "ok":
        row["parse_status"] = told
    if row["outcome"] == "client_abort" and reply.done:  # it had all; many hang up at [DONE]
        row["outcome"] = "ok"
    if row["outcome"] == "ok":
        if not 200 <= (row.get("http_status") or 200) < 300 and row["http_status"] != 101:
            row["outcome"] = "http_error"
        elif reply.stream_error:
            row["outcome"] = "stream_error"
    if streamed:
        row["first_content_ns"] = reply.first_content_ns
        row["first_answer_ns"] = reply.first_answer_ns
        row["last_content_ns"] = reply.last_content_ns
        stream_columns(
            row, reply.t_ns, reply.ntok, reply.cls, reply.choice, reply.aux_t_ns, reply.aux_cls
        )


def _admit_unread(row: dict[str, Any], beyond: int, missed: int) -> None:
    """Pieces were dropped, died with a writer or came too late: no tokens from the rest alone."""
    row["events_dropped"] = (row.get("events_dropped") or 0) + beyond + missed
    row["parse_status"] = "truncated" if beyond else "partial"
    if row.get("output_tokens_source") != "usage":
        row["output_tokens"] = row["output_tokens_source"] = None
