"""SwiGLU's two passes in plain steps."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    return (torch.nn.functional.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``gate`` and ``up``."""
    wide, sigmoid = _wide(gate), _wide(gate).sigmoid()
    slope = sigmoid * (1 + wide * (1 - sigmoid))
    gate_grad, up_grad = _wide(grad) * _wide(up) * slope, _wide(grad) * wide * sigmoid
    return gate_grad.to(gate.dtype), up_grad.to(up.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
