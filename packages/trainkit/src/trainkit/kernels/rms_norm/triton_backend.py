"""RMSNorm's two passes by Triton: a row is read once in each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common_platform.kernels import Specialization, Work

PROGRAMS = 256  # whose sums for the weight's gradient are added at the end


@triton.jit
def _forward(x_ptr, weight_ptr, out_ptr, scales_ptr, hidden, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    x = tl.load(x_ptr + row * hidden + columns, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / hidden + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    out = (wide * scale).to(x.dtype).to(tl.float32) * weight
    tl.store(out_ptr + row * hidden + columns, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(scales_ptr + row, scale)


@triton.jit
def _backward(
    grad_ptr,
    x_ptr,
    weight_ptr,
    scales_ptr,
    x_grad_ptr,
    sums_ptr,  # [programs, hidden]
    rows,
    hidden,
    each,  # rows of a program
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    first = (tl.program_id(0) * each).to(tl.int64)
    for number in range(tl.minimum(each, rows - tl.program_id(0) * each)):
        row = first + number
        grad = tl.load(grad_ptr + row * hidden + columns, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * hidden + columns, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales_ptr + row)
        normed = x * scale
        total += grad * normed
        scaled = grad * weight
        along = tl.sum(scaled * normed, axis=0) / hidden
        x_grad = (scaled - normed * along) * scale
        tl.store(x_grad_ptr + row * hidden + columns, x_grad.to(x_grad_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + tl.program_id(0) * hidden + columns, total, mask=inside)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As ``reference.rms_norm_forward``."""
    x = x.contiguous()
    rows, hidden = x.shape
    out = torch.empty_like(x)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        block = triton.next_power_of_2(hidden)
        _forward[(rows,)](x, weight.contiguous(), out, scales, hidden, eps, BLOCK=block, num_warps=_warps(block))
    return out, scales


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """As ``reference.rms_norm_backward``; the order of the sums depends on the number of rows alone."""
    grad, x = grad.contiguous(), x.contiguous()
    rows, hidden = x.shape
    x_grad = torch.empty_like(x)
    if not rows:
        return x_grad, torch.zeros_like(weight)
    each = triton.cdiv(rows, PROGRAMS)
    programs = triton.cdiv(rows, each)
    sums = torch.empty(programs, hidden, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(hidden)
    _backward[(programs,)](
        grad, x, weight.contiguous(), scales, x_grad, sums, rows, hidden, each, BLOCK=block, num_warps=_warps(block)
    )
    return x_grad, sums.sum(dim=0).to(weight.dtype)


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


_BLOCK = {"BLOCK": 4096}

SPECIALIZATIONS = (
    Specialization(
        kernel=_forward,
        name="bf16, hidden 4096",
        signature=dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), "*bf16")
        | {"scales_ptr": "*fp32", "hidden": "i32:16", "eps": "fp32"},
        constants=_BLOCK,
        num_warps=_warps(4096),
    ),
    Specialization(
        kernel=_backward,
        name="bf16, hidden 4096",
        signature=dict.fromkeys(("grad_ptr", "x_ptr", "weight_ptr", "x_grad_ptr"), "*bf16")
        | {"scales_ptr": "*fp32", "sums_ptr": "*fp32", "rows": "i32", "hidden": "i32:16", "each": "i32"},
        constants=_BLOCK,
        num_warps=_warps(4096),
    ),
)

WORKS = (
    Work(
        operation="trainkit rms_norm (forward and backward)",
        shape="8192 tokens, hidden 4096, bf16",
        bytes=5 * 8192 * 4096 * 2,
        flops=14 * 8192 * 4096,
        bound="bandwidth",
        target=0.8,
    ),
)
