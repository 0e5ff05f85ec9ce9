"""Paged attention in plain steps: one query at a time, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from servekit.kernels.paged_attention.metadata import AttentionMetadata


def paged_attention(
    query: Tensor,
    cache: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    soft_cap: float = 0.0,
    *,
    sinks: Tensor | None = None,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """Attend from each new token to the tokens before it and itself, whose keys and values are in the cache.

    Args:
        query: ``[tokens, heads, head_dim]``.
        cache: ``[2, num_blocks, block_size, kv_heads, head_dim]``; the new tokens are written already.
        scale: multiplies the scores, usually head_dim ** -0.5.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``; 0 leaves them (Gemma 2).
        sinks: ``[heads]`` float32, a score of each head that takes part in the softmax and has no value (GPT-OSS).
        kv_scales: ``[2, num_blocks, block_size, kv_heads]`` float32, what the numbers of an 8-bit cache are times.

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
            out[token] = _one(query[token], cache, places, mask, scale, soft_cap, sinks, kv_scales)
    for chunk in metadata.chunks:
        for index in range(chunk.last - chunk.first):
            if chunk.mask is None:
                mask = torch.arange(len(chunk.places), device=query.device) <= index
            else:
                mask = chunk.mask[index]
            token = chunk.first + index
            out[token] = _one(query[token], cache, chunk.places, mask, scale, soft_cap, sinks, kv_scales)
    return out


def _one(
    query: Tensor,
    cache: Tensor,
    places: Tensor,
    mask: Tensor | None,
    scale: float,
    soft_cap: float,
    sinks: Tensor | None,
    kv_scales: Tensor | None,
) -> Tensor:
    seen = places if mask is None else places[mask]
    keys, values = (half[seen].float() for half in cache.view(2, -1, *cache.shape[3:]))
    if kv_scales is not None:
        by_key, by_value = (half[seen, :, None] for half in kv_scales.view(2, -1, kv_scales.shape[3]))
        keys, values = keys * by_key, values * by_value
    groups = query.shape[0] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    scores = torch.einsum("hd,khd->hk", query.float(), keys) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float()[:, None]), dim=1)
    shares = scores.softmax(dim=-1)[:, : len(keys)]
    return torch.einsum("hk,khd->hd", shares, values).to(query.dtype)
