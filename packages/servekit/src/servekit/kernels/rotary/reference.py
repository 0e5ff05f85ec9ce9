"""Rotary position embedding in plain steps."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head against one another (Su et al. 2021, in GPT-NeoX's layout).

    Args:
        x: ``[tokens, heads, head_dim]``.
        cos, sin: ``[tokens, 1, rotary_dim]``, both halves alike; ``rotary_dim <= head_dim``, the rest stays.
    """
    rotary_dim = cos.shape[-1]
    turned, kept = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned
