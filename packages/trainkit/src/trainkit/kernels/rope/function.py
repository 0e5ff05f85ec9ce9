"""RoPE as autograd sees it: the gradient is the rotation back, so nothing of the input is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainkit.kernels.choice import module_of


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of numbers of each head by the angles of its token.

    Args:
        x: ``[tokens, heads, head_dim]``, any float dtype; number ``i`` pairs with ``i + head_dim / 2``, as in Llama.
        cos, sin: ``[tokens, head_dim / 2]``, float32 (float64 for float64); they get no gradient.

    Returns:
        The shape and dtype of ``x``; the arithmetic is that of ``cos``.

    Source: Su et al., "RoFormer", 2021.
    """
    found: Tensor = _Rope.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return found


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return module_of("rope", x.device, x.dtype).rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return module_of("rope", grad.device, grad.dtype).rotate(grad, cos, sin, back=True), None, None
