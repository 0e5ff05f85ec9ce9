"""SwiGLU's gate with the same bits wherever a number lies."""

from __future__ import annotations

from torch import Tensor

from servekit.kernels.exact_ops import exp


def silu_and_mul(x: Tensor) -> Tensor:
    """As ``reference.silu_and_mul``; the gate is computed in float32."""
    gate, up = x.chunk(2, dim=-1)
    gate = gate.float()
    return (gate / (exp(-gate) + 1.0)).to(x.dtype) * up
