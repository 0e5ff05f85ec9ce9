"""Rotation and the write into the cache: queries, keys and values are read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common_platform.kernels import NVIDIA_FP8, TARGETS, Specialization, Work

HEADS = 8  # heads of one program


@triton.jit
def _store(
    cache_ptr, scale_ptr, target, first, second, tail, h, d, r, is_new, HALF, HEAD_DIM, LIMIT, TAIL: tl.constexpr
):
    """Write rows of heads as two halves and a tail; in 8 bits with their scales."""
    left = d[None, :] < HALF
    if scale_ptr is not None:
        top = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))
        if TAIL:
            top = tl.maximum(top, tl.max(tl.abs(tail), axis=1))
        step = tl.maximum(top, 1e-10) / LIMIT
        tl.store(scale_ptr + target, step, mask=is_new)
        first, second = first / step[:, None], second / step[:, None]
        if TAIL:
            tail = tail / step[:, None]
        if cache_ptr.dtype.element_ty == tl.int8:
            first = (first + tl.where(first < 0, -0.5, 0.5)).to(tl.int32)
            second = (second + tl.where(second < 0, -0.5, 0.5)).to(tl.int32)
            if TAIL:
                tail = (tail + tl.where(tail < 0, -0.5, 0.5)).to(tl.int32)
    kind = cache_ptr.dtype.element_ty
    at = cache_ptr + target[:, None] * HEAD_DIM
    tl.store(at + d[None, :], first.to(kind), mask=is_new[:, None] & left)
    tl.store(at + HALF + d[None, :], second.to(kind), mask=is_new[:, None] & left)
    if TAIL:
        rest = r[None, :] < HEAD_DIM - 2 * HALF
        tl.store(at + 2 * HALF + r[None, :], tail.to(kind), mask=is_new[:, None] & rest)


@triton.jit
def _rope_kv_write(
    qk_ptr,
    value_ptr,
    cos_ptr,
    sin_ptr,
    cache_ptr,
    scales_ptr,
    places_ptr,
    out_ptr,
    qk_stride,
    value_stride,
    angle_stride,
    half_stride,
    scale_half,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    TAIL: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Grid: tokens, tiles of heads: of queries and keys, then of values. ``TAIL``: dims that stay, padded."""
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    TURNED: tl.constexpr = QUERY_HEADS + KV_HEADS
    QK_TILES: tl.constexpr = (TURNED + BLOCK_HEADS - 1) // BLOCK_HEADS
    place = tl.load(places_ptr + token)
    d = tl.arange(0, BLOCK_HALF)
    r = tl.arange(0, TAIL if TAIL else 1)
    left = d[None, :] < HALF
    rest = r[None, :] < HEAD_DIM - 2 * HALF
    if tile < QK_TILES:
        h = tile * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        inside = h[:, None] < TURNED
        source = qk_ptr + token * qk_stride + h[:, None] * HEAD_DIM
        a = tl.load(source + d[None, :], mask=inside & left, other=0.0).to(tl.float32)
        b = tl.load(source + HALF + d[None, :], mask=inside & left, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + token * angle_stride + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + token * angle_stride + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        first, second = a * cos - b * sin, b * cos + a * sin
        tail = first
        is_query = h < QUERY_HEADS
        out = out_ptr + (token * QUERY_HEADS + h[:, None]) * HEAD_DIM
        kind = out_ptr.dtype.element_ty
        tl.store(out + d[None, :], first.to(kind), mask=is_query[:, None] & left)
        tl.store(out + HALF + d[None, :], second.to(kind), mask=is_query[:, None] & left)
        if TAIL:
            tail = tl.load(source + 2 * HALF + r[None, :], mask=inside & rest, other=0.0).to(tl.float32)
            tl.store(out + 2 * HALF + r[None, :], tail.to(kind), mask=is_query[:, None] & rest)
        first, second = first.to(kind).to(tl.float32), second.to(kind).to(tl.float32)
        is_key = (h >= QUERY_HEADS) & (h < TURNED) & (place >= 0)
        target = place * KV_HEADS + h - QUERY_HEADS
        _store(cache_ptr, scales_ptr, target, first, second, tail, h, d, r, is_key, HALF, HEAD_DIM, LIMIT, TAIL)
    else:
        h = (tile - QK_TILES) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        inside = h[:, None] < KV_HEADS
        source = value_ptr + token * value_stride + h[:, None] * HEAD_DIM
        first = tl.load(source + d[None, :], mask=inside & left, other=0.0).to(tl.float32)
        second = tl.load(source + HALF + d[None, :], mask=inside & left, other=0.0).to(tl.float32)
        tail = first
        if TAIL:
            tail = tl.load(source + 2 * HALF + r[None, :], mask=inside & rest, other=0.0).to(tl.float32)
        is_value = (h < KV_HEADS) & (place >= 0)
        target = place * KV_HEADS + h
        values = cache_ptr + half_stride
        value_scales = None
        if scales_ptr is not None:
            value_scales = scales_ptr + scale_half
        _store(values, value_scales, target, first, second, tail, h, d, r, is_value, HALF, HEAD_DIM, LIMIT, TAIL)


def rope_kv_write(
    qk: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    places: Tensor,
    *,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """As ``reference.rope_kv_write``; a token whose place is negative is not written."""
    tokens, turned, width = qk.shape
    kv_heads = value.shape[1]
    heads = turned - kv_heads
    out = torch.empty((tokens, heads, width), dtype=qk.dtype, device=qk.device)
    if tokens == 0:
        return out
    qk, value = (t if t.stride(2) == 1 and t.stride(1) == width else t.contiguous() for t in (qk, value))
    half = cos.shape[-1] // 2
    limit = 0.0
    if kv_scales is not None:
        limit = 127.0 if cache.dtype == torch.int8 else float(torch.finfo(cache.dtype).max)
    _rope_kv_write[(tokens, -(-turned // HEADS) - (-kv_heads // HEADS))](
        qk,
        value,
        cos,
        sin,
        cache,
        kv_scales,
        places,
        out,
        qk.stride(0),
        value.stride(0),
        cos.stride(0),
        cache.stride(0),
        0 if kv_scales is None else kv_scales.stride(0),
        heads,
        kv_heads,
        width,
        half,
        triton.next_power_of_2(half),
        0 if width == 2 * half else triton.next_power_of_2(width - 2 * half),
        limit,
        HEADS,
        num_warps=4,
    )
    return out


def _specialization(
    name: str, dtype: str, cache: str, *, heads: int, kv_heads: int, width: int, half: int, limit: float = 0.0
) -> Specialization:
    pointers = dict.fromkeys(("qk_ptr", "value_ptr", "cos_ptr", "sin_ptr", "out_ptr"), f"*{dtype}")
    pointers |= {"cache_ptr": f"*{cache}", "places_ptr": "*i64"}
    strides = {"qk_stride": "i32:16", "value_stride": "i32:16", "angle_stride": "i32", "half_stride": "i64:16"}
    constants = {
        "QUERY_HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": width,
        "HALF": half,
        "BLOCK_HALF": triton.next_power_of_2(half),
        "TAIL": 0 if width == 2 * half else triton.next_power_of_2(width - 2 * half),
        "LIMIT": limit,
        "BLOCK_HEADS": HEADS,
    }
    if limit:
        pointers["scales_ptr"] = "*fp32"
    return Specialization(
        kernel=_rope_kv_write,
        name=name,
        signature=pointers | strides | {"scale_half": "i64"},
        constants=constants if limit else constants | {"scales_ptr": None},
        targets=NVIDIA_FP8 if cache.startswith("fp8") else tuple(TARGETS),
    )


SPECIALIZATIONS = (
    _specialization("bf16, 32 + 8 heads of 128", "bf16", "bf16", heads=32, kv_heads=8, width=128, half=64),
    _specialization("fp16, 12 + 12 heads of 96, 32 turn", "fp16", "fp16", heads=12, kv_heads=12, width=96, half=16),
    _specialization("bf16 to fp8", "bf16", "fp8e4nv", heads=32, kv_heads=8, width=128, half=64, limit=448.0),
    _specialization("bf16 to int8", "bf16", "i8", heads=32, kv_heads=8, width=128, half=64, limit=127.0),
)

WORKS = (
    Work(
        operation="rope_kv_write",
        shape="8192 tokens, 32 heads of 128 over 8, bf16",
        bytes=8192 * 128 * 2 * (2 * 32 + 4 * 8 + 2),
        flops=6 * 8192 * 128 * 40,
        bound="bandwidth",
        target=0.8,
    ),
)
