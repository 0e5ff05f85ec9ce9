"""Fixed blocks with reference counts, and a free queue in the order in which they were last used.

A block is *held* (references > 0), *cached* (free, but its content can still be found) or *empty*. Free blocks,
cached or not, stand in one queue: given out from the front, put back at the end (at the front when empty), taken
out of the middle when a cached one is used again. Every operation is O(1): the queue is a ring of links in two lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from servekit.core.plan import NULL_BLOCK


class OutOfBlocks(RuntimeError):
    """More blocks were asked for than are free: the caller did not look first."""


class BlockPool:
    """The blocks of one KV group. Block 0 is never given out.

    Args:
        num_blocks: the null block included.
        on_evict: called with a block that still had cached content when it is given out anew.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None] = lambda block: None) -> None:
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._references = [0] * num_blocks
        self._cached = bytearray(num_blocks)
        # Block 0 is the ring's anchor: after it comes the least recently used free block.
        self._next = [*range(1, num_blocks), NULL_BLOCK]
        self._previous = [num_blocks - 1, *range(num_blocks - 1)]
        self.num_free = num_blocks - 1

    @property
    def num_held(self) -> int:
        return self.num_blocks - 1 - self.num_free

    def references(self, block: int) -> int:
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks from the front of the free queue.

        Raises:
            OutOfBlocks: fewer are free; nothing has changed.
        """
        if count > self.num_free:
            raise OutOfBlocks(f"asked for {count} blocks, {self.num_free} are free")
        taken, block = [], self._next[NULL_BLOCK]
        for _ in range(count):
            if self._cached[block]:
                self._cached[block] = 0
                self._on_evict(block)
            self._references[block] = 1
            taken.append(block)
            block = self._next[block]
        self._next[NULL_BLOCK], self._previous[block] = block, NULL_BLOCK
        self.num_free -= count
        return taken

    def take(self) -> int:
        """``allocate(1)``, for the commonest case: a row that decodes has filled its last block."""
        block = self._next[NULL_BLOCK]
        if block == NULL_BLOCK:
            raise OutOfBlocks("asked for 1 block, 0 are free")
        if self._cached[block]:
            self._cached[block] = 0
            self._on_evict(block)
        self._references[block] = 1
        after = self._next[block]
        self._next[NULL_BLOCK], self._previous[after] = after, NULL_BLOCK
        self.num_free -= 1
        return block

    def touch(self, block: int) -> None:
        """One more holder of ``block``; a cached free block leaves the queue."""
        if block == NULL_BLOCK:
            return
        if self._references[block] == 0:
            self._unlink(block)
        self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder fewer of each. Without holders, cached blocks join the queue's end, empty ones its front."""
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            if self._references[block] == 0:
                raise RuntimeError(f"block {block} was released more often than it was taken")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._link_free(block)

    def mark_cached(self, block: int) -> None:
        """The content of ``block`` can be found from now on, also once it is free."""
        self._cached[block] = 1

    def forget(self, block: int) -> None:
        """The content of ``block`` can no longer be found."""
        self._cached[block] = 0

    def free_order(self) -> list[int]:
        """The free blocks, next to be given out first. For tests and reports; O(free)."""
        order, block = [], self._next[NULL_BLOCK]
        while block != NULL_BLOCK:
            order.append(block)
            block = self._next[block]
        return order

    def _unlink(self, block: int) -> None:
        before, after = self._previous[block], self._next[block]
        self._next[before], self._previous[after] = after, before
        self.num_free -= 1

    def _link_free(self, block: int) -> None:
        """Behind the anchor or before it: giving an empty block out costs no cached content, so it goes first."""
        before = self._previous[NULL_BLOCK] if self._cached[block] else NULL_BLOCK
        after = self._next[before]
        self._next[before] = self._previous[after] = block
        self._previous[block], self._next[block] = before, after
        self.num_free += 1
