"""RMSNorm whose rows have the same bits whatever is beside them."""

from __future__ import annotations

from torch import Tensor

from servekit.kernels.exact_ops import sum_last


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As ``reference.rms_norm``."""
    x32 = x.float()
    scale = (sum_last(x32 * x32) / x.shape[-1] + eps).rsqrt()
    return (x32 * scale).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As ``reference.add_rms_norm``."""
    total = x + residual
    return rms_norm(total, weight, eps), total
