"""Experts by Triton: rows sorted by expert, one grouped product with SwiGLU in it, a second, and a weighted sum.

A tile of rows belongs to one expert. Results are stored by pair, not by row, so that padding is never written and the
sum over a token's experts has one order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from common_platform.kernels import NVIDIA_FP8, TARGETS, Specialization, Work
from servekit.kernels.fused_moe.experts import BlockExperts, ChannelExperts, DenseExperts, ExpertWeights
from servekit.kernels.moe_align.alignment import Alignment
from servekit.kernels.moe_align.triton_backend import align
from servekit.kernels.quantize.triton_backend import quantize
from servekit.kernels.quantized_linear.tiles import Tiles, measured_tiles
from servekit.kernels.quantized_linear.triton_tiles import tile_of
from servekit.kernels.quantized_linear.triton_w4 import few_groups, span_of, span_product
from servekit.kernels.quantized_linear.weights import BLOCK, HALF, MIDDLE
from servekit.kernels.tuning import bucket, stages

DENSE, CHANNELS, BLOCKS, INT4, EIGHT = range(5)  # what the weights are; EIGHT: int8, as the activations
_NAMES = {DENSE: "bf16", CHANNELS: "int8", BLOCKS: "fp8 blocks", INT4: "int4", EIGHT: "int8 by int8"}
_KINDS = {DENSE: "dense", CHANNELS: "int8", BLOCKS: "fp8", INT4: "int4", EIGHT: "w8a8"}  # of ``quantize_experts``
TOGETHER = 8  # row tiles that run side by side
SUMS = 1024  # columns of a program that adds


def moe_tiles(num_pairs: int, num_experts: int, kind: int, *, gated: bool, small_groups: bool = False) -> Tiles:
    """Safe tiles for any device: as high as an expert has rows on the average.

    Args:
        kind: of the weights; what becomes wider in registers gets smaller tiles.
        gated: two matrices at once, so half as many columns.
        small_groups: of int4, whose scales are then as many as a tile's elements.
    """
    inner = {DENSE: 64, CHANNELS: 64, BLOCKS: BLOCK, INT4: 2 * HALF, EIGHT: 128}[kind]
    average = num_pairs / num_experts
    rows = 16 if average <= 16 else 32 if average <= 32 else 64
    if average > 64 and kind != INT4:
        rows = 128
    narrow = kind == INT4 and (gated or small_groups)
    if rows <= 32:
        return Tiles(rows=rows, cols=32 if narrow else 64, inner=inner)
    cols = 32 if narrow else 64 if gated or kind == INT4 else 128
    if small_groups:
        return Tiles(rows=rows, cols=cols, inner=inner, num_warps=8, num_stages=2)
    return Tiles(rows=rows, cols=cols, inner=inner, num_warps=4 if narrow else 8)


@triton.jit
def _step(
    total,
    x,
    x_scale,
    weight_ptr,
    scales_ptr,
    cols,
    inner,
    first_col,
    block,
    blocks,
    out,
    width,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``total`` and the product of ``x`` with ``inner`` columns of the weight's rows ``cols``; 8 bits or more."""
    real = (cols < out)[None, :] & (inner < width)[:, None]
    weight = tl.load(weight_ptr + cols.to(tl.int64)[None, :] * width + inner[:, None], mask=real, other=0.0)
    if FORMAT == 2:
        scale = tl.load(scales_ptr + (first_col // BLOCK) * blocks + block)
        total += tl.dot(x, weight) * (x_scale * scale)[:, None]
    elif FORMAT == 4:
        total = tl.dot(x, weight, acc=total, out_dtype=tl.int32)
    else:
        total = tl.dot(x, weight.to(x.dtype), acc=total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def _experts(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    pairs_ptr,
    tile_experts_ptr,
    num_rows_ptr,
    result_ptr,
    num_pairs,
    num_tiles,
    out,  # columns of the result
    width,
    group,
    FORMAT: tl.constexpr,  # 0 as x, 1 int8, 2 float8 blocks, 3 int4, 4 int8 as x
    GATED: tl.constexpr,  # the weight is a gate above an up matrix; the result silu(gate) * up
    SLOTS: tl.constexpr,  # pairs that share a row of x
    FEW_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    MIDDLE: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    tile, col = tile_of(num_tiles, tl.cdiv(out, COLS), TOGETHER)
    first_col = col * COLS
    if tile * ROWS >= tl.load(num_rows_ptr):
        return
    expert = tl.load(tile_experts_ptr + tile).to(tl.int64)
    pairs = tl.load(pairs_ptr + tile * ROWS + tl.arange(0, ROWS))
    real_rows = pairs < num_pairs
    rows = (pairs // SLOTS).to(tl.int64)
    cols = first_col + tl.arange(0, COLS)
    PARTS: tl.constexpr = 2 if GATED else 1
    all_out = out * PARTS
    SUM: tl.constexpr = tl.int32 if FORMAT == 4 else tl.float32
    total = tl.zeros((ROWS, COLS), dtype=SUM)
    above = tl.zeros((ROWS, COLS), dtype=SUM)
    if FORMAT == 3:
        spans, groups = tl.cdiv(width, 2 * HALF), tl.cdiv(width, group)
        packed = weight_ptr + expert * spans * HALF * all_out
        scales = scales_ptr + expert * groups * all_out
        zeros = zeros_ptr
        if zeros_ptr is not None:
            zeros += expert * groups * all_out
        up_zeros = zeros
        if zeros_ptr is not None:
            up_zeros += out
        for span in range(spans):
            x_low, x_high = span_of(x_ptr + rows[:, None] * width, real_rows, span, width, HALF)
            total = span_product(
                total,
                x_low,
                x_high,
                packed,
                scales,
                zeros,
                cols,
                span,
                out,
                all_out,
                width,
                group,
                HALF,
                MIDDLE,
                FEW_GROUPS,
            )
            if GATED:
                above = span_product(
                    above,
                    x_low,
                    x_high,
                    packed + out,
                    scales + out,
                    up_zeros,
                    cols,
                    span,
                    out,
                    all_out,
                    width,
                    group,
                    HALF,
                    MIDDLE,
                    FEW_GROUPS,
                )
    else:
        weight = weight_ptr + expert * all_out * width
        blocks, tall = tl.cdiv(width, BLOCK), tl.cdiv(out, BLOCK)
        scales = scales_ptr
        if FORMAT == 2:
            scales += expert * tall * PARTS * blocks
        for step in range(tl.cdiv(width, INNER)):
            inner = step * INNER + tl.arange(0, INNER)
            places = x_ptr + rows[:, None] * width + inner[None, :]
            x = tl.load(places, mask=real_rows[:, None] & (inner < width)[None, :], other=0.0)
            x_scale = 0.0
            if FORMAT == 2:
                x_scale = tl.load(x_scales_ptr + rows * blocks + step, mask=real_rows, other=0.0)
            total = _step(
                total, x, x_scale, weight, scales, cols, inner, first_col, step, blocks, out, width, FORMAT, BLOCK
            )
            if GATED:
                up_scales = scales
                if FORMAT == 2:
                    up_scales += tall * blocks
                above = _step(
                    above,
                    x,
                    x_scale,
                    weight + out.to(tl.int64) * width,
                    up_scales,
                    cols,
                    inner,
                    first_col,
                    step,
                    blocks,
                    out,
                    width,
                    FORMAT,
                    BLOCK,
                )
    result, up = total.to(tl.float32), above.to(tl.float32)
    if FORMAT == 1 or FORMAT == 4:
        channel_ptr = scales_ptr + expert * all_out + cols
        result *= tl.load(channel_ptr, mask=cols < out, other=0.0)[None, :]
        if GATED:
            up *= tl.load(channel_ptr + out, mask=cols < out, other=0.0)[None, :]
    if FORMAT == 4:
        row_scales = tl.load(x_scales_ptr + rows, mask=real_rows, other=0.0)[:, None]
        result *= row_scales
        up *= row_scales
    if GATED:
        result = result / (1.0 + tl.exp(-result)) * up
    real = real_rows[:, None] & (cols < out)[None, :]
    places = result_ptr + pairs.to(tl.int64)[:, None] * out + cols[None, :]
    tl.store(places, result.to(result_ptr.dtype.element_ty), mask=real)


@triton.jit
def _combine(
    results_ptr,
    experts_ptr,
    weights_ptr,
    shared_ptr,
    out_ptr,
    hidden,
    num_experts,
    TOP_K: tl.constexpr,
    SUMS: tl.constexpr,
):
    """``out[token] = shared[token] + sum of weight * result``, in the order of the slots."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * SUMS + tl.arange(0, SUMS)
    inside = columns < hidden
    total = tl.zeros((SUMS,), dtype=tl.float32)
    if shared_ptr is not None:
        total += tl.load(shared_ptr + token * hidden + columns, mask=inside, other=0.0).to(tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        expert = tl.load(experts_ptr + pair)
        is_here = (expert >= 0) & (expert < num_experts)  # another rank's result was never written
        result = tl.load(results_ptr + pair * hidden + columns, mask=inside & is_here, other=0.0).to(tl.float32)
        total += result * tl.load(weights_ptr + pair)
    tl.store(out_ptr + token * hidden + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


def fused_moe(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    shared: Tensor | None = None,
) -> Tensor:
    """As ``reference.fused_moe``."""
    experts, weights = experts.contiguous(), weights.contiguous()
    tokens, top_k = experts.shape
    num_experts, both, hidden = gate_up.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not tokens:
        return out
    cut = _tiles(gate_up, tokens * top_k, gated=True)
    rows = align(experts, num_experts, cut.rows)
    inner = _grouped(x.contiguous(), gate_up, rows, cut, top_k, both // 2, gated=True)
    second = _tiles(down, tokens * top_k, gated=False)
    if second.rows != cut.rows:
        rows = align(experts, num_experts, second.rows)
    results = _grouped(inner, down, rows, second, 1, hidden, gated=False)
    combine(results, experts, weights, shared, out, num_experts)
    return out


def combine(
    results: Tensor, experts: Tensor, weights: Tensor, shared: Tensor | None, out: Tensor, num_experts: int
) -> None:
    """Add up ``results`` ``[tokens * top_k, hidden]`` into ``out`` ``[tokens, hidden]``."""
    tokens, top_k = experts.shape
    hidden = out.shape[1]
    grid = (tokens, triton.cdiv(hidden, SUMS))
    shared = None if shared is None else shared.contiguous()
    _combine[grid](results, experts, weights, shared, out, hidden, num_experts, TOP_K=top_k, SUMS=SUMS)


def _grouped(
    x: Tensor, weights: ExpertWeights, rows: Alignment, cut: Tiles, slots: int, out: int, *, gated: bool
) -> Tensor:
    """``[num_pairs, out]``: each pair's row of ``x`` by its expert; ``slots`` pairs share a row."""
    num_pairs = len(x) * slots
    result = torch.empty(num_pairs, out, dtype=x.dtype, device=x.device)
    values, x_scales = x, None
    if isinstance(weights, BlockExperts):
        values, x_scales = quantize(x, weights.values.dtype, BLOCK)
    elif _kind(weights) == EIGHT:
        values, x_scales = quantize(x, torch.int8, x.shape[1])
    data, scales, zeros, group = _parts(weights)
    width = weights.shape[2]
    _experts[(len(rows.experts) * triton.cdiv(out, cut.cols),)](
        values,
        x_scales,
        data,
        scales,
        zeros,
        rows.pairs,
        rows.experts,
        rows.num_rows,
        result,
        num_pairs,
        len(rows.experts),
        out,
        width,
        group,
        SLOTS=slots,
        **_constants(_kind(weights), cut, few_groups(group, width), gated=gated),
        num_warps=cut.num_warps,
        num_stages=stages(cut.num_stages),
    )
    return result


def _tiles(weights: ExpertWeights, num_pairs: int, *, gated: bool) -> Tiles:
    """What ``servekit tune`` measured for these experts and about as many pairs, else safe ones."""
    kind, (num_experts, out, width) = _kind(weights), weights.shape
    return measured_tiles(
        tuned_name(_KINDS[kind]),
        moe_tiles(num_pairs, num_experts, kind, gated=gated, small_groups=_has_small_groups(weights)),
        most_cols=BLOCK if kind == BLOCKS else 256,
        pairs=bucket(num_pairs),
        experts=num_experts,
        out=out,
        width=width,
    )


def _has_small_groups(weights: ExpertWeights) -> bool:
    return _kind(weights) == INT4 and not few_groups(_parts(weights)[3], weights.shape[2])


def tuned_name(kind: str) -> str:
    """What ``servekit tune`` calls experts of a ``kind`` of ``quantize_experts``."""
    return f"experts_{kind}"


def _kind(weights: ExpertWeights) -> int:
    if isinstance(weights, DenseExperts):
        return DENSE
    if isinstance(weights, ChannelExperts):
        return EIGHT if weights.rounds_inputs else CHANNELS
    return BLOCKS if isinstance(weights, BlockExperts) else INT4


def _parts(weights: ExpertWeights) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """Data, scales, zeros and columns of a group, as the kernel takes them."""
    if isinstance(weights, DenseExperts):
        return weights.values, None, None, 1
    if isinstance(weights, ChannelExperts | BlockExperts):
        return weights.values, weights.scales, None, 1
    return weights.packed, weights.scales, weights.zeros, weights.group


def _constants(kind: int, cut: Tiles, few_groups: bool, *, gated: bool) -> dict[str, Any]:
    return {
        "FORMAT": kind,
        "GATED": gated,
        "FEW_GROUPS": few_groups,
        "ROWS": cut.rows,
        "COLS": cut.cols,
        "INNER": cut.inner,
        "BLOCK": BLOCK,
        "HALF": HALF,
        "MIDDLE": MIDDLE,
        "TOGETHER": TOGETHER,
    }


def _specialization(kind: int, average: int, *, gated: bool, small_groups: bool = False) -> Specialization:
    cut = moe_tiles(average * 128, 128, kind, gated=gated, small_groups=small_groups)
    x = {BLOCKS: "*fp8e4nv", EIGHT: "*i8"}.get(kind, "*bf16")
    weight = {DENSE: "*bf16", CHANNELS: "*i8", BLOCKS: "*fp8e4nv", INT4: "*u8", EIGHT: "*i8"}[kind]
    pointers = {"x_ptr": x, "weight_ptr": weight, "pairs_ptr": "*i32", "tile_experts_ptr": "*i32"}
    pointers |= {"num_rows_ptr": "*i32", "result_ptr": "*bf16"}
    absent = ["x_scales_ptr", "scales_ptr", "zeros_ptr"]
    if kind != DENSE:
        pointers["scales_ptr"] = "*bf16" if kind == INT4 else "*fp32"
        absent.remove("scales_ptr")
    if kind in (BLOCKS, EIGHT):
        pointers["x_scales_ptr"] = "*fp32"
        absent.remove("x_scales_ptr")
    sizes = {"num_pairs": "i32", "num_tiles": "i32", "out": "i32:16", "width": "i32:16", "group": "i32"}
    constants = _constants(kind, cut, not small_groups, gated=gated) | {"SLOTS": 8 if gated else 1}
    groups = ", groups of 32" if small_groups else ""
    return Specialization(
        kernel=_experts,
        name=f"{_NAMES[kind]}{groups}, {'gate and up' if gated else 'down'}, tiles of {cut.rows} x {cut.cols}",
        signature=pointers | sizes,
        constants=constants | dict.fromkeys(absent),
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        targets=NVIDIA_FP8 if kind == BLOCKS else tuple(TARGETS),
    )


SPECIALIZATIONS = (
    *(_specialization(kind, 1, gated=True) for kind in _NAMES),
    *(_specialization(kind, 512, gated=True) for kind in _NAMES),
    *(_specialization(kind, 512, gated=False) for kind in _NAMES),
    *(_specialization(INT4, 512, gated=gated, small_groups=True) for gated in (True, False)),
    Specialization(
        kernel=_combine,
        name="bf16, 8 slots, with shared experts",
        signature={"results_ptr": "*bf16", "experts_ptr": "*i32", "weights_ptr": "*fp32", "shared_ptr": "*bf16"}
        | {"out_ptr": "*bf16", "hidden": "i32:16", "num_experts": "i32"},
        constants={"TOP_K": 8, "SUMS": SUMS},
    ),
)


def _work(name: str, tokens: int, weight_bytes: float) -> Work:
    """Of a layer like Qwen3-30B-A3B's: 128 experts of 2048 x 768, 8 for each token."""
    experts, top_k, hidden, inner = 128, 8, 2048, 768
    met = experts * (1 - (1 - top_k / experts) ** tokens)  # on the average, of routing without a preference
    weights = met * 3 * hidden * inner * weight_bytes
    activations = tokens * (2 * hidden + top_k * 2 * (inner + hidden)) * 2
    return Work(
        operation=f"fused_moe ({name})",
        shape=f"{tokens} tokens, 8 of 128 experts, hidden 2048, inner 768",
        bytes=int(weights + activations),
        flops=tokens * top_k * 6 * hidden * inner,
        bound="bandwidth" if tokens <= 256 else "tensor cores",
        target=0.75 if tokens <= 256 else 0.5,
    )


WORKS = tuple(
    _work(name, tokens, weight_bytes)
    for tokens in (1, 64, 8192)
    for name, weight_bytes in (("bf16", 2.0), ("fp8 blocks", 1.0), ("int4", 0.5 + 2 / 128))
)
