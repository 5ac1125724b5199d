"""KV memory in blocks: who holds which, and which free ones still hold a prefix worth sharing.

A block is held by any number of sequences. When the last lets go, a named block (full, computed,
its name the hash of the prompt up to its end) stays findable until its room is needed, least
recently used first. Blocks are only counted and named here: there is no data, clock or policy.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class KvBlocks:
    """`total` blocks, each blank (free, no name), idle (free, named) or held by sequences."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._blank = list(range(total))
        self._idle: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._holders = [0] * total
        self._names: dict[int, int] = {}
        self._named: dict[int, int] = {}

    @property
    def free(self) -> int:
        """Blocks that can be taken, named ones included."""
        return len(self._blank) + len(self._idle)

    def find(self, names: Iterable[int]) -> list[int]:
        """Blocks of the longest known prefix of `names`; they are not yet held."""
        found = []
        for name in names:
            block = self._named.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Sequence[int]) -> None:
        """Hold blocks that `find` gave."""
        for block in blocks:
            if not self._holders[block]:
                del self._idle[block]
            self._holders[block] += 1

    def take(self, count: int) -> list[int] | None:
        """Hold `count` blocks without a name, or None (and nothing taken) when too few are free."""
        if count > self.free:
            return None
        while len(self._blank) < count:
            block, _ = self._idle.popitem(last=False)
            del self._named[self._names.pop(block)]
            self._blank.append(block)
        cut = len(self._blank) - count
        taken = self._blank[cut:]
        del self._blank[cut:]
        for block in taken:
            self._holders[block] = 1
        return taken

    def name(self, block: int, name: int) -> None:
        """Make a full, computed block findable, unless another block has the name already."""
        if name not in self._named and block not in self._names:
            self._named[name] = block
            self._names[block] = name

    def release(self, blocks: Sequence[int]) -> None:
        """Let go; a prefix's end is forgotten before its start."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._names:
                self._idle[block] = None
            else:
                self._blank.append(block)
