"""Paged attention by torch: all decodes at once over gathered keys and values, chunks one by one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from servekit.kernels.paged_attention.metadata import AttentionMetadata, Chunk


def paged_attention(
    query: Tensor, cache: Tensor, metadata: AttentionMetadata, scale: float, soft_cap: float = 0.0
) -> Tensor:
    """As ``reference.paged_attention``. Blocks that a row does not see are block 0, which is always finite."""
    keys, values = cache.view(2, -1, *cache.shape[3:]).unbind(0)
    if metadata.decode_tables is None and len(metadata.chunks) == 1:
        return _chunk(query, keys, values, metadata.chunks[0], scale, soft_cap)
    if not metadata.chunks:
        return _decode(query, cache, metadata, scale, soft_cap)
    out = torch.empty_like(query)
    if metadata.decode_tokens is not None:
        rows = query[metadata.decode_tokens]
        out[metadata.decode_tokens] = _decode(rows, cache, metadata, scale, soft_cap)
    for chunk in metadata.chunks:
        new = slice(chunk.first, chunk.last)
        out[new] = _chunk(query[new], keys, values, chunk, scale, soft_cap)
    return out


def _decode(query: Tensor, cache: Tensor, metadata: AttentionMetadata, scale: float, soft_cap: float) -> Tensor:
    """``query`` is [rows, heads, head_dim]: the heads of one KV head are the queries of one small matrix product."""
    tables = metadata.decode_tables
    if tables is None:
        return query
    rows, heads, width = query.shape
    kv_heads = cache.shape[3]
    shape = (rows, tables.shape[1] * metadata.block_size, kv_heads, width)
    blocks = cache.view(2, cache.shape[1], metadata.block_size, -1)
    gathered = [half.index_select(0, tables.view(-1)).view(*tables.shape, *half.shape[1:]) for half in blocks]
    if metadata.decode_partial is not None:
        row, column, unseen = metadata.decode_partial
        for part in gathered:  # what is masked must still be a number: 0 * nan is none
            part[row, column] = part[row, column].masked_fill(unseen[:, :, None], 0)
    k, v = (part.view(shape).transpose(1, 2).to(query.dtype) for part in gathered)
    q = query.view(rows, kv_heads, heads // kv_heads, width)
    mask = None if metadata.decode_mask is None else metadata.decode_mask[:, None, None, :]
    return _attend(q, k, v, mask, False, scale, soft_cap).reshape(rows, heads, width)


def _chunk(query: Tensor, keys: Tensor, values: Tensor, chunk: Chunk, scale: float, soft_cap: float) -> Tensor:
    groups = query.shape[1] // keys.shape[1]
    k = keys.index_select(0, chunk.places).transpose(0, 1).to(query.dtype).repeat_interleave(groups, dim=0)
    v = values.index_select(0, chunk.places).transpose(0, 1).to(query.dtype).repeat_interleave(groups, dim=0)
    out = _attend(query.transpose(0, 1)[None], k[None], v[None], chunk.mask, chunk.mask is None, scale, soft_cap)
    return out[0].transpose(0, 1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, soft_cap: float
) -> Tensor:
    if not soft_cap:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    scores = soft_cap * torch.tanh(q @ k.transpose(-1, -2) * (scale / soft_cap))
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v
