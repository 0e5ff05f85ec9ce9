"""SwiGLU's two passes by Triton: each number read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common_platform.kernels import Specialization, Work

BLOCK = 1024


@triton.jit
def _forward(gate_ptr, up_ptr, out_ptr, elements, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = places < elements
    gate = tl.load(gate_ptr + places, mask=real, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + places, mask=real, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _backward(grad_ptr, gate_ptr, up_ptr, gate_grad_ptr, up_grad_ptr, elements, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = places < elements
    grad = tl.load(grad_ptr + places, mask=real, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + places, mask=real, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + places, mask=real, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    gate_grad = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    up_grad = grad * gate * sigmoid
    tl.store(gate_grad_ptr + places, gate_grad.to(gate_grad_ptr.dtype.element_ty), mask=real)
    tl.store(up_grad_ptr + places, up_grad.to(up_grad_ptr.dtype.element_ty), mask=real)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """As ``reference.swiglu_forward``."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if out.numel():
        _forward[(triton.cdiv(out.numel(), BLOCK),)](gate, up, out, out.numel(), BLOCK=BLOCK)
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """As ``reference.swiglu_backward``."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    gate_grad, up_grad = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        grid = (triton.cdiv(gate.numel(), BLOCK),)
        _backward[grid](grad, gate, up, gate_grad, up_grad, gate.numel(), BLOCK=BLOCK)
    return gate_grad, up_grad


SPECIALIZATIONS = (
    Specialization(
        kernel=_forward,
        name="bf16",
        signature=dict.fromkeys(("gate_ptr", "up_ptr", "out_ptr"), "*bf16") | {"elements": "i32:16"},
        constants={"BLOCK": BLOCK},
    ),
    Specialization(
        kernel=_backward,
        name="bf16",
        signature=dict.fromkeys(("grad_ptr", "gate_ptr", "up_ptr", "gate_grad_ptr", "up_grad_ptr"), "*bf16")
        | {"elements": "i32:16"},
        constants={"BLOCK": BLOCK},
    ),
)

WORKS = (
    Work(
        operation="trainkit swiglu (forward and backward)",
        shape="8192 tokens, width 14336, bf16",
        bytes=8 * 8192 * 14336 * 2,
        flops=14 * 8192 * 14336,
        bound="bandwidth",
        target=0.85,
    ),
)
