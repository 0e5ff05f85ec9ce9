"""Rotation and the write into the cache in plain steps."""

from __future__ import annotations

from torch import Tensor

from servekit.kernels.kv_write.reference import kv_write, kv_write_quantized
from servekit.kernels.rotary.reference import apply_rotary


def rope_kv_write(
    qk: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    places: Tensor,
    *,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """Rotate queries and keys by their positions; the keys and the values go to the cache.

    Args:
        qk: ``[tokens, heads + kv_heads, head_dim]``, queries first; may be part of a wider row.
        value: ``[tokens, kv_heads, head_dim]``, likewise.
        cos, sin: ``[tokens, 1, rotary_dim]``, both halves alike; ``rotary_dim <= head_dim``, the rest stays.
        cache: ``[2, num_blocks, block_size, kv_heads, head_dim]``, changed in place.
        places: ``[tokens]`` int64, block * block_size + offset of each token.
        kv_scales: ``[2, num_blocks, block_size, kv_heads]`` float32, changed in place: a cache of 8-bit numbers has the
            scale of each head of each token there, so that the largest becomes the largest of the type.

    Returns:
        The rotated queries ``[tokens, heads, head_dim]``.
    """
    kv_heads = value.shape[1]
    turned = apply_rotary(qk, cos, sin)
    query, key = turned[:, :-kv_heads], turned[:, -kv_heads:]
    if kv_scales is None:
        kv_write(cache, key, value, places)
        return query
    kv_write_quantized(cache, kv_scales, key, value, places)
    return query
