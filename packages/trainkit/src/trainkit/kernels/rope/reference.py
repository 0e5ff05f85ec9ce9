"""The rotation in plain steps."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """``x`` ``[tokens, heads, head_dim]`` rotated by angles ``[tokens, head_dim / 2]``, or by their negatives."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos[:, None], -sin[:, None] if back else sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
