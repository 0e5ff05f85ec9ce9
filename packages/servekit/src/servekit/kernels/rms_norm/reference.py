"""RMSNorm in plain steps."""

from __future__ import annotations

from torch import Tensor


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
