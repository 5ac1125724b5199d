"""The worker's event loop: asyncio's own, on a selector that serves the fast path by itself.

Sockets of relays are in the same epoll as all others, but what is ready on them is handled at once,
inside `select`; asyncio sees none of it, and wakes only for its own. So an event that is relayed
costs no task, no handle and no turn of the loop.
"""

import asyncio
import math
import select
import selectors
import time
from collections.abc import Callable, Mapping
from typing import Any

MAX_READY = 64  # of asyncio's in one turn: 2,000 clients that leave at once hold no relay up
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
_MASKS = {
    _READ: select.EPOLLIN,
    _WRITE: select.EPOLLOUT,
    _READ | _WRITE: select.EPOLLIN | select.EPOLLOUT,
}


def _number(fileobj: Any) -> int:
    return fileobj if isinstance(fileobj, int) else int(fileobj.fileno())


class RelaySelector(selectors.BaseSelector):
    """An epoll selector; `relays` maps descriptors to what is called when they are readable.

    A callback that gives asyncio something to do sets `touched`, else asyncio would sleep over it.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._keys: dict[int, selectors.SelectorKey] = {}
        self._watched: set[int] = set()
        self.relays: dict[int, Callable[[], None]] = {}
        self.touched = False

    def relay(self, fd: int, callback: Callable[[], None]) -> None:
        """Call `callback` whenever `fd` is readable; asyncio must not read it meanwhile."""
        self.relays[fd] = callback
        self._watch(fd)

    def unrelay(self, fd: int) -> None:
        """Call nobody any more."""
        if self.relays.pop(fd, None) is not None:
            self._watch(fd)

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """As BaseSelector.register."""
        fd = _number(fileobj)
        if fd in self._keys:
            raise KeyError(f"{fileobj!r} is already registered")
        if events & _READ:
            self.relays.pop(fd, None)  # of a closed socket, whose number came again
        key = self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        self._watch(fd)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """As BaseSelector.unregister."""
        fd = _number(fileobj)
        key = self._keys.pop(fd)
        self._watch(fd)
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """As BaseSelector.modify."""
        fd = _number(fileobj)
        same = self._keys[fd].events == events
        key = self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        if not same:
            self._watch(fd)
        return key

    def _watch(self, fd: int) -> None:
        """Let the epoll know what is wanted of a descriptor now."""
        key = self._keys.get(fd)
        mask = (_MASKS[key.events] if key else 0) | (select.EPOLLIN if fd in self.relays else 0)
        try:
            if not mask:
                self._watched.discard(fd)
                self._epoll.unregister(fd)
            elif fd in self._watched:
                self._epoll.modify(fd, mask)
            else:
                self._watched.add(fd)
                self._epoll.register(fd, mask)
        except FileNotFoundError:  # closed meanwhile, which ends the watch
            if mask:
                self._epoll.register(fd, mask)
        except FileExistsError:
            self._epoll.modify(fd, mask)
        except OSError:
            if mask:
                raise

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready for asyncio, after what is ready for relays was served."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        wait_s = -1.0 if timeout is None else max(timeout, 0.0)
        relays, keys, poll = self.relays, self._keys, self._epoll.poll
        ready = []
        while True:
            patience_s = math.ceil(wait_s * 1e3) * 1e-3 if wait_s > 0 else wait_s
            for fd, mask in poll(patience_s, MAX_READY):
                callback = relays.get(fd)
                if callback is not None and mask != select.EPOLLOUT:
                    callback()
                    if mask == select.EPOLLIN:
                        continue
                if (key := keys.get(fd)) is not None:
                    events = (_WRITE if mask & ~select.EPOLLIN else 0) | (
                        _READ if mask & ~select.EPOLLOUT else 0
                    )
                    if events & key.events:
                        ready.append((key, events & key.events))
            if ready or self.touched:
                self.touched = False
                return ready
            if until is not math.inf:
                wait_s = until - time.monotonic()
                if wait_s <= 0:
                    return ready

    def close(self) -> None:
        """As BaseSelector.close."""
        self._epoll.close()
        self._keys.clear()
        self.relays.clear()

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        """As BaseSelector.get_key."""
        return self._keys[_number(fileobj)]

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """As BaseSelector.get_map; by descriptor."""
        return self._keys


class RelayLoop(asyncio.SelectorEventLoop):
    """asyncio's loop for Unix, on a RelaySelector."""

    def __init__(self) -> None:
        self.relay_selector = RelaySelector()
        super().__init__(self.relay_selector)
