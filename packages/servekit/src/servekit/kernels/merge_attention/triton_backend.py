"""Merging by Triton: one program for a head of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common_platform.kernels import Specialization, Work


@triton.jit
def _merge(parts_ptr, log_sums_ptr, out_ptr, heads_of_all_rows, width, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    highest = float("-inf")
    for part in range(PARTS):
        highest = tl.maximum(highest, tl.load(log_sums_ptr + part * heads_of_all_rows + head))
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    merged = tl.zeros((WIDTH,), dtype=tl.float32)
    total = 0.0
    for part in range(PARTS):
        place = part * heads_of_all_rows + head
        weight = tl.exp(tl.load(log_sums_ptr + place) - highest)
        value = tl.load(parts_ptr + place * width + columns, mask=inside, other=0.0)
        merged += tl.where(weight > 0, weight * value, 0.0)  # a part without keys may hold anything
        total += weight
    merged = merged / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + head * width + columns, merged.to(out_ptr.dtype.element_ty), mask=inside)


def merge_attention(parts: Tensor, log_sums: Tensor, dtype: torch.dtype) -> Tensor:
    """As ``reference.merge_attention``."""
    num_parts, rows, heads, width = parts.shape
    out = torch.empty(rows, heads, width, dtype=dtype, device=parts.device)
    if out.numel():
        wide = triton.next_power_of_2(width)
        _merge[(rows * heads,)](
            parts, log_sums, out, rows * heads, width, PARTS=num_parts, WIDTH=wide, num_warps=_warps(wide)
        )
    return out


def _warps(width: int) -> int:
    return max(1, min(4, width // 128))


SPECIALIZATIONS = tuple(
    Specialization(
        kernel=_merge,
        name=f"16 parts, width {width}, to bf16",
        signature={"parts_ptr": "*fp32", "log_sums_ptr": "*fp32", "out_ptr": "*bf16"}
        | {"heads_of_all_rows": "i32:16", "width": "i32:16"},
        constants={"PARTS": 16, "WIDTH": width},
        num_warps=_warps(width),
    )
    for width in (128, 512)
)

WORKS = (
    Work(
        operation="merge_attention",
        shape="64 rows, 32 heads, width 128, 8 parts",
        bytes=64 * 32 * (8 * (128 * 4 + 4) + 128 * 2),
        flops=64 * 32 * 8 * 128 * 2,
        bound="bandwidth",
        target=0.6,
    ),
)
