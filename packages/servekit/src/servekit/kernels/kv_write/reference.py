"""Writes into the paged cache in plain steps."""

from __future__ import annotations

from torch import Tensor


def kv_write(cache: Tensor, keys: Tensor, values: Tensor, places: Tensor) -> None:
    """Store the keys and values of some tokens.

    Args:
        cache: ``[2, num_blocks, block_size, kv_heads, head_dim]``, changed in place.
        keys, values: ``[tokens, kv_heads, head_dim]``.
        places: ``[tokens]`` int64, block * block_size + offset of each token.
    """
    flat = cache.view(2, -1, *cache.shape[3:])
    flat[0].index_copy_(0, places, keys.to(cache.dtype))
    flat[1].index_copy_(0, places, values.to(cache.dtype))


def copy_blocks(cache: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy whole blocks; ``source`` and ``target`` are [blocks] int64 and have no block in common."""
    cache[:, target] = cache[:, source]
