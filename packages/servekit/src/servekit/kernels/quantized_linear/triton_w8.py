"""Products with weights of eight bits, by Triton: int8 or float8, a scale for each output channel or each block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from servekit.kernels.quantize.triton_backend import quantize
from servekit.kernels.quantized_linear.tiles import Tiles, measured_tiles, tiles_for
from servekit.kernels.quantized_linear.triton_tiles import in_splits, store, tile_of
from servekit.kernels.quantized_linear.weights import BLOCK, BlockWeight, ChannelWeight
from servekit.kernels.tuning import bucket


@triton.jit(do_not_specialize=["tokens"])
def w8_tiles(
    x_ptr,
    x_scales_ptr,  # None: activations are not quantized
    weight_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    out,
    width,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    SPLITS: tl.constexpr,
    TOGETHER: tl.constexpr,
    SUM: tl.constexpr,
    PROMOTE: tl.constexpr,  # products that tensor cores may add up in their own few bits (Hopper's float8), or None
):
    row, col = tile_of(tl.cdiv(tokens, ROWS), tl.cdiv(out, COLS), TOGETHER)
    rows, cols = row * ROWS + tl.arange(0, ROWS), col * COLS + tl.arange(0, COLS)
    steps = tl.cdiv(tl.cdiv(width, INNER), SPLITS)
    first = tl.program_id(1) * steps * INNER
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * width
    weight_rows = weight_ptr + cols.to(tl.int64)[None, :] * width
    total = tl.zeros((ROWS, COLS), dtype=SUM)
    for step in range(steps):
        inner = first + step * INNER + tl.arange(0, INNER)
        x = tl.load(x_rows + inner[None, :], mask=(rows < tokens)[:, None] & (inner < width)[None, :], other=0.0)
        weight = tl.load(weight_rows + inner[:, None], mask=(cols < out)[None, :] & (inner < width)[:, None], other=0.0)
        if x_scales_ptr is None:
            weight = weight.to(x.dtype)
        total = tl.dot(x, weight, acc=total, input_precision="ieee", max_num_imprecise_acc=PROMOTE, out_dtype=SUM)
    result = total.to(tl.float32) * tl.load(scales_ptr + cols, mask=cols < out, other=0.0)[None, :]
    if x_scales_ptr is not None:
        result *= tl.load(x_scales_ptr + rows, mask=rows < tokens, other=0.0)[:, None]
    store(result, bias_ptr, out_ptr, rows, cols, tokens, out, SPLITS)


@triton.jit(do_not_specialize=["tokens"])
def fp8_block_tiles(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    out,
    width,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """A step is one block of columns, so the sums of float8 products stay short before they are promoted to float32."""
    row, col = tile_of(tl.cdiv(tokens, ROWS), tl.cdiv(out, COLS), TOGETHER)
    rows, cols = row * ROWS + tl.arange(0, ROWS), col * COLS + tl.arange(0, COLS)
    blocks = tl.cdiv(width, BLOCK)
    steps = tl.cdiv(blocks, SPLITS)
    first = tl.program_id(1) * steps
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * width
    weight_rows = weight_ptr + cols.to(tl.int64)[None, :] * width
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for step in range(steps):
        block = first + step
        inner = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_rows + inner[None, :], mask=(rows < tokens)[:, None] & (inner < width)[None, :], other=0.0)
        weight = tl.load(weight_rows + inner[:, None], mask=(cols < out)[None, :] & (inner < width)[:, None], other=0.0)
        x_scales = tl.load(
            x_scales_ptr + rows.to(tl.int64) * blocks + block, mask=(rows < tokens) & (block < blocks), other=0.0
        )
        scale = tl.load(scales_ptr + (col * COLS // BLOCK) * blocks + block, mask=block < blocks, other=0.0)
        total += tl.dot(x, weight) * (x_scales * scale)[:, None]
    store(total, bias_ptr, out_ptr, rows, cols, tokens, out, SPLITS)


def w8a8_linear(x: Tensor, weight: ChannelWeight, bias: Tensor | None = None, *, tiles: Tiles | None = None) -> Tensor:
    """As ``reference.w8a8_linear``."""
    values, scales = quantize(x, weight.values.dtype, x.shape[1])
    return w8a8_product(values, scales, weight, bias, x.dtype, tiles=tiles)


def w8a8_product(
    values: Tensor,
    scales: Tensor,
    weight: ChannelWeight,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    tiles: Tiles | None = None,
) -> Tensor:
    """As ``reference.w8a8_product``."""
    return _w8(values.contiguous(), scales.contiguous(), weight, bias, tiles, dtype)


def w8a8_name(kind: torch.dtype) -> str:
    """What ``servekit tune`` calls the product of this type."""
    return "w8a8_int8" if kind == torch.int8 else "w8a8_float8"


def w8a16_linear(x: Tensor, weight: ChannelWeight, bias: Tensor | None = None, *, tiles: Tiles | None = None) -> Tensor:
    """As ``reference.w8a16_linear``; int8 is exact in every type that activations have."""
    return _w8(x.contiguous(), None, weight, bias, tiles, x.dtype)


def _w8(
    values: Tensor,
    scales: Tensor | None,
    weight: ChannelWeight,
    bias: Tensor | None,
    tiles: Tiles | None,
    dtype: torch.dtype,
) -> Tensor:
    out, width = weight.values.shape
    safe = tiles_for(len(values), out, width, 128 if scales is not None else 64)
    name = "w8a16" if scales is None else w8a8_name(values.dtype)
    cut = tiles or measured_tiles(name, safe, tokens=bucket(len(values)), out=out, width=width)
    sums = tl.int32 if values.dtype == torch.int8 else tl.float32
    constants = {"INNER": cut.inner, "SUM": sums}
    constants["PROMOTE"] = cut.inner if values.dtype.itemsize == 1 and sums == tl.float32 else None
    operands = (values, scales, weight.values, weight.scales)
    return in_splits(w8_tiles, operands, (len(values), out, width), bias, cut, dtype, constants)


def fp8_block_linear(
    x: Tensor, weight: BlockWeight, bias: Tensor | None = None, *, tiles: Tiles | None = None
) -> Tensor:
    """As ``reference.fp8_block_linear``."""
    values, scales = quantize(x, weight.values.dtype, BLOCK)
    return fp8_block_product(values, scales, weight, bias, x.dtype, tiles=tiles)


def fp8_block_product(
    values: Tensor,
    scales: Tensor,
    weight: BlockWeight,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    tiles: Tiles | None = None,
) -> Tensor:
    """As ``reference.fp8_block_product``; a tile's columns are within one block of the weight."""
    values, scales = values.contiguous(), scales.contiguous()
    out, width = weight.values.shape
    safe, tokens = tiles_for(len(values), out, width, BLOCK), bucket(len(values))
    cut = tiles or measured_tiles("fp8_block", safe, most_cols=BLOCK, tokens=tokens, out=out, width=width)

    operands = (values, scales, weight.values, weight.scales)
    return in_splits(fp8_block_tiles, operands, (len(values), out, width), bias, cut, dtype, {"BLOCK": BLOCK})
