"""SwiGLU as autograd sees it: only its inputs are kept, the sigmoid is computed again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainkit.kernels.choice import module_of


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``.

    Args:
        gate, up: one shape and dtype, any; the arithmetic is float32 (float64 for float64).

    Returns:
        That shape and dtype.

    Source: Shazeer, "GLU variants improve transformer", 2020.
    """
    found: Tensor = _Swiglu.apply(gate, up)  # type: ignore[no-untyped-call]
    return found


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return module_of("swiglu", gate.device, gate.dtype).swiglu_forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        return module_of("swiglu", gate.device, gate.dtype).swiglu_backward(grad, gate, up)
