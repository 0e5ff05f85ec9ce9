"""Blocks found again by what is in them.

The key of a block is a hash over the key of the block before it, its tokens, and the media that begin in it; the
chain starts from a root made of a secret of this process, the adapter, the caller's ``cache_salt``, and embeddings that
stand in place of the prompt's tokens. So a key stands for everything that the block's keys and values depend on, and a
hit never crosses salts. A block that is not full, or that agrees only in its first tokens, is found through its
parent's key and copied.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from hashlib import sha256
from struct import Struct

import msgspec

from servekit.core.request import Request

CHILDREN_LOOKED_AT = 8  # of one parent, the newest first: bounds the search for a partial block


class CachedBlock(msgspec.Struct, frozen=True, gc=False):
    """What is in a block."""

    key: bytes | None  # None: not full, found through its parent only
    parent: bytes
    tokens: tuple[int, ...]


class Hasher:
    """Keys of blocks; ``forget_all`` begins anew, so that nothing computed before is found again."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._pack = Struct(f"<{block_size}q").pack
        self._secret = secrets.token_bytes(32)

    def forget_all(self) -> None:
        self._secret = secrets.token_bytes(32)

    def root(self, request: Request) -> bytes:
        salt = request.cache_salt.encode("utf-8", "surrogatepass")
        embeds = request.embeds.digest if request.embeds is not None else b""
        parts = request.adapter_id.to_bytes(8, "little") + len(salt).to_bytes(8, "little") + salt
        return sha256(self._secret + parts + embeds).digest()

    def keys(self, request: Request, num_blocks: int) -> list[bytes]:
        """``request.hashes``, with the root and the keys of the first ``num_blocks`` full blocks at least."""
        hashes, token_ids, size = request.hashes, request.token_ids, self._block_size
        if not hashes:
            hashes.append(self.root(request))
        key = hashes[-1]
        for index in range(len(hashes) - 1, num_blocks):
            content = key + self._pack(*token_ids[index * size : (index + 1) * size])
            key = sha256(content + self._media_in(request, index) if request.media else content).digest()
            hashes.append(key)
        return hashes

    def _media_in(self, request: Request, index: int) -> bytes:
        """What begins in block ``index`` beside tokens."""
        start, end = index * self._block_size, (index + 1) * self._block_size
        return "\0".join(digest for position, digest in request.media if start <= position < end).encode()


class PrefixCache:
    """The cached blocks of one KV group."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._known: dict[int, CachedBlock] = {}
        self._children: dict[bytes, dict[int, None]] = {}  # parent -> its blocks, oldest first

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, block: int) -> bool:
        return block in self._known

    def find(self, key: bytes) -> int | None:
        return self._block_of.get(key)

    def find_partial(self, parent: bytes, tokens: Sequence[int]) -> tuple[int, int]:
        """The block after ``parent`` that begins most like ``tokens``, and how many tokens agree; (0, 0) if none."""
        best, best_length = 0, 0
        for seen, block in enumerate(reversed(self._children.get(parent, {}))):
            if seen == CHILDREN_LOOKED_AT:
                break
            length = _common_length(self._known[block].tokens, tokens)
            if length > best_length:
                best, best_length = block, length
        return best, best_length

    def content(self, block: int) -> CachedBlock | None:
        return self._known.get(block)

    def add(self, block: int, parent: bytes, key: bytes | None, tokens: Sequence[int]) -> bool:
        """Remember what ``block`` holds; False, and nothing changes, where another block holds the same."""
        if key is not None and key in self._block_of:
            return False
        if block in self._known:
            self.remove(block)
        if key is not None:
            self._block_of[key] = block
        self._known[block] = CachedBlock(key, parent, tuple(tokens))
        self._children.setdefault(parent, {})[block] = None
        return True

    def remove(self, block: int) -> None:
        found = self._known.pop(block, None)
        if found is None:
            return
        if found.key is not None:
            del self._block_of[found.key]
        siblings = self._children[found.parent]
        del siblings[block]
        if not siblings:
            del self._children[found.parent]

    def clear(self) -> list[int]:
        """Forget everything; the blocks that were known."""
        blocks = list(self._known)
        self._block_of.clear()
        self._known.clear()
        self._children.clear()
        return blocks


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length
