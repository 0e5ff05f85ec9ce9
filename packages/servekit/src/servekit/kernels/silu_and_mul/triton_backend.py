"""The gates of SwiGLU and GeGLU: both halves are read once, the product is written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common_platform.kernels import Specialization, Work

BLOCK = 1024
SILU, GELU, GELU_TANH = 0, 1, 2


@triton.jit
def _gate_and_mul(x_ptr, out_ptr, width, x_stride, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: rows, parts of a row. ``KIND``: 0 silu, 1 gelu by erf, 2 gelu by tanh."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    up = tl.load(x_ptr + row * x_stride + width + columns, mask=inside, other=0.0).to(tl.float32)
    g = gate.to(tl.float32)
    if KIND == 0:
        active = g / (1.0 + tl.exp(-g))
    elif KIND == 1:
        active = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        active = g / (1.0 + tl.exp(-2.0 * inner))
    product = active.to(gate.dtype).to(tl.float32) * up
    tl.store(out_ptr + row * width + columns, product.to(out_ptr.dtype.element_ty), mask=inside)


def silu_and_mul(x: Tensor) -> Tensor:
    """As ``reference.silu_and_mul``."""
    return _launch(x, SILU)


def gelu_and_mul(x: Tensor, *, approximate: str = "none") -> Tensor:
    """As ``reference.gelu_and_mul``."""
    return _launch(x, GELU_TANH if approximate == "tanh" else GELU)


def _launch(x: Tensor, kind: int) -> Tensor:
    rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if out.numel():
        x = x if x.stride(1) == 1 else x.contiguous()
        _gate_and_mul[(rows, triton.cdiv(width, BLOCK))](x, out, width, x.stride(0), kind, BLOCK, num_warps=4)
    return out


SPECIALIZATIONS = tuple(
    Specialization(
        kernel=_gate_and_mul,
        name=f"{dtype}, {name}",
        signature={"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "width": "i32:16", "x_stride": "i32:16"},
        constants={"KIND": kind, "BLOCK": BLOCK},
    )
    for dtype, name, kind in (("bf16", "silu", SILU), ("bf16", "gelu by tanh", GELU_TANH), ("fp32", "gelu", GELU))
)

WORKS = (
    Work(
        operation="silu_and_mul",
        shape="8192 tokens, width 14336, bf16",
        bytes=3 * 8192 * 14336 * 2,
        flops=5 * 8192 * 14336,
        bound="bandwidth",
        target=0.85,
    ),
)
