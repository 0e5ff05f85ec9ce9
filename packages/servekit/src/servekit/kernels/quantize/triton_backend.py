"""Eight-bit activations by Triton: one program for some groups, one read, one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common_platform.kernels import NVIDIA_FP8, TARGETS, Specialization, Work
from servekit.kernels.quantize.reference import LARGEST, SMALLEST

ELEMENTS = 4096  # of a program


@triton.jit
def round_to_eight_bits(x, scale, largest, TO_INT: tl.constexpr):
    """``x / scale``, a float that the type which it is stored in holds as it is, or nearly."""
    scaled = x / scale
    if TO_INT:
        scaled = tl.floor(scaled + 0.5)
    return tl.minimum(tl.maximum(scaled, -largest), largest)


@triton.jit(do_not_specialize=["total"])
def _quantize(
    x_ptr,
    values_ptr,
    scales_ptr,
    width,
    num_groups,
    group,
    total,  # groups of all rows
    largest,
    smallest,
    TO_INT: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    index = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    row = (index // num_groups).to(tl.int64)
    columns = (index % num_groups)[:, None] * group + tl.arange(0, WIDTH)[None, :]
    real = (index < total)[:, None] & (tl.arange(0, WIDTH)[None, :] < group) & (columns < width)
    places = row[:, None] * width + columns
    x = tl.load(x_ptr + places, mask=real, other=0.0).to(tl.float32)
    scales = tl.maximum(tl.max(tl.abs(x), axis=1), smallest) / largest
    scaled = round_to_eight_bits(x, scales[:, None], largest, TO_INT)
    tl.store(values_ptr + places, scaled.to(values_ptr.dtype.element_ty), mask=real)
    tl.store(scales_ptr + index, scales, mask=index < total)


def quantize(x: Tensor, dtype: torch.dtype, group: int) -> tuple[Tensor, Tensor]:
    """As ``reference.quantize``. A group is read whole: at most 65536 columns."""
    x = x.contiguous()
    tokens, width = x.shape
    num_groups = -(-width // group)
    total = tokens * num_groups
    values = torch.empty_like(x, dtype=dtype)
    scales = x.new_empty(tokens, num_groups, dtype=torch.float32)
    block = triton.next_power_of_2(group)
    groups = max(1, ELEMENTS // block)
    if total:
        _quantize[(triton.cdiv(total, groups),)](
            x,
            values,
            scales,
            width,
            num_groups,
            group,
            total,
            LARGEST[dtype],
            SMALLEST,
            TO_INT=dtype == torch.int8,
            GROUPS=groups,
            WIDTH=block,
            num_warps=_warps(block),
        )
    return values, scales


def _warps(block: int) -> int:
    return 4 if block <= ELEMENTS else 8


def _specialization(to: str, group: int, targets: tuple[str, ...]) -> Specialization:
    sizes = {"width": "i32:16", "num_groups": "i32", "group": "i32:16", "total": "i32"}
    block = triton.next_power_of_2(group)
    return Specialization(
        kernel=_quantize,
        name=f"bf16 to {to}, groups of {group}",
        signature={"x_ptr": "*bf16", "values_ptr": f"*{to}", "scales_ptr": "*fp32"}
        | sizes
        | {"largest": "fp32", "smallest": "fp32"},
        constants={"TO_INT": to == "i8", "GROUPS": max(1, ELEMENTS // block), "WIDTH": block},
        num_warps=_warps(block),
        targets=targets,
    )


SPECIALIZATIONS = (
    _specialization("i8", 4096, tuple(TARGETS)),
    _specialization("fp8e4nv", 8192, NVIDIA_FP8),
    _specialization("fp8e4nv", 128, NVIDIA_FP8),
)

WORKS = (
    Work(
        operation="quantize",
        shape="8192 tokens, width 4096, bf16 to fp8, groups of 128",
        bytes=8192 * (4096 * 3 + 4096 // 128 * 4),
        flops=8192 * 4096 * 3,
        bound="bandwidth",
        target=0.8,
    ),
)
