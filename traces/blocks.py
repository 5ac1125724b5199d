"""Blocks of raw records through anonymous shared memory, from a hot process to its writer process.

Slots of one memfd carry the bytes, a SEQPACKET socket says who owns a slot. A sender fills a free
slot or is told that there is none; it never waits. A slot is given back when what it carried is in
the journal, so that the blocks of a dead writer can be sent again to the next one.
 What crosses here is raw and stays in memory.
"""

import mmap
import os
import socket
import struct
from collections import deque
from dataclasses import dataclass

SLOT_BYTES = 1 << 20
MAX_BODY_BYTES = 64 << 20  # a longer request body is not parsed; its bytes still count
SLOTS = 32  # 32 MiB between the hot process and a writer that stalls
MAX_PAYLOAD_BYTES = 256 << 10  # longer data is split, so that a record always fits a slot

# One record: kind, stream, CLOCK_MONOTONIC ns, how late the process read it in us, length of the
# payload; then the payload. REPLY_CHUNKED is REPLY_DATA with its chunk framing, UNKEPT_REQUEST and
# UNKEPT_REPLY carry a length only.
RECORD = struct.Struct("<BIqII")
OPEN, REQUEST_BODY, MARK, REPLY_HEAD, REPLY_DATA, CLOSE, TELEMETRY, GAP = range(8)
REPLY_CHUNKED, UNKEPT_REQUEST, UNKEPT_REPLY = range(8, 11)
NO_STAMP = (1 << 32) - 1  # in place of the lateness: the stamp is the process's own
LENGTH = struct.Struct("<Q")

# The counter page of a hot process, as 64-bit numbers: requests opened, pieces of replies, where in
# the shared memory the slot in hand begins (NO_SLOT: nowhere), and how much of it is filled.
OPENED, READS, SLOT_AT, SLOT_FILL = range(4)
NO_SLOT = 1 << 63
COUNTER_BYTES = 4096

_FULL, _FREE, _NOTE = b"F"[0], b"R"[0], b"N"[0]
_SLOT = struct.Struct("<BHI")


@dataclass
class Channel:
    """What both sides hold: the socket and the mapped memory."""

    sock: socket.socket
    memory: mmap.mmap

    def note(self, message: bytes) -> None:
        """Send a control message; raises OSError when the other side is gone."""
        self.sock.send(bytes([_NOTE]) + message)

    def close(self) -> None:
        """Let go of the socket and the memory; the writer sees the end of file."""
        self.sock.close()
        self.memory.close()


def channel_pair() -> tuple[Channel, socket.socket, int]:
    """(the hot side's channel, the writer's socket, the memory's descriptor)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fd = os.memfd_create("tokentape-blocks")
    os.ftruncate(fd, SLOT_BYTES * SLOTS)
    return Channel(ours, mmap.mmap(fd, SLOT_BYTES * SLOTS)), theirs, fd


def open_channel(socket_fd: int, memory_fd: int) -> Channel:
    """The writer's channel from inherited descriptors."""
    return Channel(socket.socket(fileno=socket_fd), mmap.mmap(memory_fd, SLOT_BYTES * SLOTS))


class BlockSender:
    """The hot side: `claim` a slot, fill and `commit` it; `poll` for freed slots and notes."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.memory = channel.memory
        channel.sock.setblocking(False)
        self._free = deque(range(SLOTS))
        self._sent: deque[tuple[int, int]] = deque()  # (where, bytes) of blocks not confirmed yet
        self.confirmed = 0  # blocks that the writer has done with
        self.alive = True
        self._ended = False  # nothing more can be read

    def claim(self) -> int | None:
        """Where in `memory` a free slot of SLOT_BYTES begins, or None; it is the caller's now."""
        return self._free.popleft() * SLOT_BYTES if self._free and self.alive else None

    def unclaim(self, at: int) -> None:
        """Give an unused slot back."""
        self._free.appendleft(at // SLOT_BYTES)

    def commit(self, at: int, size: int) -> bool:
        """Hand a filled slot to the writer; False when the writer is gone."""
        self._sent.append((at, size))
        try:
            self._channel.sock.send(_SLOT.pack(_FULL, at // SLOT_BYTES, size))
        except OSError:  # the socket holds more notes than there are slots: it never fills up
            self.alive = False
        return self.alive

    def send(self, block: bytearray) -> bool:
        """Copy a block that waited into a free slot; False when there is none."""
        at = self.claim()
        if at is None:
            return False
        self.memory[at : at + len(block)] = block
        return self.commit(at, len(block))

    def poll(self) -> list[bytes]:
        """Notes from the writer; slots that it has read become free."""
        notes: list[bytes] = []
        while not self._ended:
            try:
                message = self._channel.sock.recv(1 << 16)
            except BlockingIOError:
                break
            except ConnectionResetError:  # it died with our messages unread; its own still queue
                self.alive = False
                continue
            except OSError:
                message = b""
            if not message:
                self.alive, self._ended = False, True
            elif message[0] == _FREE:
                self._free.appendleft(_SLOT.unpack(message)[1])  # the warm one goes first
                self._sent.popleft()
                self.confirmed += 1
            else:
                notes.append(message[1:])
        return notes

    def unconfirmed(self) -> list[bytearray]:
        """Copies of the blocks that a dead writer did not confirm, in the order they were sent."""
        return [bytearray(self.memory[at : at + size]) for at, size in self._sent]


class BlockReceiver:
    """The writer's side: blocks and notes in the order in which they were sent."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._view = memoryview(channel.memory)
        self._held: list[int] = []  # slots that were received and not confirmed
        self.received = 0

    def receive(self, timeout_s: float) -> tuple[memoryview | None, bytes | None]:
        """(block, None), (None, note), or (None, None) after the timeout; EOFError at the end.

        A block's view is valid until `confirm`.
        """
        self._channel.sock.settimeout(max(timeout_s, 0.001))
        try:
            message = self._channel.sock.recv(1 << 16)
        except TimeoutError:
            return None, None
        except ConnectionResetError:
            # The hot process died with our messages unread. Its own still queue behind this error.
            return None, None
        if not message:
            raise EOFError
        if message[0] == _NOTE:
            return None, message[1:]
        _, slot, size = _SLOT.unpack(message)
        self._held.append(slot)
        self.received += 1
        return self.slot(slot * SLOT_BYTES, size), None

    def slot(self, at: int, size: int) -> memoryview:
        """Part of the memory by its place."""
        return self._view[at : at + size]

    @property
    def held(self) -> int:
        """Blocks that were received and not confirmed."""
        return len(self._held)

    def confirm(self) -> None:
        """Give the slots of all received blocks back: they need not come again."""
        self._channel.sock.settimeout(None)
        try:
            for slot in self._held:
                self._channel.sock.send(_SLOT.pack(_FREE, slot, 0))
        except OSError:
            pass  # the hot process is gone: nobody waits for them
        self._held.clear()
