"""Attention with a shared prefix in plain steps."""

from __future__ import annotations

import torch
from torch import Tensor

from servekit.kernels.merge_attention.reference import merge_attention


def cascade_attention(
    query: Tensor,
    cache: Tensor,
    tables: Tensor,
    contexts: Tensor,
    prefix: int,
    scale: float,
    soft_cap: float = 0.0,
    *,
    window: int = 0,
    sinks: Tensor | None = None,
) -> Tensor:
    """One new token a row attends to the prefix that all rows share, then to its own tokens; both are merged.

    Args:
        query: ``[rows, heads, head_dim]``, heads of one KV head side by side.
        cache: ``[2, num_blocks, block_size, kv_heads, head_dim]``, keys and values.
        tables: ``[rows, max_blocks]`` int32, the blocks of each row from its first token on; entries past its context
            are not read.
        contexts: ``[rows]`` int32, tokens of each row, prefix and the new one included; ``prefix`` at the least.
        prefix: the first tokens, which lie in the same blocks for all rows (row 0's are read); any number, 0 too.
        scale: of the scores.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``; 0: they do not.
        window: tokens that a row sees, the new one included; 0 for all.
        sinks: ``[heads]``, a score of each head that has no value; or None.

    Returns:
        ``[rows, heads, head_dim]`` in the dtype of ``query``.

    Source: Juravsky et al., "Hydragen", ICML 2024; Ye et al., "Cascade inference" (FlashInfer), 2024.
    """
    rows, heads, width = query.shape
    block_size = cache.shape[2]
    parts = torch.zeros(2, rows, heads, width, dtype=torch.float32, device=query.device)
    log_sums = torch.full((2, rows, heads), float("-inf"), dtype=torch.float32, device=query.device)
    for row, context in enumerate(contexts.tolist()):
        for part, (source, first, last) in enumerate(((0, 0, prefix), (row, prefix, context))):
            first = max(first, context - window) if window else first
            if last > first:
                places = torch.arange(first, last, device=query.device)
                blocks = tables[source, places // block_size].long()
                keys, values = (half[blocks, places % block_size].float() for half in cache)
                found = _attend(query[row].float(), keys, values, scale, soft_cap)
                parts[part, row], log_sums[part, row] = found
    return merge_attention(parts, log_sums, query.dtype, sinks=sinks)


def _attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, soft_cap: float) -> tuple[Tensor, Tensor]:
    """``[heads, head_dim]`` and ``[heads]`` of ``query`` ``[heads, ...]``, keys ``[tokens, kv_heads, head_dim]``."""
    group = query.shape[0] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    scores = torch.einsum("hd,thd->ht", query, keys) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    return torch.einsum("ht,thd->hd", scores.softmax(dim=-1), values), scores.logsumexp(dim=-1)
