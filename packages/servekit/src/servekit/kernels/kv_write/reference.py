"""Writes into the paged cache in plain steps."""

from __future__ import annotations

import torch
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


def kv_write_quantized(cache: Tensor, kv_scales: Tensor, keys: Tensor, values: Tensor, places: Tensor) -> None:
    """As ``kv_write`` into a cache of 8-bit numbers (int8 or a float8).

    Args:
        kv_scales: ``[2, num_blocks, block_size, kv_heads]`` float32, changed in place: what the numbers of each head of
            each token are times, so that the largest becomes the largest of the type.
    """
    limit = 127.0 if cache.dtype == torch.int8 else float(torch.finfo(cache.dtype).max)
    for half, scales, new in zip(cache, kv_scales, (keys.float(), values.float()), strict=True):
        step = new.abs().amax(dim=-1).clamp(min=1e-10) / limit
        numbers = new / step[..., None]
        numbers = numbers.round() if cache.dtype == torch.int8 else numbers
        half.view(-1, *half.shape[2:])[places] = numbers.to(cache.dtype)
        scales.view(-1, scales.shape[2])[places] = step


def copy_blocks(cache: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy whole blocks; ``source`` and ``target`` are [blocks] int64 and have no block in common."""
    cache[:, target] = cache[:, source]
