"""RMSNorm as autograd sees it: between the passes only the input and one number a row are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainkit.kernels.choice import module_of


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x ** 2) + eps) * weight`` over the last dimension.

    Args:
        x: ``[..., hidden]``, any float dtype; the mean is taken in float32 (float64 for float64).
        weight: ``[hidden]``, the dtype of ``x``.

    Returns:
        The shape and dtype of ``x``. The normalised value is rounded to that dtype before it is scaled, as Llama does.

    Source: Zhang and Sennrich, "Root mean square layer normalization", NeurIPS 2019.
    """
    found: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return found


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out, scales = module_of("rms_norm", x.device, x.dtype).rms_norm_forward(rows, weight, eps)
        ctx.save_for_backward(x, weight, scales)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, scales = ctx.saved_tensors
        width = x.shape[-1]
        backend = module_of("rms_norm", x.device, x.dtype)
        x_grad, weight_grad = backend.rms_norm_backward(grad.reshape(-1, width), x.reshape(-1, width), weight, scales)
        return x_grad.view(x.shape), weight_grad, None
