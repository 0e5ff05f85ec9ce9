"""SwiGLU's gate in plain steps."""

from __future__ import annotations

import torch
from torch import Tensor


def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``x = [gate | up]``: [tokens, 2 * width] -> [tokens, width]. Shazeer 2020."""
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def gelu_and_mul(x: Tensor, *, approximate: str = "none") -> Tensor:
    """GeGLU's: ``gelu(gate) * up`` of ``x = [gate | up]``; ``approximate`` is none (erf) or tanh."""
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate, approximate=approximate) * up
