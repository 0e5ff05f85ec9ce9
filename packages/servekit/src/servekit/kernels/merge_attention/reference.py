"""Merging in plain steps."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention(parts: Tensor, log_sums: Tensor, dtype: torch.dtype, *, sinks: Tensor | None = None) -> Tensor:
    """Attention to all keys from attention to disjoint parts of them.

    Args:
        parts: ``[parts, rows, heads, width]`` float32, each normalised over its own keys; what is in a part without
            keys does not matter.
        log_sums: ``[parts, rows, heads]`` float32, the logarithm of the sum of the exponentials of a part's scores;
            minus infinity where it has no keys.
        dtype: of the result.
        sinks: ``[heads]``, a score of each head that takes its share of the softmax and has no value; or None.

    Returns:
        ``[rows, heads, width]``; zeros where no part has keys.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., Flash-Decoding, 2023.
    Sinks: OpenAI, gpt-oss model card, 2025.
    """
    if sinks is not None:
        log_sums = torch.cat((log_sums, sinks.float().expand(1, *log_sums.shape[1:])))
        parts = torch.cat((parts, torch.zeros_like(parts[:1])))
    highest = log_sums.amax(dim=0)
    weights = (log_sums - torch.where(highest.isinf(), 0.0, highest)).exp()
    total = weights.sum(dim=0)
    there = torch.where((weights > 0)[..., None], parts, 0.0)  # a part without keys may hold anything
    merged = (weights[..., None] * there).sum(dim=0) / torch.where(total > 0, total, 1.0)[..., None]
    return merged.to(dtype)
