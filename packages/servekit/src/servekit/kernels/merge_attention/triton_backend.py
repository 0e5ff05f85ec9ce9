"""Merging by Triton: one program for a head of a row; and what the kernels whose parts it merges have in common."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common_platform.kernels import Specialization, Work

PROGRAMS = 264  # to have at least: two for each multiprocessor of an H100
MOST_SPLITS = 16
SHORTEST = 256  # keys of a split at the least
LEAST = 16  # numbers that a product adds up, or a device has no instruction for it
NUM_WARPS = 4
NUM_STAGES = 2
AMD_STAGES = 1  # whose registers hold one step's keys, not two


@triton.jit
def soften(scores, highest, total):
    """The next scores, ``-inf`` where a key is not seen, beside those so far.

    Their powers, what the earlier sums are multiplied by, the highest score and the sum of the powers up to here.
    """
    higher = tl.maximum(highest, tl.max(scores, axis=1))
    rescale = tl.exp(highest - higher)
    powers = tl.exp(scores - higher[:, None])
    return powers, rescale, higher, total * rescale + tl.sum(powers, axis=1)


@triton.jit
def log_sum_of(highest, total):
    """The logarithm of the sum of a part's powers, minus infinity where it has no keys."""
    return tl.where(total > 0, highest + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))


def num_stages() -> int:
    return AMD_STAGES if torch.version.hip else NUM_STAGES


def splits_of(programs: int, longest: int) -> int:
    """Parts of some keys: enough for every multiprocessor, none too short; by sizes that the host knows."""
    splits = 1
    while splits < MOST_SPLITS and programs * splits < PROGRAMS and longest >= splits * 2 * SHORTEST:
        splits *= 2
    return splits


@triton.jit(do_not_specialize=["heads_of_all_rows"])
def _merge(
    parts_ptr,
    log_sums_ptr,
    sinks_ptr,  # None: there are none
    out_ptr,
    heads_of_all_rows,
    heads,
    width,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    highest = float("-inf")
    for part in range(PARTS):
        highest = tl.maximum(highest, tl.load(log_sums_ptr + part * heads_of_all_rows + head))
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head % heads).to(tl.float32)
        highest = tl.maximum(highest, sink)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    merged = tl.zeros((WIDTH,), dtype=tl.float32)
    total = 0.0
    if sinks_ptr is not None:
        total += tl.exp(sink - highest)
    for part in range(PARTS):
        place = part * heads_of_all_rows + head
        weight = tl.exp(tl.load(log_sums_ptr + place) - highest)
        value = tl.load(parts_ptr + place * width + columns, mask=inside, other=0.0)
        merged += tl.where(weight > 0, weight * value, 0.0)  # a part without keys may hold anything
        total += weight
    merged = merged / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + head * width + columns, merged.to(out_ptr.dtype.element_ty), mask=inside)


def merge_attention(parts: Tensor, log_sums: Tensor, dtype: torch.dtype, *, sinks: Tensor | None = None) -> Tensor:
    """As ``reference.merge_attention``."""
    num_parts, rows, heads, width = parts.shape
    out = torch.empty(rows, heads, width, dtype=dtype, device=parts.device)
    if out.numel():
        wide = triton.next_power_of_2(width)
        given = (parts, log_sums, sinks, out, rows * heads, heads, width)
        _merge[(rows * heads,)](*given, PARTS=num_parts, WIDTH=wide, num_warps=_warps(wide))
    return out


def _warps(width: int) -> int:
    return max(1, min(4, width // 128))


SPECIALIZATIONS = tuple(
    Specialization(
        kernel=_merge,
        name=f"16 parts, width {width}, to bf16{', sinks' if sinks else ''}",
        signature={"parts_ptr": "*fp32", "log_sums_ptr": "*fp32", "out_ptr": "*bf16"}
        | {"heads_of_all_rows": "i32:16", "heads": "i32", "width": "i32:16"}
        | ({"sinks_ptr": "*fp32"} if sinks else {}),
        constants={"PARTS": 16, "WIDTH": width} | ({} if sinks else {"sinks_ptr": None}),
        num_warps=_warps(width),
    )
    for width, sinks in ((128, False), (512, False), (128, True))
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
