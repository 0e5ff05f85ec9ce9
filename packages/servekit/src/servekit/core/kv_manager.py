"""Who holds which blocks: the block tables of all requests, over the KV groups of a model.

Full groups keep every token. Sliding groups give back the blocks that their window has left behind. Linear groups
hold one block, the state, for the whole life of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from servekit.core.block_pool import BlockPool
from servekit.core.config import CacheConfig
from servekit.core.facts import KVGroup
from servekit.core.offload import OffloadTier
from servekit.core.plan import NULL_BLOCK, BlockAppend
from servekit.core.prefix_cache import Hasher, PrefixCache
from servekit.core.request import Request


class Hit(NamedTuple):
    """Tokens whose keys and values exist: whole blocks to share, and one to copy from."""

    num_tokens: int
    tables: list[list[int]]  # one a group, whole blocks
    partial: int = 0  # block of group 0 whose first tokens agree
    partial_tokens: int = 0
    offloaded: tuple[bytes, ...] = ()  # keys of the blocks that follow, to be loaded from the offload tier

    def without_partial(self) -> Hit:
        return Hit(self.num_tokens - self.partial_tokens, self.tables)


class KVManager:
    """Block tables, sharing and the prefix cache of one engine."""

    def __init__(self, cache: CacheConfig, groups: Sequence[KVGroup]) -> None:
        self.block_size = cache.block_size
        self.groups = list(groups)
        self.caches = [PrefixCache() for _ in groups]
        self.pools = [BlockPool(cache.num_blocks, on_evict=known.remove) for known in self.caches]
        self.tier: OffloadTier | None = None
        if cache.num_offload_blocks and len(groups) == 1 and groups[0].kind == "full":
            self.tier = OffloadTier(cache.num_offload_blocks)
            self.pools[0] = BlockPool(cache.num_blocks, on_evict=self._evict)
        self._each = list(zip(self.groups, self.pools, strict=True))
        self._hasher = Hasher(cache.block_size)
        self._only_full = all(group.kind == "full" for group in groups)
        self.shares_prefixes = cache.enable_prefix_caching and all(group.kind != "linear" for group in groups)

    # --- how much room ---

    def blocks_needed(self, group: KVGroup, num_tokens: int) -> int:
        """Blocks of a table for ``num_tokens`` tokens, those behind the window included."""
        return 1 if group.kind == "linear" else -(-num_tokens // self.block_size)

    def can_ever_hold(self, num_tokens: int, chunk: int) -> bool:
        """Whether an empty pool holds a sequence of ``num_tokens``, computed ``chunk`` at a time."""
        return all(self._most_held(group, num_tokens, chunk) < pool.num_blocks for group, pool in self._each)

    def _most_held(self, group: KVGroup, num_tokens: int, chunk: int) -> int:
        whole = self.blocks_needed(group, num_tokens)
        if group.kind != "sliding":
            return whole
        return min(whole, -(-(group.window + chunk) // self.block_size) + 1)

    @property
    def usage(self) -> float:
        """The share of blocks held, 0..1, of the fullest group."""
        return max(pool.num_held / (pool.num_blocks - 1) for pool in self.pools)

    # --- what is there already ---

    def find_hit(self, request: Request) -> Hit:
        """The longest cached prefix; at least one token is left to compute, so that there are logits."""
        empty = Hit(0, [[] for _ in self.groups])
        if not self.shares_prefixes or request.needs_whole_prompt:
            return empty
        usable = request.num_tokens - 1
        keys = self._hasher.keys(request, usable // self.block_size)[: usable // self.block_size + 1]
        tables = self._longest_tables(keys)
        num_blocks = len(tables[0])
        hit = Hit(num_blocks * self.block_size, tables)
        if not self._only_full or len(self.groups) > 1:
            return hit
        offloaded = self._offloaded(keys[num_blocks + 1 :])
        if offloaded:
            return Hit(hit.num_tokens + len(offloaded) * self.block_size, tables, offloaded=offloaded)
        rest = request.token_ids[hit.num_tokens : min(usable, hit.num_tokens + self.block_size)]
        if any(hit.num_tokens <= position < hit.num_tokens + self.block_size for position, _ in request.media):
            return hit
        block, length = self.caches[0].find_partial(keys[num_blocks], rest)
        return Hit(hit.num_tokens + length, tables, block, length) if length else hit

    def _offloaded(self, keys: list[bytes]) -> tuple[bytes, ...]:
        """The first of ``keys``, as far as the offload tier has them."""
        if self.tier is None:
            return ()
        length = next((i for i, key in enumerate(keys) if self.tier.find(key) is None), len(keys))
        return tuple(keys[:length])

    def _evict(self, block: int) -> None:
        content = self.caches[0].content(block)
        if self.tier is not None and content is not None:
            self.tier.save(block, content)
        self.caches[0].remove(block)

    def _longest_tables(self, keys: list[bytes]) -> list[list[int]]:
        length = len(keys) - 1
        for group, cache in zip(self.groups, self.caches, strict=True):
            if group.kind == "full":
                length = next((i for i in range(length) if cache.find(keys[i + 1]) is None), length)
        while length and not all(self._window_is_cached(i, keys, length) for i in range(len(self.groups))):
            length -= 1
        return [self._table(i, keys, length) for i in range(len(self.groups))]

    def _first_needed(self, group: KVGroup, num_tokens: int) -> int:
        """The first block that a token at position ``num_tokens`` or later still looks at."""
        if group.kind != "sliding":
            return 0
        return max(0, num_tokens - group.window + 1) // self.block_size

    def _window_is_cached(self, index: int, keys: list[bytes], length: int) -> bool:
        first = self._first_needed(self.groups[index], length * self.block_size)
        return all(self.caches[index].find(keys[i + 1]) is not None for i in range(first, length))

    def _table(self, index: int, keys: list[bytes], length: int) -> list[int]:
        first = self._first_needed(self.groups[index], length * self.block_size)
        found = [self.caches[index].find(keys[i + 1]) for i in range(first, length)]
        return [NULL_BLOCK] * first + [block for block in found if block is not None]

    def fork_hit(self, source: Request, request: Request) -> Hit | None:
        """What ``request`` may share with the running ``source`` of the same prompt; None where nothing."""
        usable = min(source.num_confirmed, request.num_prompt - 1)
        if not self._only_full or request.needs_whole_prompt or usable <= 0:
            return None
        whole, rest = divmod(usable, self.block_size)
        tables = [table[:whole] for table in source.tables]
        if len(self.groups) > 1 or not rest:
            return Hit(whole * self.block_size, tables)
        return Hit(usable, tables, source.tables[0][whole], rest)

    # --- taking and giving back ---

    def admit(self, request: Request, hit: Hit, num_tokens: int) -> list[tuple[int, int, int]] | None:
        """Share ``hit`` and take blocks up to ``num_tokens`` in all, if blocks for every known token are free.

        Returns:
            The copies to make, (group, from, to); None where blocks are short, and then nothing has changed.
        """
        for (group, pool), table in zip(self._each, hit.tables, strict=True):
            most = min(request.num_known + 1, request.max_total)
            new = self._most_held(group, most, num_tokens - hit.num_tokens) - len(table) + table.count(NULL_BLOCK)
            idle = sum(1 for block in table if block != NULL_BLOCK and pool.references(block) == 0)
            idle += hit.partial_tokens > 0 and pool.references(hit.partial) == 0
            if max(new, 0) + idle > pool.num_free:
                return None
        request.tables = [list(table) for table in hit.tables]
        for table, pool in zip(hit.tables, self.pools, strict=True):
            for block in table:
                pool.touch(block)
        if hit.offloaded:
            self._load(request, hit, num_tokens)
            return []
        if not hit.partial_tokens:
            self._extend(request, num_tokens)
            return []
        self.pools[0].touch(hit.partial)
        self._extend(request, num_tokens)
        self.pools[0].release([hit.partial])
        return [(0, hit.partial, request.tables[0][len(hit.tables[0])])]

    def _load(self, request: Request, hit: Hit, num_tokens: int) -> None:
        """Blocks for ``num_tokens``, the first of them filled from the offload tier and found by others from now on."""
        if self.tier is None:
            raise RuntimeError("a hit names offloaded blocks, but there is no offload tier")
        contents = [self.tier.find(key) for key in hit.offloaded]
        slots = self.tier.hold(list(hit.offloaded))
        first = len(request.tables[0])
        self._extend(request, num_tokens)
        for slot, content, block in zip(slots, contents, request.tables[0][first:], strict=False):
            self.tier.load(slot, block)
            if content is not None and self.caches[0].add(block, content.parent, content.key, content.tokens):
                self.pools[0].mark_cached(block)

    def grow(self, request: Request, num_tokens: int) -> list[BlockAppend] | None:
        """Blocks for ``num_tokens`` in all; None where they are short, and then nothing has changed."""
        if not self._only_full:
            self._drop_behind_windows(request)
        for (group, pool), table in zip(self._each, request.tables, strict=True):
            if self.blocks_needed(group, num_tokens) - len(table) > pool.num_free:
                return None
        return self._extend(request, num_tokens)

    def grow_by_one(self, request: Request) -> list[BlockAppend] | None:
        """One more block in every table; None where one is short, and then nothing has changed.

        It is ``grow`` for the token after a full last block, where every group keeps every token.
        """
        for pool in self.pools:
            if not pool.num_free:
                return None
        appends = []
        for index, pool in enumerate(self.pools):
            block = pool.take()
            request.tables[index].append(block)
            appends.append(BlockAppend(request.slot, index, [block]))
        return appends

    def _extend(self, request: Request, num_tokens: int) -> list[BlockAppend]:
        appends = []
        for index, (group, pool) in enumerate(self._each):
            count = self.blocks_needed(group, num_tokens) - len(request.tables[index])
            if count > 0:
                blocks = pool.allocate(count)
                request.tables[index].extend(blocks)
                appends.append(BlockAppend(request.slot, index, blocks))
        return appends

    def _drop_behind_windows(self, request: Request) -> None:
        for (group, pool), table in zip(self._each, request.tables, strict=True):
            first = self._first_needed(group, request.num_computed)
            index = first - 1
            while index >= 0 and table[index] != NULL_BLOCK:
                pool.release([table[index]])
                table[index] = NULL_BLOCK
                index -= 1

    def release(self, request: Request) -> None:
        """All blocks of ``request`` go back, the last first, so that prefixes stay cached the longest."""
        self._share_tail(request)
        for pool, table in zip(self.pools, request.tables, strict=True):
            pool.release(reversed(table))
        request.tables = []

    # --- remembering ---

    def share_computed(self, request: Request, before: int) -> None:
        """Remember the blocks that were filled between ``before`` and ``request.num_confirmed`` tokens."""
        size = self.block_size
        first, last = before // size, request.num_confirmed // size
        if first == last or not self.shares_prefixes:
            return
        keys, token_ids = self._hasher.keys(request, last), request.token_ids
        for index in range(first, last):
            tokens = tuple(token_ids[index * size : (index + 1) * size])
            for pool, cache, table in zip(self.pools, self.caches, request.tables, strict=True):
                block = table[index]
                if block != NULL_BLOCK and cache.add(block, keys[index], keys[index + 1], tokens):
                    pool.mark_cached(block)

    def _share_tail(self, request: Request) -> None:
        whole, rest = divmod(request.num_confirmed, self.block_size)
        if not self.shares_prefixes or not self._only_full or not rest or not request.tables:
            return
        start = whole * self.block_size
        if any(position >= start for position, _ in request.media):
            return
        tokens, parent = request.token_ids[start : request.num_confirmed], self._hasher.keys(request, whole)[whole]
        for pool, cache, table in zip(self.pools, self.caches, request.tables, strict=True):
            block = table[whole]
            if block != NULL_BLOCK and cache.add(block, parent, None, tokens):
                pool.mark_cached(block)

    def forget_all(self) -> None:
        """Nothing computed before is found again, nor what running requests go on to compute."""
        self._hasher.forget_all()
        if self.tier is not None:
            self.tier.forget_all()
        for pool, cache in zip(self.pools, self.caches, strict=True):
            for block in cache.clear():
                pool.forget(block)
