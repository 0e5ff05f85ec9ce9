"""Paged attention by Triton: one kernel for prefill, decode and both in one batch, and one that adds up splits.

A program computes a tile: some tokens of a row, all query heads of one KV head packed as the rows of its products.
Steps that decode only cut long contexts into splits, which are computed side by side and combined (Dao et al.,
"Flash-Decoding", 2023); the running softmax is Milakov and Gimelshein's (2018), in base 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common_platform.kernels import NVIDIA_FP8, TARGETS, Specialization, Work
from servekit.kernels.paged_attention.metadata import AttentionMetadata, PagedRows, paged_rows
from servekit.kernels.tuning import Tuned, stages, tuned

LOG2E = 1.4426950408889634
MAX_SPLITS = 32
SPLIT_KEYS = 256  # a split has at least so many
PROGRAMS = 264  # wanted at once: two for each multiprocessor of an H100
DECODE = Tuned(block_n=64, num_warps=4, num_stages=3)
PREFILL = Tuned(block_n=64, num_warps=8, num_stages=2)


@triton.jit
def _turn(
    q,
    acc,
    m,
    length,
    first_key,
    end,
    positions,
    kv_head,
    cache_ptr,
    scales_ptr,
    tables,
    half,
    scale_half,
    score_scale,
    soft_cap,
    window,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The next ``BLOCK_N`` keys: their scores, and the softmax so far brought up to date."""
    n = first_key + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    there = n < end
    block = tl.load(tables + n // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
    place = (block * BLOCK_SIZE + n % BLOCK_SIZE) * KV_HEADS + kv_head
    offsets = place[:, None] * HEAD_DIM + d[None, :]
    if MASKED or BLOCK_D != HEAD_DIM:
        inside = there[:, None] & (d < HEAD_DIM)[None, :]
        k = tl.load(cache_ptr + offsets, mask=inside, other=0.0)
    else:
        k = tl.load(cache_ptr + offsets)
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
    if scales_ptr is not None:
        scores *= tl.load(scales_ptr + place, mask=there, other=0.0)[None, :]
    scores *= score_scale
    if HAS_CAP:
        scores = soft_cap * (1.0 - 2.0 / (tl.exp2(scores * 2.8853900817779268) + 1.0))
    if MASKED:
        seen = there[None, :] & (n[None, :] <= positions[:, None])
        if HAS_WINDOW:
            seen = seen & (n[None, :] > positions[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    new_m = tl.maximum(m, tl.max(scores, axis=1))
    base = tl.where(new_m == float("-inf"), 0.0, new_m)
    weights = tl.exp2(scores - base[:, None])
    alpha = tl.exp2(m - base)
    length = length * alpha + tl.sum(weights, axis=1)
    if MASKED or BLOCK_D != HEAD_DIM:
        v = tl.load(cache_ptr + half + offsets, mask=inside, other=0.0)
    else:
        v = tl.load(cache_ptr + half + offsets)
    if scales_ptr is not None:
        weights *= tl.load(scales_ptr + scale_half + place, mask=there, other=0.0)[None, :]
    acc = acc * alpha[:, None]
    acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee")
    return acc, new_m, length


@triton.jit(do_not_specialize=["table_stride"])
def _attend(
    q_ptr,
    cache_ptr,
    scales_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    tables_ptr,
    contexts_ptr,
    firsts_ptr,
    tiles_ptr,
    q_stride,
    q_head_stride,
    table_stride,
    half,
    scale_half,
    score_scale,
    soft_cap,
    window,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid: tiles, KV heads, splits. ``score_scale`` has log2(e) in it, or 1 / soft_cap where there is a cap."""
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    TOKENS: tl.constexpr = BLOCK_M // GROUPS
    row, first = tile, 0
    if tiles_ptr is not None:
        row = tl.load(tiles_ptr + 2 * tile)
        first = tl.load(tiles_ptr + 2 * tile + 1)
    context = tl.load(contexts_ptr + row)
    begin = tl.load(firsts_ptr + row)
    count = tl.load(firsts_ptr + row + 1) - begin
    m_index = tl.arange(0, BLOCK_M)
    token = first + m_index // GROUPS
    head = kv_head * GROUPS + m_index % GROUPS
    live = (token < count) & (m_index < TOKENS * GROUPS) & (token < context)
    positions = context - count + token
    d = tl.arange(0, BLOCK_D)
    inside = live[:, None] & (d < HEAD_DIM)[None, :]
    q_rows = (begin + token).to(tl.int64)
    q = tl.load(q_ptr + q_rows[:, None] * q_stride + head[:, None] * q_head_stride + d[None, :], mask=inside, other=0.0)
    end = tl.minimum(context - count + first + TOKENS, context)
    start = 0
    if HAS_WINDOW:
        start = tl.maximum(context - count + first - window + 1, 0)
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(end - start, SPLITS), BLOCK_N) * BLOCK_N
        start = start + split * share
        end = tl.minimum(start + share, end)
    tables = tables_ptr + row.to(tl.int64) * table_stride
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    length = tl.zeros([BLOCK_M], tl.float32)
    plain_end = start
    if not HAS_WINDOW:  # keys that every token of the tile sees need no mask
        plain = tl.minimum(context - count + first + 1, end) - start
        plain_end = start + tl.maximum(plain, 0) // BLOCK_N * BLOCK_N
    for masked in tl.static_range(1 if HAS_WINDOW else 0, 2):
        for first_key in range(plain_end if masked else start, end if masked else plain_end, BLOCK_N):
            acc, m, length = _turn(
                q,
                acc,
                m,
                length,
                first_key,
                end,
                positions,
                kv_head,
                cache_ptr,
                scales_ptr,
                tables,
                half,
                scale_half,
                score_scale,
                soft_cap,
                window,
                masked == 1,
                HAS_WINDOW,
                HAS_CAP,
                KV_HEADS,
                HEAD_DIM,
                BLOCK_SIZE,
                BLOCK_N,
                BLOCK_D,
            )
    if SPLITS == 1 and sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=live, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(m, sink)
        top = tl.where(top == float("-inf"), 0.0, top)
        acc = acc * tl.exp2(m - top)[:, None]
        length = length * tl.exp2(m - top) + tl.exp2(sink - top)
    acc = acc / tl.where(length == 0.0, 1.0, length)[:, None]
    number = (q_rows * KV_HEADS * GROUPS + head) * SPLITS + split
    tl.store(out_ptr + number[:, None] * HEAD_DIM + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)
    if SPLITS > 1:
        lse = tl.where(length == 0.0, float("-inf"), m + tl.log2(tl.where(length == 0.0, 1.0, length)))
        tl.store(lse_ptr + number, lse, mask=live)


@triton.jit
def _combine(
    parts_ptr,
    lse_ptr,
    sinks_ptr,
    out_ptr,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid: rows, heads. Each split's share is what its part of the context weighs."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = (row * heads + head) * SPLITS
    splits, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + first + splits)
    top = tl.max(lse, axis=0)
    sink = float("-inf")
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    share = tl.exp2(lse - top)
    total = tl.sum(share, axis=0)
    if sinks_ptr is not None:
        total += tl.exp2(sink - top)
    parts = tl.load(
        parts_ptr + (first + splits)[:, None] * HEAD_DIM + d[None, :],
        mask=((share > 0.0)[:, None]) & (d < HEAD_DIM)[None, :],
        other=0.0,
    )
    out = tl.sum(parts * share[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + (row * heads + head) * HEAD_DIM + d, out.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)


def paged_attention(
    query: Tensor,
    cache: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    soft_cap: float = 0.0,
    *,
    sinks: Tensor | None = None,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """As ``reference.paged_attention``. A step that only decodes is cut into splits, any other is one launch."""
    rows = metadata.paged
    if rows is None:
        if metadata.rows is None:
            raise ValueError("metadata.rows: None, must be what build_metadata leaves there")
        rows = metadata.paged = paged_rows(metadata.rows, query.device)
    heads, width = query.shape[1:]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if len(query) == 0:
        return out
    groups = heads // cache.shape[3]
    if rows.max_count == 1:
        block_m = max(16, triton.next_power_of_2(groups))
        splits = num_splits(len(rows.contexts), cache.shape[3], rows.max_context)
        config = tuned("paged_attention_decode", DECODE, head_dim=width, groups=groups)
        if splits == 1:
            _launch(query, cache, rows, None, out, None, scale, soft_cap, sinks, kv_scales, block_m, 1, config)
            return out
        parts = torch.empty((*query.shape[:2], splits, width), dtype=torch.float32, device=query.device)
        lse = torch.empty(parts.shape[:3], dtype=torch.float32, device=query.device)
        _launch(query, cache, rows, None, parts, lse, scale, soft_cap, None, kv_scales, block_m, splits, config)
        block_d = triton.next_power_of_2(width)
        _combine[(len(query), heads)](parts, lse, sinks, out, heads, width, block_d, splits, num_warps=2)
        return out
    config = tuned("paged_attention_prefill", PREFILL, head_dim=width, groups=groups)
    most = (128 if width <= 128 else 64) if query.dtype != torch.float32 else 16
    block_m = min(triton.next_power_of_2(rows.max_count * groups), most)
    block_m = max(block_m, 16, triton.next_power_of_2(groups))  # a tile holds one token's heads at the least
    tiles = rows.tiles_of(block_m // groups, query.device)
    _launch(query, cache, rows, tiles, out, None, scale, soft_cap, sinks, kv_scales, block_m, 1, config)
    return out


def num_splits(rows: int, kv_heads: int, max_context: int) -> int:
    """Into how many parts a decode step cuts each context: a power of two that keeps the device busy, no part short."""
    wanted = -(-PROGRAMS // max(rows * kv_heads, 1))
    most = max(max_context // SPLIT_KEYS, 1)
    return 1 << (min(wanted, most, MAX_SPLITS).bit_length() - 1)


def _launch(
    query: Tensor,
    cache: Tensor,
    rows: PagedRows,
    tiles: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    scale: float,
    soft_cap: float,
    sinks: Tensor | None,
    kv_scales: Tensor | None,
    block_m: int,
    splits: int,
    config: Tuned,
) -> None:
    heads, width = query.shape[1:]
    kv_heads = cache.shape[3]
    if query.stride(2) != 1:
        query = query.contiguous()
    grid = (len(rows.contexts) if tiles is None else len(tiles), kv_heads, splits)
    block_n = min(config.block_n, 16 if query.dtype == torch.float32 else 32 if width > 128 else 256)
    _attend[grid](
        query,
        cache,
        kv_scales,
        sinks,
        out,
        lse,
        rows.tables,
        rows.contexts,
        rows.firsts,
        tiles,
        query.stride(0),
        query.stride(1),
        rows.tables.stride(0),
        cache.stride(0),
        0 if kv_scales is None else kv_scales.stride(0),
        scale / soft_cap if soft_cap else scale * LOG2E,
        soft_cap * LOG2E,
        rows.window,
        rows.window > 0,
        soft_cap > 0,
        kv_heads,
        heads // kv_heads,
        width,
        cache.shape[2],
        block_m,
        block_n,
        max(triton.next_power_of_2(width), 16),
        splits,
        num_warps=config.num_warps if block_m > 32 or tiles is None else 4,
        num_stages=stages(config.num_stages if block_n == config.block_n else 2),
    )


def _specialization(
    name: str,
    dtype: str,
    cache: str,
    *,
    groups: int,
    width: int,
    block_m: int,
    config: Tuned,
    splits: int = 1,
    prefill: bool = False,
    window: bool = False,
    soft_cap: bool = False,
    sinks: bool = False,
) -> Specialization:
    scaled = cache != dtype
    block_n = min(config.block_n, 16 if dtype == "fp32" else 32 if width > 128 else 256)
    pointers = {
        "q_ptr": f"*{dtype}",
        "cache_ptr": f"*{cache}",
        "scales_ptr": "*fp32" if scaled else None,
        "sinks_ptr": "*fp32" if sinks else None,
        "out_ptr": "*fp32" if splits > 1 else f"*{dtype}",
        "lse_ptr": "*fp32" if splits > 1 else None,
        "tables_ptr": "*i32",
        "contexts_ptr": "*i32",
        "firsts_ptr": "*i32",
        "tiles_ptr": "*i32" if prefill else None,
    }
    numbers = {
        "q_stride": "i32:16",
        "q_head_stride": "i32:16",
        "table_stride": "i32",
        "half": "i64:16",
        "scale_half": "i64",
        "score_scale": "fp32",
        "soft_cap": "fp32",
        "window": "i32",
    }
    constants = {
        "HAS_WINDOW": window,
        "HAS_CAP": soft_cap,
        "KV_HEADS": 8,
        "GROUPS": groups,
        "HEAD_DIM": width,
        "BLOCK_SIZE": 16,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": max(triton.next_power_of_2(width), 16),
        "SPLITS": splits,
    }
    return Specialization(
        kernel=_attend,
        name=name,
        signature={key: kind for key, kind in pointers.items() if kind} | numbers,
        constants=constants | {key: None for key, kind in pointers.items() if kind is None},
        num_warps=config.num_warps if block_m > 32 or not prefill else 4,
        num_stages=config.num_stages if block_n == config.block_n else 2,
        targets=NVIDIA_FP8 if cache.startswith("fp8") else tuple(TARGETS),
    )


def _decode(name: str, dtype: str, cache: str, groups: int, width: int, **more: object) -> Specialization:
    return _specialization(name, dtype, cache, groups=groups, width=width, block_m=16, config=DECODE, **more)


def _prefill(name: str, dtype: str, groups: int, width: int, block_m: int, **more: object) -> Specialization:
    return _specialization(
        name, dtype, dtype, groups=groups, width=width, block_m=block_m, config=PREFILL, prefill=True, **more
    )


SPECIALIZATIONS = (
    _decode("decode, bf16, head_dim 128, 8 splits", "bf16", "bf16", 4, 128, splits=8),
    _decode("decode, bf16, head_dim 128, one split, sinks", "bf16", "bf16", 4, 128, sinks=True),
    _decode("decode, bf16, head_dim 64, window", "bf16", "bf16", 8, 64, window=True),
    _decode("decode, fp16, head_dim 96, soft cap, 4 splits", "fp16", "fp16", 1, 96, soft_cap=True, splits=4),
    _decode("decode, bf16, head_dim 256, 4 splits", "bf16", "bf16", 2, 256, splits=4),
    _decode("decode, bf16 with fp8 keys, 8 splits", "bf16", "fp8e4nv", 4, 128, splits=8),
    _decode("decode, bf16 with int8 keys, 8 splits", "bf16", "i8", 4, 128, splits=8),
    _decode("decode, fp32, head_dim 128", "fp32", "fp32", 4, 128),
    _prefill("prefill, bf16, head_dim 128", "bf16", 4, 128, 128),
    _prefill("prefill, bf16, head_dim 64, window, sinks", "bf16", 8, 64, 128, window=True, sinks=True),
    _prefill("prefill, bf16, head_dim 256, soft cap", "bf16", 2, 256, 64, soft_cap=True),
    _prefill("prefill, fp16, head_dim 80", "fp16", 1, 80, 128),
    _prefill("prefill, fp32, head_dim 128", "fp32", 4, 128, 16),
    *(
        Specialization(
            kernel=_combine,
            name=f"head_dim {width}, {splits} splits",
            signature={"parts_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": "*bf16", "heads": "i32"},
            constants={"sinks_ptr": None, "HEAD_DIM": width, "BLOCK_D": width, "SPLITS": splits},
            num_warps=2,
        )
        for width, splits in ((128, 8), (256, 32))
    ),
)


def _decode_bytes(rows: int, context: int, kv_heads: int, width: int, element: int, scales: int = 0) -> int:
    return rows * context * kv_heads * 2 * (width * element + scales)


WORKS = (
    Work(
        operation="paged_attention, decode",
        shape="64 rows x 4096 tokens, 32 heads of 128 over 8, bf16",
        bytes=_decode_bytes(64, 4096, 8, 128, 2) + 2 * 64 * 32 * 128 * 2,
        flops=4 * 64 * 4096 * 32 * 128,
        bound="bandwidth",
        target=0.85,
    ),
    Work(
        operation="paged_attention, decode",
        shape="64 rows x 4096 tokens, 32 heads of 128 over 8, bf16 with fp8 keys and a scale a head",
        bytes=_decode_bytes(64, 4096, 8, 128, 1, 4) + 2 * 64 * 32 * 128 * 2,
        flops=4 * 64 * 4096 * 32 * 128,
        bound="bandwidth",
        target=0.75,
    ),
    Work(
        operation="paged_attention, decode",
        shape="1 row x 65536 tokens, 32 heads of 128 over 8, bf16",
        bytes=_decode_bytes(1, 65536, 8, 128, 2),
        flops=4 * 65536 * 32 * 128,
        bound="bandwidth",
        target=0.7,
    ),
    Work(
        operation="paged_attention, prefill",
        shape="1 row of 8192 tokens, 32 heads of 128 over 8, bf16, causal",
        bytes=2 * 8192 * (32 + 8) * 128 * 2,
        flops=4 * 8192 * 8192 // 2 * 32 * 128,
        bound="tensor cores",
        target=0.6,
    ),
)
