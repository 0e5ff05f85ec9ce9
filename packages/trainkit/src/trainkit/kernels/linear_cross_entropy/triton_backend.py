"""What goes over some columns of the logits, by Triton: read once forward, read and written once backward."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from common_platform.kernels import Specialization, Work

BLOCK = 2048
NUM_WARPS = 8


@triton.jit
def _fold(logits_ptr, targets_ptr, highest_ptr, total_ptr, chosen_ptr, columns, stride, first, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    line = logits_ptr + token * stride
    highest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logits = tl.load(line + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        highest = tl.maximum(highest, logits)
    before = tl.load(highest_ptr + token)
    higher = tl.maximum(tl.max(highest, axis=0), before)
    powers = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, columns, BLOCK):  # the row is in the cache by now
        column = start + tl.arange(0, BLOCK)
        logits = tl.load(line + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        powers += tl.exp(logits - higher)
    total = tl.load(total_ptr + token) * tl.exp(before - higher) + tl.sum(powers, axis=0)
    tl.store(highest_ptr + token, higher)
    tl.store(total_ptr + token, total)
    target = tl.load(targets_ptr + token)
    is_here = (target >= first) & (target < first + columns)
    if is_here:
        tl.store(chosen_ptr + token, tl.load(line + target - first).to(tl.float32))


@triton.jit
def _to_gradient(logits_ptr, targets_ptr, log_sums_ptr, scales_ptr, columns, stride, first, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places = logits_ptr + token * stride + column
    logits = tl.load(places, mask=column < columns, other=0.0)
    target = tl.load(targets_ptr + token)
    share = tl.exp(logits.to(tl.float32) - tl.load(log_sums_ptr + token))
    share -= (column + first == target).to(tl.float32)
    share *= tl.load(scales_ptr + token)
    tl.store(places, share.to(logits.dtype), mask=column < columns)


def fold(logits: Tensor, targets: Tensor, first: int, highest: Tensor, total: Tensor, chosen: Tensor) -> None:
    """As ``reference.fold``."""
    tokens, columns = logits.shape
    if tokens:
        _fold[(tokens,)](
            logits,
            targets,
            highest,
            total,
            chosen,
            columns,
            logits.stride(0),
            first,
            BLOCK=_block(columns),
            num_warps=NUM_WARPS,
        )


def to_gradient(logits: Tensor, targets: Tensor, first: int, log_sums: Tensor, scales: Tensor) -> None:
    """As ``reference.to_gradient``."""
    tokens, columns = logits.shape
    if tokens:
        block = _block(columns)
        _to_gradient[(tokens, triton.cdiv(columns, block))](
            logits, targets, log_sums, scales, columns, logits.stride(0), first, BLOCK=block, num_warps=NUM_WARPS
        )


def _block(columns: int) -> int:
    return min(BLOCK, triton.next_power_of_2(columns))


_SIZES = {"columns": "i32:16", "stride": "i32:16", "first": "i32"}

SPECIALIZATIONS = (
    Specialization(
        kernel=_fold,
        name="bf16, 8192 columns",
        signature={"logits_ptr": "*bf16", "targets_ptr": "*i64", "highest_ptr": "*fp32", "total_ptr": "*fp32"}
        | {"chosen_ptr": "*fp32"}
        | _SIZES,
        constants={"BLOCK": BLOCK},
        num_warps=NUM_WARPS,
    ),
    Specialization(
        kernel=_to_gradient,
        name="bf16, 8192 columns",
        signature={"logits_ptr": "*bf16", "targets_ptr": "*i64", "log_sums_ptr": "*fp32", "scales_ptr": "*fp32"}
        | _SIZES,
        constants={"BLOCK": BLOCK},
        num_warps=NUM_WARPS,
    ),
)


def _work(tokens: int, width: int, vocab: int) -> Work:
    """Of both passes: the head twice, its two gradients, and the logits through memory in parts."""
    operands = 2 * (vocab * width + tokens * width)
    return Work(
        operation="linear_cross_entropy (forward and backward)",
        shape=f"{tokens} tokens, width {width}, vocabulary {vocab}, bf16",
        bytes=4 * operands + 7 * tokens * vocab * 2,
        flops=4 * 2 * tokens * vocab * width,
        bound="tensor cores",
        target=0.6,
    )


WORKS = (_work(8192, 4096, 128256),)
