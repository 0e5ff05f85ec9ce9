"""The gates of SwiGLU and GeGLU: both halves are read once, the product is written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common_platform.kernels import NVIDIA_FP8, TARGETS, Specialization, Work
from servekit.kernels.quantize.reference import LARGEST, SMALLEST
from servekit.kernels.quantize.triton_backend import round_to_eight_bits

BLOCK = 1024
ROW_BLOCK = 4096  # columns at a time of a program that has a whole row
SILU, GELU, GELU_TANH = 0, 1, 2


@triton.jit
def _product(row_ptr, columns, width, KIND: tl.constexpr):
    """``act(gate) * up`` of some columns of a row, float32. ``KIND``: 0 silu, 1 gelu by erf, 2 gelu by tanh."""
    inside = columns < width
    gate = tl.load(row_ptr + columns, mask=inside, other=0.0)
    up = tl.load(row_ptr + width + columns, mask=inside, other=0.0).to(tl.float32)
    g = gate.to(tl.float32)
    if KIND == 0:
        active = g / (1.0 + tl.exp(-g))
    elif KIND == 1:
        active = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        active = g / (1.0 + tl.exp(-2.0 * inner))
    return active.to(gate.dtype).to(tl.float32) * up


@triton.jit
def _gate_and_mul(x_ptr, out_ptr, width, x_stride, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: rows, parts of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    product = _product(x_ptr + row * x_stride, columns, width, KIND)
    tl.store(out_ptr + row * width + columns, product.to(out_ptr.dtype.element_ty), mask=columns < width)


@triton.jit
def _silu_and_mul_quantized(
    x_ptr, out_ptr, scales_ptr, width, x_stride, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a row, which it reads twice: from the cache when it rounds what it has found the largest of."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + row * x_stride
    columns = tl.arange(0, BLOCK)
    tops = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        product = _product(row_ptr, first + columns, width, 0).to(x_ptr.dtype.element_ty).to(tl.float32)
        tops = tl.maximum(tops, tl.abs(product))
    scale = tl.maximum(tl.max(tops, axis=0), SMALLEST) / LARGEST
    tl.store(scales_ptr + row, scale)
    for first in range(0, width, BLOCK):
        product = _product(row_ptr, first + columns, width, 0).to(x_ptr.dtype.element_ty).to(tl.float32)
        rounded = round_to_eight_bits(product, scale, LARGEST, out_ptr.dtype.element_ty == tl.int8)
        places = out_ptr + row * width + first + columns
        tl.store(places, rounded.to(out_ptr.dtype.element_ty), mask=first + columns < width)


def silu_and_mul(x: Tensor) -> Tensor:
    """As ``reference.silu_and_mul``."""
    return _launch(x, SILU)


def silu_and_mul_quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As ``reference.silu_and_mul_quantized``."""
    rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, width), dtype=dtype, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if out.numel():
        x = x if x.stride(1) == 1 else x.contiguous()
        block = min(triton.next_power_of_2(width), ROW_BLOCK)
        given = (x, out, scales, width, x.stride(0), LARGEST[dtype], SMALLEST, block)
        _silu_and_mul_quantized[(rows,)](*given, num_warps=8)
    return out, scales


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


SIZES = {"width": "i32:16", "x_stride": "i32:16"}
SPECIALIZATIONS = (
    *(
        Specialization(
            kernel=_gate_and_mul,
            name=f"{dtype}, {name}",
            signature={"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"} | SIZES,
            constants={"KIND": kind, "BLOCK": BLOCK},
        )
        for dtype, name, kind in (("bf16", "silu", SILU), ("bf16", "gelu by tanh", GELU_TANH), ("fp32", "gelu", GELU))
    ),
    *(
        Specialization(
            kernel=_silu_and_mul_quantized,
            name=f"bf16 to {to}",
            signature={"x_ptr": "*bf16", "out_ptr": f"*{to}", "scales_ptr": "*fp32"} | SIZES,
            constants={"LARGEST": largest, "SMALLEST": SMALLEST, "BLOCK": ROW_BLOCK},
            num_warps=8,
            targets=targets,
        )
        for to, largest, targets in (("i8", 127.0, tuple(TARGETS)), ("fp8e4nv", 448.0, NVIDIA_FP8))
    ),
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
    Work(
        operation="silu_and_mul (quantized)",
        shape="8192 tokens, width 14336, bf16 to fp8",
        bytes=8192 * (14336 * 5 + 4),
        flops=8 * 8192 * 14336,
        bound="bandwidth",
        target=0.8,
    ),
)
