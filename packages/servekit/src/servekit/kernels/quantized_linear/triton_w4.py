"""Products with weights of four bits, by Triton: a step is one span, whose halves lie in the low and the high bits."""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from servekit.kernels.quantized_linear.tiles import Tiles, measured_tiles, tiles_for
from servekit.kernels.quantized_linear.triton_tiles import in_splits, store, tile_of
from servekit.kernels.quantized_linear.weights import HALF, MIDDLE, SPAN, Int4Weight
from servekit.kernels.tuning import bucket


@triton.jit
def span_product(
    total,
    x_low,
    x_high,
    packed_ptr,
    scales_ptr,
    zeros_ptr,  # None: MIDDLE everywhere
    cols,
    span,
    out,
    stride,  # columns of the whole matrix
    width,
    group,  # input columns that share a scale
    HALF: tl.constexpr,
    MIDDLE: tl.constexpr,
    FEW_GROUPS: tl.constexpr,  # each half of a span lies in one group
):
    """``total`` and the product of both halves of a span with the int4 columns ``cols``, of which ``out`` are real.

    A tile of bytes has the columns of the span's first half in the low bits, of its second above.
    """
    byte = span * HALF + tl.arange(0, HALF)
    is_col = cols < out
    packed = tl.load(packed_ptr + byte.to(tl.int64)[:, None] * stride + cols[None, :], mask=is_col[None, :], other=0)
    for part in tl.static_range(2):
        x = x_high if part else x_low
        first = span * 2 * HALF + part * HALF
        values = ((packed >> (4 * part)) & 15).to(tl.int32)
        if FEW_GROUPS:
            place = (first // group).to(tl.int64) * stride + cols
            real = is_col & (first < width)
            scales = tl.load(scales_ptr + place, mask=real, other=0.0).to(tl.float32)
            zeros = MIDDLE
            if zeros_ptr is not None:
                zeros = tl.load(zeros_ptr + place, mask=real, other=0).to(tl.int32)[None, :]
            total += tl.dot(x, (values - zeros).to(x.dtype), input_precision="ieee") * scales[None, :]
        else:
            inner = first + tl.arange(0, HALF)
            place = (inner // group).to(tl.int64)[:, None] * stride + cols[None, :]
            real = (inner < width)[:, None] & is_col[None, :]
            scales = tl.load(scales_ptr + place, mask=real, other=0.0).to(tl.float32)
            zeros = MIDDLE
            if zeros_ptr is not None:
                zeros = tl.load(zeros_ptr + place, mask=real, other=0).to(tl.int32)
            total = tl.dot(x, ((values - zeros).to(tl.float32) * scales).to(x.dtype), acc=total, input_precision="ieee")
    return total


@triton.jit
def span_of(x_rows, is_row, span, width, HALF: tl.constexpr):
    """Both halves of a span of the input; ``x_rows`` points to the rows' first columns."""
    low = span * 2 * HALF + tl.arange(0, HALF)
    high = low + HALF
    x_low = tl.load(x_rows + low[None, :], mask=is_row[:, None] & (low < width)[None, :], other=0.0)
    x_high = tl.load(x_rows + high[None, :], mask=is_row[:, None] & (high < width)[None, :], other=0.0)
    return x_low, x_high


@triton.jit(do_not_specialize=["tokens"])
def w4a16_tiles(
    x_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    out,
    width,
    group,
    FEW_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    HALF: tl.constexpr,
    MIDDLE: tl.constexpr,
    SPLITS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """A step is one span."""
    row, col = tile_of(tl.cdiv(tokens, ROWS), tl.cdiv(out, COLS), TOGETHER)
    rows, cols = row * ROWS + tl.arange(0, ROWS), col * COLS + tl.arange(0, COLS)
    spans = tl.cdiv(width, 2 * HALF)
    steps = tl.cdiv(spans, SPLITS)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * width
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    first = tl.program_id(1) * steps
    for span in range(first, tl.minimum(first + steps, spans)):
        x_low, x_high = span_of(x_rows, rows < tokens, span, width, HALF)
        total = span_product(
            total,
            x_low,
            x_high,
            packed_ptr,
            scales_ptr,
            zeros_ptr,
            cols,
            span,
            out,
            out,
            width,
            group,
            HALF,
            MIDDLE,
            FEW_GROUPS,
        )
    store(total, bias_ptr, out_ptr, rows, cols, tokens, out, SPLITS)


def w4a16_linear(x: Tensor, weight: Int4Weight, bias: Tensor | None = None, *, tiles: Tiles | None = None) -> Tensor:
    """As ``reference.w4a16_linear``; the products are of the type of ``x``, in which the int4 values are exact."""
    x = x.contiguous() if weight.order is None else x[:, weight.order]
    out, width = weight.packed.shape[1], weight.in_features
    safe = int4_tiles(len(x), weight)
    cut = tiles or measured_tiles("w4a16", safe, tokens=bucket(len(x)), out=out, width=width)
    operands = (x, weight.packed, weight.scales, weight.zeros)
    constants = {"FEW_GROUPS": few_groups(weight.group, width), "HALF": HALF, "MIDDLE": MIDDLE}
    return in_splits(w4a16_tiles, operands, (len(x), out, width, weight.group), bias, cut, x.dtype, constants)


def int4_tiles(tokens: int, weight: Int4Weight) -> Tiles:
    """Tiles for a product with ``weight``: small groups have a scale for each element of a tile to be kept as well."""
    cut = tiles_for(tokens, weight.packed.shape[1], weight.in_features, SPAN, unpacks=True)
    return cut if few_groups(weight.group, weight.in_features) else replace(cut, cols=32, num_stages=2)


def few_groups(group: int, width: int) -> bool:
    """Whether half a span is never of two groups."""
    return group % HALF == 0 or group >= width
