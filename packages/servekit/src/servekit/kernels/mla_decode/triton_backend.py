"""Latent attention by Triton: sixteen heads read each compressed key once, as key and as value.

Long contexts are split among programs, whose parts are merged.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common_platform.kernels import NVIDIA_FP8, TARGETS, Specialization, Work
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

HEADS = 16  # of a program, the height of a tensor core's tile
KEYS = 32  # of a step
EIGHT_BIT_WARPS = 8  # of NVIDIA's, whose threads have not the registers for both forms of the keys


@triton.jit(do_not_specialize=["rows", "max_blocks"])
def _mla(
    query_ptr,
    cache_ptr,
    scales_ptr,  # None: the cache has the numbers themselves
    tables_ptr,
    contexts_ptr,
    parts_ptr,
    log_sums_ptr,
    rows,
    heads,
    block_size,
    max_blocks,
    scale,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT_UP: tl.constexpr,
    ROPE_UP: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row, split = tl.program_id(0), tl.program_id(2)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    latent, rope = tl.arange(0, LATENT_UP), tl.arange(0, ROPE_UP)
    WIDTH: tl.constexpr = LATENT + ROPE
    real = (head < heads)[:, None]
    line = query_ptr + (row.to(tl.int64) * heads + head)[:, None] * WIDTH
    query = tl.load(line + latent[None, :], mask=real & (latent < LATENT)[None, :], other=0.0)
    query_rope = tl.load(line + LATENT + rope[None, :], mask=real & (rope < ROPE)[None, :], other=0.0)
    context = tl.load(contexts_ptr + row)
    length = tl.cdiv(tl.cdiv(context, SPLITS), KEYS) * KEYS
    first = split * length
    last = tl.minimum(first + length, context)
    highest = tl.full((HEADS,), -1e30, dtype=tl.float32)
    total = tl.zeros((HEADS,), dtype=tl.float32)
    values = tl.zeros((HEADS, LATENT_UP), dtype=tl.float32)
    for start in range(first, last, KEYS):
        position = start + tl.arange(0, KEYS)
        is_key = position < last
        block = tl.load(tables_ptr + row * max_blocks + position // block_size, mask=is_key, other=0).to(tl.int64)
        token = block * block_size + position % block_size
        place = cache_ptr + token * WIDTH
        keys = tl.load(place[:, None] + latent[None, :], mask=is_key[:, None] & (latent < LATENT)[None, :], other=0.0)
        keys_rope = tl.load(
            place[None, :] + LATENT + rope[:, None], mask=is_key[None, :] & (rope < ROPE)[:, None], other=0.0
        )
        scores = tl.dot(query, tl.trans(keys.to(query.dtype)), input_precision="ieee")
        turned = tl.dot(query_rope, keys_rope.to(query.dtype), input_precision="ieee")
        if scales_ptr is not None:
            latent_scale = tl.load(scales_ptr + 2 * token, mask=is_key, other=0.0)
            scores *= latent_scale[None, :]
            turned *= tl.load(scales_ptr + 2 * token + 1, mask=is_key, other=0.0)[None, :]
        scores += turned
        scores = tl.where(is_key[None, :], scores * scale, float("-inf"))
        powers, rescale, highest, total = soften(scores, highest, total)
        if scales_ptr is not None:
            powers *= latent_scale[None, :]
        values = values * rescale[:, None] + tl.dot(
            powers.to(query.dtype), keys.to(query.dtype), input_precision="ieee"
        )
    values = values / tl.where(total > 0, total, 1.0)[:, None]
    place = (split.to(tl.int64) * rows + row) * heads + head
    tl.store(
        parts_ptr + place[:, None] * LATENT + latent[None, :],
        values.to(parts_ptr.dtype.element_ty),
        mask=real & (latent < LATENT)[None, :],
    )
    tl.store(log_sums_ptr + place, log_sum_of(highest, total), mask=head < heads)


def mla_decode(
    query: Tensor,
    cache: Tensor,
    tables: Tensor,
    contexts: Tensor,
    latent: int,
    scale: float,
    *,
    kv_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``reference.mla_decode``."""
    query = query.contiguous()
    rows, heads, width = query.shape
    block_size = cache.shape[1]
    splits = splits_of(rows * triton.cdiv(heads, HEADS), tables.shape[1] * block_size)
    parts = torch.empty(
        splits, rows, heads, latent, dtype=torch.float32 if splits > 1 else query.dtype, device=query.device
    )
    log_sums = torch.empty(splits, rows, heads, dtype=torch.float32, device=query.device)
    if not rows:
        return parts[0], log_sums[0]
    _mla[(rows, triton.cdiv(heads, HEADS), splits)](
        query,
        cache,
        kv_scales,
        tables,
        contexts,
        parts,
        log_sums,
        rows,
        heads,
        block_size,
        tables.shape[1],
        scale,
        **_constants(latent, width - latent, splits),
        num_warps=NUM_WARPS if kv_scales is None or torch.version.hip else EIGHT_BIT_WARPS,
        num_stages=num_stages(),
    )
    if splits == 1:
        return parts[0], log_sums[0]
    return merge_attention(parts, log_sums, query.dtype), log_sums.logsumexp(dim=0)


def _constants(latent: int, rope: int, splits: int) -> dict[str, int]:
    return {
        "LATENT": latent,
        "ROPE": rope,
        "LATENT_UP": max(triton.next_power_of_2(latent), LEAST),
        "ROPE_UP": max(triton.next_power_of_2(rope), LEAST),
        "HEADS": HEADS,
        "KEYS": KEYS,
        "SPLITS": splits,
    }


def _specialization(splits: int, stored: str) -> Specialization:
    name = f"bf16{'' if stored == 'bf16' else f' with {stored} keys'}, latent 512, rope 64"
    scales = {} if stored == "bf16" else {"scales_ptr": "*fp32"}
    return Specialization(
        kernel=_mla,
        name=f"{name}, {splits} split{'s' if splits > 1 else ''}",
        signature={"query_ptr": "*bf16", "cache_ptr": f"*{stored}", "tables_ptr": "*i32", "contexts_ptr": "*i32"}
        | {"parts_ptr": "*fp32" if splits > 1 else "*bf16", "log_sums_ptr": "*fp32"}
        | {"rows": "i32", "heads": "i32:16", "block_size": "i32:16", "max_blocks": "i32", "scale": "fp32"}
        | scales,
        constants=_constants(512, 64, splits) | ({} if scales else {"scales_ptr": None}),
        num_warps=EIGHT_BIT_WARPS if scales else NUM_WARPS,
        num_stages=NUM_STAGES,
        amd_stages=AMD_STAGES,
        amd_warps=NUM_WARPS,
        targets=NVIDIA_FP8 if stored.startswith("fp8") else tuple(TARGETS),
    )


SPECIALIZATIONS = (
    _specialization(1, "bf16"),
    _specialization(8, "bf16"),
    _specialization(8, "fp8e4nv"),
    _specialization(8, "i8"),
)

WORKS = (
    Work(
        operation="mla_decode",
        shape="64 rows x 4096 tokens, 16 heads, latent 512, rope 64, bf16",
        bytes=64 * 4096 * 576 * 2 + 64 * 16 * (576 + 512) * 2,
        flops=64 * 4096 * 16 * 2 * (576 + 512),
        bound="bandwidth",
        target=0.8,
    ),
    Work(
        operation="mla_decode",
        shape="64 rows x 4096 tokens, 16 heads, latent 512, rope 64, bf16 with fp8 keys and two scales a token",
        bytes=64 * 4096 * (576 + 8) + 64 * 16 * (576 + 512) * 2,
        flops=64 * 4096 * 16 * 2 * (576 + 512),
        bound="bandwidth",
        target=0.7,
    ),
    Work(
        operation="mla_decode",
        shape="64 rows x 4096 tokens, 128 heads, latent 512, rope 64, bf16",
        bytes=64 * 4096 * 576 * 2 + 64 * 128 * (576 + 512) * 2,
        flops=64 * 4096 * 128 * 2 * (576 + 512),
        bound="tensor cores",
        target=0.4,
    ),
)
