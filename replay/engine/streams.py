"""Who is told of tokens: an event stream that writes each to its socket, or a whole reply.

Stream bytes go straight to the connection's transport, one write for each token, framed as one HTTP
chunk per event as uvicorn frames vLLM's. A write never waits: what a slow reader leaves unread is
bounded, then its connection is closed, and the others never notice.
"""

import asyncio
from collections.abc import Callable

from tokentape.replay.engine.batching import Sequence
from tokentape.replay.engine.replies import WORDS_JSON, Reply


def chunk(data: bytes) -> bytes:
    """One HTTP/1.1 chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def bare(data: bytes) -> bytes:
    """No framing, for HTTP/1.0: the body ends with the connection."""
    return data


class EventStream:
    """Writes a reply's events as its tokens come; `done` is set after the last.

    `slow` tells that the connection was closed because its reader left too much unread.
    """

    def __init__(
        self,
        reply: Reply,
        transport: asyncio.WriteTransport,
        frame: Callable[[bytes], bytes],
        limit_bytes: int,
    ) -> None:
        self.finish_reason = reply.finish_reason
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.slow = False
        self._reply = reply
        self._transport = transport
        self._frame = frame
        self._limit_bytes = limit_bytes
        # All words are equally long, so all interior events are, and one frame fits every one.
        self._around: tuple[bytes, bytes] | None = None
        if reply.between is not None:
            marked = frame(WORDS_JSON[0].join(reply.between))
            head, _, tail = marked.rpartition(WORDS_JSON[0])
            self._around = head, tail

    def on_token(self, sequence: Sequence) -> None:
        """Write the newest token, and before the first or after the last what belongs there."""
        if self._transport.is_closing():
            return
        if self._around is not None and sequence.made > 1 and not sequence.finished:
            head, tail = self._around
            data = head + WORDS_JSON[sequence.newest_token] + tail
        else:
            data = b"".join(self._frame(event) for event in self._edge_events(sequence))
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > self._limit_bytes:
            self.slow = True
            self._transport.abort()
        elif sequence.finished and not self.done.done():
            self.done.set_result(None)

    def _edge_events(self, sequence: Sequence) -> list[bytes]:
        events = self._reply.first(sequence) if sequence.made == 1 else []
        events.append(self._reply.token(sequence))
        return events + (self._reply.last(sequence) if sequence.finished else [])


class WholeReply:
    """Waits for the last token; `done` is set then."""

    def __init__(self, reply: Reply) -> None:
        self.finish_reason = reply.finish_reason
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_token(self, sequence: Sequence) -> None:
        """Do nothing until the last token."""
        if sequence.finished and not self.done.done():
            self.done.set_result(None)
