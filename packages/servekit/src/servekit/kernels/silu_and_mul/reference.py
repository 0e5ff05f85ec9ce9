"""SwiGLU's gate in plain steps."""

from __future__ import annotations

import torch
from torch import Tensor

from servekit.kernels.quantize.reference import quantize


def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``x = [gate | up]``: [tokens, 2 * width] -> [tokens, width]. Shazeer 2020."""
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def silu_and_mul_quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``silu_and_mul`` in 8 bits, each row with a scale of its own, as ``servekit.kernels.quantize`` rounds it.

    Returns:
        ``[tokens, width]`` in ``dtype``, and the scales ``[tokens]`` float32 that it is multiplied by.
    """
    values, scales = quantize(silu_and_mul(x), dtype, x.shape[1] // 2)
    return values, scales[:, 0]


def gelu_and_mul(x: Tensor, *, approximate: str = "none") -> Tensor:
    """GeGLU's: ``gelu(gate) * up`` of ``x = [gate | up]``; ``approximate`` is none (erf) or tanh."""
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate, approximate=approximate) * up
