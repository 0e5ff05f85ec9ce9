"""RMSNorm's two passes in plain steps."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x`` ``[rows, hidden]`` normalised and scaled, and ``[rows]``, what each row was multiplied by."""
    wide = _wide(x)
    scales = (wide.square().mean(dim=-1) + eps).rsqrt()
    return (wide * scales[:, None]).to(x.dtype) * weight, scales


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``x`` and of ``weight``; sums over rows are as wide as the mean was."""
    normed = _wide(x) * scales[:, None]
    scaled = _wide(grad) * _wide(weight)
    along = (scaled * normed).mean(dim=-1, keepdim=True)
    x_grad = (scaled - normed * along) * scales[:, None]
    weight_grad = (_wide(grad) * normed).sum(dim=0)
    return x_grad.to(x.dtype), weight_grad.to(weight.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
