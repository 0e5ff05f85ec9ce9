"""RMSNorm in plain steps."""

from __future__ import annotations

import torch
from torch import Tensor

from servekit.kernels.quantize.reference import quantize


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zhang and Sennrich 2019. ``x`` is [rows, hidden], any float dtype; the mean is taken in float32.

    The normalised value is rounded to the dtype of ``x`` before it is scaled, as Llama's own code does.
    """
    x32 = x.float()
    scale = (x32.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (x32 * scale).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + residual`` normalised, and the sum, which is the next residual."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rms_norm_quantized(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of ``x`` (and ``residual``) in 8 bits, each row with a scale of its own.

    Args:
        dtype: int8 or a float8, to which ``servekit.kernels.quantize`` would round the norm.

    Returns:
        ``[rows, hidden]`` in ``dtype``, the scales ``[rows]`` float32 that it is multiplied by, and the sum.
    """
    total = x if residual is None else x + residual
    values, scales = quantize(rms_norm(total, weight, eps), dtype, x.shape[1])
    return values, scales[:, 0], total
