"""Attention with a shared prefix by Triton: one kernel, twice.

For the prefix the queries of all rows are one matrix, so keys are read once for many rows and the tensor cores are
full; for a row's own tokens the matrix is the queries of one KV head. Parts are merged by their log-sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common_platform.kernels import Specialization, Work
from servekit.kernels.merge_attention.triton_backend import (
    AMD_STAGES,
    LEAST,
    NUM_STAGES,
    NUM_WARPS,
    log_sum_of,
    merge_attention,
    num_stages,
    soften,
    splits_of,
)

KEYS = 64  # of a step


@triton.jit(do_not_specialize=["rows", "max_blocks", "prefix", "first_part"])
def _part(
    query_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    contexts_ptr,
    parts_ptr,
    log_sums_ptr,
    rows,
    heads,
    kv_heads,
    block_size,
    max_blocks,
    prefix,
    first_part,
    scale,
    soft_cap,
    window,
    SHARED: tl.constexpr,  # the prefix, for all rows at once; else the rest, row by row
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    GROUP: tl.constexpr,  # heads of a KV head
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_UP: tl.constexpr,
    SPLITS: tl.constexpr,
):
    kv_head, split = tl.program_id(1), tl.program_id(2)
    columns = tl.arange(0, WIDTH_UP)
    inside = columns < WIDTH
    lane = tl.arange(0, QUERIES)
    if SHARED:
        lane += tl.program_id(0) * QUERIES
        row = lane // GROUP
        is_query = row < rows
        table = tables_ptr
        start, end = 0, prefix
        if WINDOWED:  # where the row begins to see
            seen_from = tl.load(contexts_ptr + row, mask=is_query, other=2147483647) - window
            start = tl.maximum(tl.min(seen_from, axis=0), 0)
    else:
        row = lane * 0 + tl.program_id(0)
        is_query = lane < GROUP
        table = tables_ptr + tl.program_id(0).to(tl.int64) * max_blocks
        start, end = prefix, tl.load(contexts_ptr + tl.program_id(0))
        if WINDOWED:
            seen_from = lane * 0 + end - window
            start = tl.maximum(start, end - window)
    head = row.to(tl.int64) * heads + kv_head * GROUP + lane % GROUP
    real = is_query[:, None] & inside[None, :]
    query = tl.load(query_ptr + head[:, None] * WIDTH + columns[None, :], mask=real, other=0.0)
    length = tl.cdiv(tl.cdiv(end - start, SPLITS), KEYS) * KEYS
    first = start + split * length
    last = tl.minimum(first + length, end)
    highest = tl.full((QUERIES,), -1e30, dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    result = tl.zeros((QUERIES, WIDTH_UP), dtype=tl.float32)
    for begin in range(first, last, KEYS):
        position = begin + tl.arange(0, KEYS)
        is_key = position < last
        block = tl.load(table + position // block_size, mask=is_key, other=0).to(tl.int64)
        place = ((block * block_size + position % block_size) * kv_heads + kv_head) * WIDTH
        keys = tl.load(keys_ptr + place[None, :] + columns[:, None], mask=is_key[None, :] & inside[:, None], other=0.0)
        scores = tl.dot(query, keys.to(query.dtype), input_precision="ieee") * scale
        if CAPPED:
            scores = soft_cap * (1.0 - 2.0 / (tl.exp(2.0 * scores / soft_cap) + 1.0))
        is_seen = is_key[None, :]
        if WINDOWED:
            is_seen = is_seen & (position[None, :] >= seen_from[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        powers, rescale, highest, total = soften(scores, highest, total)
        values = tl.load(
            values_ptr + place[:, None] + columns[None, :], mask=is_key[:, None] & inside[None, :], other=0.0
        )
        result = result * rescale[:, None] + tl.dot(
            powers.to(query.dtype), values.to(query.dtype), input_precision="ieee"
        )
    result = result / tl.where(total > 0, total, 1.0)[:, None]
    place = (first_part + split).to(tl.int64) * rows * heads + head
    tl.store(parts_ptr + place[:, None] * WIDTH + columns[None, :], result, mask=real)
    tl.store(log_sums_ptr + place, log_sum_of(highest, total), mask=is_query)


def cascade_attention(
    query: Tensor,
    cache: Tensor,
    tables: Tensor,
    contexts: Tensor,
    prefix: int,
    scale: float,
    soft_cap: float = 0.0,
    *,
    window: int = 0,
    sinks: Tensor | None = None,
) -> Tensor:
    """As ``reference.cascade_attention``."""
    query = query.contiguous()
    rows, heads, width = query.shape
    _, _, block_size, kv_heads, _ = cache.shape
    if not rows:
        return query.clone()
    group = heads // kv_heads
    together = queries_of(rows * group)
    tall = triton.cdiv(rows * group, together)
    shared = splits_of(tall * kv_heads, prefix) if prefix else 0
    own = splits_of(rows * kv_heads, tables.shape[1] * block_size - prefix)
    parts = torch.empty(shared + own, rows, heads, width, dtype=torch.float32, device=query.device)
    log_sums = torch.empty(shared + own, rows, heads, dtype=torch.float32, device=query.device)

    def launch(grid: tuple[int, int, int], first_part: int, queries: int, *, is_shared: bool) -> None:
        _part[grid](
            query,
            cache[0],
            cache[1],
            tables,
            contexts,
            parts,
            log_sums,
            rows,
            heads,
            kv_heads,
            block_size,
            tables.shape[1],
            prefix,
            first_part,
            scale,
            soft_cap,
            window,
            **_constants(group, queries, width, grid[2], is_shared=is_shared, capped=soft_cap > 0, windowed=window > 0),
            num_warps=_warps(is_shared=is_shared, windowed=window > 0),
            num_stages=num_stages(),
        )

    if shared:
        launch((tall, kv_heads, shared), 0, together, is_shared=True)
    launch((rows, kv_heads, own), shared, max(16, triton.next_power_of_2(group)), is_shared=False)
    return merge_attention(parts, log_sums, query.dtype, sinks=sinks)


def _warps(*, is_shared: bool, windowed: bool) -> int:
    """A tile of many rows' queries keeps where each begins to see as well."""
    return 2 * NUM_WARPS if is_shared and windowed else NUM_WARPS


def queries_of(count: int) -> int:
    """The height of a tile for the prefix."""
    return max(16, min(64, triton.next_power_of_2(count)))


def _constants(
    group: int, queries: int, width: int, splits: int, *, is_shared: bool, capped: bool, windowed: bool
) -> dict[str, int | bool]:
    return {
        "SHARED": is_shared,
        "CAPPED": capped,
        "WINDOWED": windowed,
        "GROUP": group,
        "QUERIES": queries,
        "KEYS": KEYS,
        "WIDTH": width,
        "WIDTH_UP": max(triton.next_power_of_2(width), LEAST),
        "SPLITS": splits,
    }


def _specialization(
    name: str, queries: int, *, is_shared: bool, capped: bool = False, windowed: bool = False
) -> Specialization:
    pointers = ("query_ptr", "keys_ptr", "values_ptr")
    sizes = {"rows": "i32", "heads": "i32:16", "kv_heads": "i32", "block_size": "i32:16", "max_blocks": "i32"}
    scalars = {"prefix": "i32", "first_part": "i32", "scale": "fp32", "soft_cap": "fp32", "window": "i32"}
    return Specialization(
        kernel=_part,
        name=f"bf16, head_dim 128, {name}",
        signature=dict.fromkeys(pointers, "*bf16")
        | {"tables_ptr": "*i32", "contexts_ptr": "*i32", "parts_ptr": "*fp32", "log_sums_ptr": "*fp32"}
        | sizes
        | scalars,
        constants=_constants(4, queries, 128, 4, is_shared=is_shared, capped=capped, windowed=windowed),
        num_warps=_warps(is_shared=is_shared, windowed=windowed),
        num_stages=NUM_STAGES,
        amd_stages=AMD_STAGES,
    )


SPECIALIZATIONS = (
    _specialization("prefix of all rows", 64, is_shared=True),
    _specialization("each row's own", 16, is_shared=False),
    _specialization("prefix of all rows, soft cap", 64, is_shared=True, capped=True),
    _specialization("prefix of all rows, window", 64, is_shared=True, windowed=True),
    _specialization("each row's own, window", 16, is_shared=False, windowed=True),
)


def _work(rows: int, prefix: int, own: int) -> Work:
    heads, kv_heads, width = 32, 8, 128
    keys = (prefix + rows * own) * 2 * kv_heads * width * 2
    return Work(
        operation="cascade_attention",
        shape=f"{rows} rows, {prefix} shared and {own} own tokens, 32 heads, 8 KV heads, head_dim 128, bf16",
        bytes=keys + rows * heads * width * 2 * 2,
        flops=rows * (prefix + own) * heads * width * 4,
        bound="bandwidth",
        target=0.6,
    )


WORKS = (_work(64, 8192, 256),)
