"""Products with weights of few bits, by Triton.

Few tokens (16 or less) are bound by reading the weight once: the input columns are split among programs, whose float32
sums are added by a second kernel in one order. With more tokens one program has all columns of its tile.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from common_platform.kernels import NVIDIA_FP8, TARGETS, Specialization, Work
from servekit.kernels.quantize.triton_backend import quantize
from servekit.kernels.quantized_linear.tiles import SMALL, Tiles, measured_tiles, tiles_for
from servekit.kernels.quantized_linear.weights import BLOCK, HALF, MIDDLE, SPAN, BlockWeight, ChannelWeight, Int4Weight
from servekit.kernels.tuning import bucket, stages

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
def _store(total, bias_ptr, out_ptr, rows, cols, tokens, out, SPLITS: tl.constexpr):
    """The finished tile, or this split's part of it."""
    real = (rows < tokens)[:, None] & (cols < out)[None, :]
    places = rows.to(tl.int64)[:, None] * out + cols[None, :]
    if SPLITS > 1:
        places += tl.program_id(1).to(tl.int64) * tokens * out
    elif bias_ptr is not None:
        total += tl.load(bias_ptr + cols, mask=cols < out, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["tokens"])
def _w8_tiles(
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
    _store(result, bias_ptr, out_ptr, rows, cols, tokens, out, SPLITS)


@triton.jit(do_not_specialize=["tokens"])
def _fp8_block_tiles(
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
    _store(total, bias_ptr, out_ptr, rows, cols, tokens, out, SPLITS)


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
def _w4a16_tiles(
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
    _store(total, bias_ptr, out_ptr, rows, cols, tokens, out, SPLITS)


@triton.jit
def _add_splits(parts_ptr, bias_ptr, out_ptr, elements, out, SPLITS: tl.constexpr, SUMS: tl.constexpr):
    places = tl.program_id(0) * SUMS + tl.arange(0, SUMS)
    real = places < elements
    total = tl.zeros((SUMS,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + split * elements + places, mask=real, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + places % out, mask=real, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=real)


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
    return _in_splits(_w8_tiles, operands, (len(values), out, width), bias, cut, dtype, constants)


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
    return _in_splits(_fp8_block_tiles, operands, (len(values), out, width), bias, cut, dtype, {"BLOCK": BLOCK})


def w4a16_linear(x: Tensor, weight: Int4Weight, bias: Tensor | None = None, *, tiles: Tiles | None = None) -> Tensor:
    """As ``reference.w4a16_linear``; the products are of the type of ``x``, in which the int4 values are exact."""
    x = x.contiguous() if weight.order is None else x[:, weight.order]
    out, width = weight.packed.shape[1], weight.in_features
    safe = int4_tiles(len(x), weight)
    cut = tiles or measured_tiles("w4a16", safe, tokens=bucket(len(x)), out=out, width=width)
    operands = (x, weight.packed, weight.scales, weight.zeros)
    constants = {"FEW_GROUPS": _few_groups(weight.group, width), "HALF": HALF, "MIDDLE": MIDDLE}
    return _in_splits(_w4a16_tiles, operands, (len(x), out, width, weight.group), bias, cut, x.dtype, constants)


def int4_tiles(tokens: int, weight: Int4Weight) -> Tiles:
    """Tiles for a product with ``weight``: small groups have a scale for each element of a tile to be kept as well."""
    cut = tiles_for(tokens, weight.packed.shape[1], weight.in_features, SPAN, unpacks=True)
    return cut if _few_groups(weight.group, weight.in_features) else replace(cut, cols=32, num_stages=2)


def _few_groups(group: int, width: int) -> bool:
    """Whether half a span is never of two groups."""
    return group % HALF == 0 or group >= width


def _in_splits(
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
        _add_splits[(programs,)](target, bias, result, result.numel(), out, SPLITS=cut.splits, SUMS=SUMS)
    return result


def _specialization(
    kernel: Any, name: str, pointers: dict[str, str], constants: dict[str, Any], cut: Tiles, targets: tuple[str, ...]
) -> Specialization:
    sizes = {"tokens": "i32", "out": "i32:16", "width": "i32:16"}
    tile = {"ROWS": cut.rows, "COLS": cut.cols, "SPLITS": cut.splits, "TOGETHER": TOGETHER, "bias_ptr": None}
    many = f"{cut.rows} x {cut.cols}" + (f", {cut.splits} splits" if cut.splits > 1 else "")
    return Specialization(
        kernel=kernel,
        name=f"{name}, tiles of {many}",
        signature=pointers | {"scales_ptr": "*fp32", "out_ptr": "*fp32" if cut.splits > 1 else "*bf16"} | sizes,
        constants=tile | constants,
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        targets=targets,
    )


def _specializations(tokens: int) -> list[Specialization]:
    """Of a product with a weight of 4096 x 4096."""
    wide, narrow = tiles_for(tokens, 4096, 4096, SPAN), tiles_for(tokens, 4096, 4096, 64)
    unpacked = tiles_for(tokens, 4096, 4096, SPAN, unpacks=True)
    everywhere = tuple(TARGETS)
    found = []
    for kind, sums, targets in (("i8", tl.int32, everywhere), ("fp8e4nv", tl.float32, NVIDIA_FP8)):
        pointers = {"x_ptr": f"*{kind}", "x_scales_ptr": "*fp32", "weight_ptr": f"*{kind}"}
        constants = {"INNER": wide.inner, "SUM": sums, "PROMOTE": wide.inner if kind != "i8" else None}
        found.append(_specialization(_w8_tiles, f"w8a8, {kind}", pointers, constants, wide, targets))
    pointers = {"x_ptr": "*bf16", "weight_ptr": "*i8"}
    constants = {"INNER": narrow.inner, "SUM": tl.float32, "PROMOTE": None, "x_scales_ptr": None}
    found.append(_specialization(_w8_tiles, "w8a16, bf16", pointers, constants, narrow, everywhere))
    pointers = {"x_ptr": "*fp8e4nv", "x_scales_ptr": "*fp32", "weight_ptr": "*fp8e4nv"}
    found.append(_specialization(_fp8_block_tiles, "fp8 blocks", pointers, {"BLOCK": BLOCK}, wide, NVIDIA_FP8))
    int4 = {"x_ptr": "*bf16", "packed_ptr": "*u8", "group": "i32:16"}
    constants = {"HALF": HALF, "MIDDLE": MIDDLE, "FEW_GROUPS": True}
    zeros = {"zeros_ptr": None}
    found.append(_specialization(_w4a16_tiles, "w4a16, bf16", int4, constants | zeros, unpacked, everywhere))
    return found


SPECIALIZATIONS = (
    *_specializations(1),
    *_specializations(4096),
    _specialization(
        _w4a16_tiles,
        "w4a16 with zeros, groups of 32",
        {"x_ptr": "*bf16", "packed_ptr": "*u8", "zeros_ptr": "*u8", "group": "i32:16"},
        {"HALF": HALF, "MIDDLE": MIDDLE, "FEW_GROUPS": False},
        replace(tiles_for(1, 4096, 4096, SPAN), cols=32, num_stages=2),
        tuple(TARGETS),
    ),
    Specialization(
        kernel=_add_splits,
        name="bf16, 4 splits",
        signature={"parts_ptr": "*fp32", "out_ptr": "*bf16", "elements": "i32", "out": "i32:16"},
        constants={"bias_ptr": None, "SPLITS": 4, "SUMS": SUMS},
    ),
)


def _work(operation: str, tokens: int, weight_bytes: float, x_bytes: int) -> Work:
    """Of a weight of 14336 x 4096, as a gate of an 8B model is."""
    out, width = 14336, 4096
    return Work(
        operation=f"quantized_linear ({operation})",
        shape=f"{tokens} tokens, {out} x {width}",
        bytes=int(out * width * weight_bytes) + tokens * (width * x_bytes + out * 2),
        flops=2 * tokens * out * width,
        bound="bandwidth" if tokens <= SMALL else "tensor cores",
        target=0.75 if tokens <= SMALL else 0.6,
    )


WORKS = tuple(
    _work(operation, tokens, weight_bytes, x_bytes)
    for tokens in (1, 16, 4096)
    for operation, weight_bytes, x_bytes in (
        ("w8a8_linear", 1.0, 1),
        ("fp8_block_linear", 1.0, 1),
        ("w4a16_linear", 0.5 + 2 / 128, 2),
    )
)
