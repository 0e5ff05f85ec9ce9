"""Paged attention in plain steps: one query at a time, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from servekit.kernels.paged_attention.metadata import AttentionMetadata


def paged_attention(
    query: Tensor, cache: Tensor, metadata: AttentionMetadata, scale: float, soft_cap: float = 0.0
) -> Tensor:
    """Attend from each new token to the tokens before it and itself, whose keys and values are in the cache.

    Args:
        query: ``[tokens, heads, head_dim]``.
        cache: ``[2, num_blocks, block_size, kv_heads, head_dim]``; the new tokens are written already.
        scale: multiplies the scores, usually head_dim ** -0.5.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``; 0 leaves them (Gemma 2).

    Returns:
        ``[tokens, heads, head_dim]`` in the dtype of ``query``.
    """
    out = torch.empty_like(query)
    if metadata.decode_tables is not None:
        tokens = metadata.decode_tokens if metadata.decode_tokens is not None else range(len(metadata.decode_tables))
        offsets = torch.arange(metadata.block_size, device=query.device)
        for row, token in enumerate(tokens):
            mask = metadata.decode_mask[row] if metadata.decode_mask is not None else None
            places = (metadata.decode_tables[row, :, None] * metadata.block_size + offsets).flatten()
            out[token] = _one(query[token], cache, places, mask, scale, soft_cap)
    for chunk in metadata.chunks:
        for index in range(chunk.last - chunk.first):
            if chunk.mask is None:
                mask = torch.arange(len(chunk.places), device=query.device) <= index
            else:
                mask = chunk.mask[index]
            token = chunk.first + index
            out[token] = _one(query[token], cache, chunk.places, mask, scale, soft_cap)
    return out


def _one(query: Tensor, cache: Tensor, places: Tensor, mask: Tensor | None, scale: float, soft_cap: float) -> Tensor:
    seen = places if mask is None else places[mask]
    keys, values = (half[seen].float() for half in cache.view(2, -1, *cache.shape[3:]))
    groups = query.shape[0] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    scores = torch.einsum("hd,khd->hk", query.float(), keys) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    return torch.einsum("hk,khd->hd", scores.softmax(dim=-1), values).to(query.dtype)
