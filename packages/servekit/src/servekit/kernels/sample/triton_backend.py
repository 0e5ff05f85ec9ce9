"""Sampling without a sort: the threshold of top-k and of top-p is searched for among all floats, 8 pivots a pass.

A row's logits are read once for the maximum and the sum, at most eleven times for each threshold that the row asks for,
and once for the draw; they stay in the second-level cache meanwhile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common_platform.kernels import Specialization, Work

BLOCK = 1024
PER_ROW = [f"{name}_ptr" for name in ("temperature", "top_k", "top_p", "min_p", "seeds")]  # a number a row


@triton.jit
def _key(x):
    """A whole number that orders as the float ``x`` does."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _search(row_ptr, vocab, low, high, floor, wanted, top, inverse, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key ``t`` for which the tokens with keys >= ``t`` (and >= ``floor``) reach ``wanted``.

    They are counted, or their shares ``exp((x - top) * inverse)`` summed. ``low`` reaches it, nothing above ``high``.
    """
    eight = tl.arange(0, 8).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    while low < high:
        gap = high - low
        pivots = low + (gap * (eight + 1) + 7) // 8  # ends with high
        sums = tl.zeros([8], tl.float32)
        for first in range(0, vocab, BLOCK):
            inside = first + columns < vocab
            x = tl.load(row_ptr + first + columns, mask=inside, other=float("-inf"))
            key = _key(x).to(tl.int64)
            if BY_COUNT:
                worth = tl.where(inside & (key >= floor), 1.0, 0.0)
            else:
                worth = tl.where(inside & (key >= floor), tl.exp((x - top) * inverse), 0.0)
            sums += tl.sum(tl.where(key[:, None] >= pivots[None, :], worth[:, None], 0.0), axis=0)
        reached = sums >= wanted
        low = tl.maximum(low, tl.max(tl.where(reached, pivots, low), axis=0))
        high = tl.minimum(high, tl.min(tl.where(reached, high, pivots - 1), axis=0))
    return low


@triton.jit(do_not_specialize_on_alignment=PER_ROW)
def _sample(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    tokens_ptr,
    highest_ptr,
    vocab,
    stride,
    BLOCK: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    temperature = tl.load(temperature_ptr + row)
    columns = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    at = tl.zeros([BLOCK], tl.int32)
    broken = tl.zeros([BLOCK], tl.int32)
    for first in range(0, vocab, BLOCK):
        x = tl.load(row_ptr + first + columns, mask=first + columns < vocab, other=float("-inf"))
        broken += (x != x).to(tl.int32)
        better = x > best
        best = tl.where(better, x, best)
        at = tl.where(better, first + columns, at)
    top = tl.max(best, axis=0)
    token = tl.min(tl.where(best == top, at, 2147483647), axis=0)
    is_broken = tl.sum(broken, axis=0) > 0
    tl.store(highest_ptr + row, tl.where(is_broken, float("nan"), top))
    if (temperature > 0) & (top > float("-inf")) & (top < float("inf")):
        inverse = 1.0 / temperature
        min_p = tl.load(min_p_ptr + row)
        floor = _key(tl.full([1], float("-inf"), tl.float32)).to(tl.int64) + 1
        if min_p > 0:
            lowest = top + tl.log(min_p) * temperature
            floor = _key(tl.zeros([1], tl.float32) + lowest).to(tl.int64)
        floor = tl.max(floor, axis=0)
        high = tl.max(_key(tl.zeros([1], tl.float32) + top).to(tl.int64), axis=0)
        floor = tl.minimum(floor, high)
        top_k = tl.load(top_k_ptr + row)
        if top_k < vocab:
            floor = _search(row_ptr, vocab, floor, high, floor, top_k.to(tl.float32), top, inverse, True, BLOCK)
        top_p = tl.load(top_p_ptr + row)
        if top_p < 1.0:
            total = tl.zeros([BLOCK], tl.float32)
            for first in range(0, vocab, BLOCK):
                x = tl.load(row_ptr + first + columns, mask=first + columns < vocab, other=float("-inf"))
                total += tl.where(_key(x).to(tl.int64) >= floor, tl.exp((x - top) * inverse), 0.0)
            wanted = tl.sum(total, axis=0) * top_p
            floor = _search(row_ptr, vocab, floor, high, floor, wanted, top, inverse, False, BLOCK)
        seed = tl.load(seeds_ptr + row)
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        at = tl.zeros([BLOCK], tl.int32)
        for first in range(0, vocab, BLOCK):
            x = tl.load(row_ptr + first + columns, mask=first + columns < vocab, other=float("-inf"))
            u = tl.rand(seed, first + columns)
            wait = tl.where(u < 1e-3, u + 0.5 * u * u, -tl.log(1.0 - u))
            noisy = (x - top) * inverse - tl.log(tl.maximum(wait, 1e-20))
            noisy = tl.where(_key(x).to(tl.int64) >= floor, noisy, float("-inf"))
            better = noisy > best
            best = tl.where(better, noisy, best)
            at = tl.where(better, first + columns, at)
        most = tl.max(best, axis=0)
        token = tl.min(tl.where(best == most, at, 2147483647), axis=0)
    tl.store(tokens_ptr + row, tl.minimum(token, vocab - 1).to(tl.int64))


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``reference.sample``."""
    rows, vocab = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    highest = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        block = min(BLOCK, triton.next_power_of_2(vocab))
        given = (logits, temperature, top_k, top_p, min_p, seeds, tokens, highest)
        _sample[(rows,)](*given, vocab, logits.stride(0), block, num_warps=8)
    return tokens, highest


SPECIALIZATIONS = (
    Specialization(
        kernel=_sample,
        name="vocabulary of any size",
        signature={
            "logits_ptr": "*fp32",
            "temperature_ptr": "*fp32",
            "top_k_ptr": "*i32",
            "top_p_ptr": "*fp32",
            "min_p_ptr": "*fp32",
            "seeds_ptr": "*i64",
            "tokens_ptr": "*i64",
            "highest_ptr": "*fp32",
            "vocab": "i32",
            "stride": "i32",
        },
        constants={"BLOCK": BLOCK},
        num_warps=8,
    ),
)

WORKS = (
    Work(
        operation="sample",
        shape="256 rows, vocabulary 128256, top-k and top-p (logits read once from memory, then from the cache)",
        bytes=256 * 128256 * 4,
        flops=30 * 256 * 128256,
        bound="bandwidth",
        target=0.1,
    ),
)
