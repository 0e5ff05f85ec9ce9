"""The rotation by Triton: one program for some heads of a token, one read, one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common_platform.kernels import Specialization, Work

HEADS = 8  # of a program


@triton.jit
def _rotate(x_ptr, cos_ptr, sin_ptr, out_ptr, heads, half, BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, HALF)
    inside = columns < half
    cos = tl.load(cos_ptr + token * half + columns, mask=inside, other=0.0)[None, :]
    sin = tl.load(sin_ptr + token * half + columns, mask=inside, other=0.0)[None, :]
    if BACK:
        sin = -sin
    real = (head < heads)[:, None] & inside[None, :]
    places = (token * heads + head)[:, None] * (2 * half) + columns[None, :]
    first = tl.load(x_ptr + places, mask=real, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + places + half, mask=real, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=real)
    tl.store(out_ptr + places + half, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=real)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """As ``reference.rotate``; the arithmetic is float32."""
    x = x.contiguous()
    tokens, heads, width = x.shape
    out = torch.empty_like(x)
    if out.numel():
        together = min(HEADS, triton.next_power_of_2(heads))
        _rotate[(tokens, triton.cdiv(heads, together))](
            x,
            cos.float().contiguous(),
            sin.float().contiguous(),
            out,
            heads,
            width // 2,
            BACK=back,
            HEADS=together,
            HALF=triton.next_power_of_2(width // 2),
            num_warps=2,
        )
    return out


SPECIALIZATIONS = tuple(
    Specialization(
        kernel=_rotate,
        name="bf16, head_dim 128" + (", back" if back else ""),
        signature={"x_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "out_ptr": "*bf16"}
        | {"heads": "i32:16", "half": "i32:16"},
        constants={"BACK": back, "HEADS": HEADS, "HALF": 64},
        num_warps=2,
    )
    for back in (False, True)
)

WORKS = (
    Work(
        operation="trainkit rope (forward and backward)",
        shape="8192 tokens, 32 heads, head_dim 128, bf16",
        bytes=2 * (2 * 8192 * 32 * 128 * 2 + 8192 * 128 * 4),
        flops=2 * 3 * 8192 * 32 * 128,
        bound="bandwidth",
        target=0.8,
    ),
)
