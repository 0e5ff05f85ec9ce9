"""How a product is spread over programs: tiles in bands, and input columns in splits that are added in one order."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from servekit.kernels.quantized_linear.tiles import Tiles
from servekit.kernels.tuning import stages

TOGETHER = 8  # row tiles that run side by side, so that they share the weight in the cache
SUMS = 1024  # elements of a program that adds


@triton.jit
def tile_of(tall, wide, TOGETHER: tl.constexpr):
    """This program's row and column of tiles; programs in a band of rows come one after the other."""
    program = tl.program_id(0)
    band = program // (TOGETHER * wide)
    height = tl.minimum(tall - band * TOGETHER, TOGETHER)
    inside = program % (TOGETHER * wide)
    return band * TOGETHER + inside % height, inside // height


@triton.jit
def store(total, bias_ptr, out_ptr, rows, cols, tokens, out, SPLITS: tl.constexpr):
    """The finished tile, or this split's part of it."""
    real = (rows < tokens)[:, None] & (cols < out)[None, :]
    places = rows.to(tl.int64)[:, None] * out + cols[None, :]
    if SPLITS > 1:
        places += tl.program_id(1).to(tl.int64) * tokens * out
    elif bias_ptr is not None:
        total += tl.load(bias_ptr + cols, mask=cols < out, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def add_splits(parts_ptr, bias_ptr, out_ptr, elements, out, SPLITS: tl.constexpr, SUMS: tl.constexpr):
    places = tl.program_id(0) * SUMS + tl.arange(0, SUMS)
    real = places < elements
    total = tl.zeros((SUMS,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + split * elements + places, mask=real, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + places % out, mask=real, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=real)


def in_splits(
    kernel: Any,
    operands: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    bias: Tensor | None,
    cut: Tiles,
    dtype: torch.dtype,
    constants: dict[str, Any],
) -> Tensor:
    """Launch ``kernel`` over all tiles and splits, and add the splits where there are several.

    Args:
        operands: what it reads, the input first; bias and output follow.
        sizes: of the product: tokens, output columns, input columns, and what else the layout has.
    """
    tokens, out = sizes[:2]
    device = operands[0].device if operands[0] is not None else None
    result = torch.empty(tokens, out, dtype=dtype, device=device)
    if not result.numel():
        return result
    grid = (triton.cdiv(tokens, cut.rows) * triton.cdiv(out, cut.cols), cut.splits)
    is_whole = cut.splits == 1
    target = result if is_whole else torch.empty(cut.splits, tokens, out, dtype=torch.float32, device=device)
    kernel[grid](
        *operands,
        bias if is_whole else None,
        target,
        *sizes,
        ROWS=cut.rows,
        COLS=cut.cols,
        SPLITS=cut.splits,
        TOGETHER=TOGETHER,
        **constants,
        num_warps=cut.num_warps,
        num_stages=stages(cut.num_stages),
    )
    if not is_whole:
        programs = triton.cdiv(result.numel(), SUMS)
        add_splits[(programs,)](target, bias, result, result.numel(), out, SPLITS=cut.splits, SUMS=SUMS)
    return result
