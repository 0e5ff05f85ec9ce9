"""Penalties, masks and biases: only the rows that ask for something are touched, each once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from common_platform.kernels import Specialization, Work

BLOCK = 1024
PER_ROW = [f"{name}_ptr" for name in ("presence", "frequency", "repetition")]  # a number a row


@triton.jit(do_not_specialize_on_alignment=PER_ROW)
def _penalise(
    logits_ptr,
    rows_ptr,
    slots_ptr,
    counts_ptr,
    in_prompt_ptr,
    presence_ptr,
    frequency_ptr,
    repetition_ptr,
    vocab,
    stride,
    BLOCK: tl.constexpr,
):
    """Grid: rows with penalties, parts of the vocabulary."""
    index = tl.program_id(0)
    row = tl.load(rows_ptr + index)
    slot = tl.load(slots_ptr + index)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    at = logits_ptr + row * stride + columns
    x = tl.load(at, mask=inside, other=0.0)
    times = tl.load(counts_ptr + slot * vocab + columns, mask=inside, other=0).to(tl.float32)
    prompt = tl.load(in_prompt_ptr + slot * vocab + columns, mask=inside, other=0) != 0
    by = tl.load(repetition_ptr + index)
    x = tl.where(prompt | (times > 0), tl.where(x > 0, x / by, x * by), x)
    x -= tl.load(frequency_ptr + index) * times
    x -= tl.where(times > 0, tl.load(presence_ptr + index), 0.0)
    tl.store(at, x, mask=inside)


@triton.jit
def _mask(logits_ptr, rows_ptr, bits_ptr, vocab, stride, words, BLOCK: tl.constexpr):
    """Grid: rows with a mask, parts of the vocabulary."""
    index = tl.program_id(0)
    row = tl.load(rows_ptr + index)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    word = tl.load(bits_ptr + index.to(tl.int64) * words + columns // 32, mask=inside, other=0)
    forbidden = ((word >> (columns % 32)) & 1) == 0
    tl.store(logits_ptr + row * stride + columns, float("-inf"), mask=inside & forbidden)


@triton.jit(do_not_specialize=["count"])
def _add_bias(logits_ptr, rows_ptr, tokens_ptr, biases_ptr, count, stride, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    row = tl.load(rows_ptr + index, mask=inside, other=0)
    at = logits_ptr + row * stride + tl.load(tokens_ptr + index, mask=inside, other=0)
    bias = tl.load(biases_ptr + index, mask=inside, other=0.0)
    tl.store(at, tl.load(at, mask=inside, other=0.0) + bias, mask=inside)


def penalise(
    logits: Tensor,
    rows: Tensor,
    slots: Tensor,
    counts: Tensor,
    in_prompt: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> None:
    """As ``reference.penalise``; ``counts`` and ``in_prompt`` are contiguous."""
    vocab = logits.shape[1]
    if len(rows):
        given = (logits, rows, slots, counts, in_prompt, presence, frequency, repetition)
        _penalise[(len(rows), triton.cdiv(vocab, BLOCK))](*given, vocab, logits.stride(0), BLOCK, num_warps=4)


def mask(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """As ``reference.mask``; ``bits`` is contiguous."""
    vocab = logits.shape[1]
    if len(rows):
        grid = (len(rows), triton.cdiv(vocab, BLOCK))
        _mask[grid](logits, rows, bits, vocab, logits.stride(0), bits.shape[1], BLOCK, num_warps=4)


def add_bias(logits: Tensor, rows: Tensor, tokens: Tensor, biases: Tensor) -> None:
    """As ``reference.add_bias``."""
    if len(rows):
        _add_bias[(triton.cdiv(len(rows), 128),)](
            logits, rows, tokens, biases, len(rows), logits.stride(0), 128, num_warps=4
        )


SPECIALIZATIONS = (
    Specialization(
        kernel=_penalise,
        name="vocabulary of any size",
        signature={
            "logits_ptr": "*fp32",
            "rows_ptr": "*i64",
            "slots_ptr": "*i64",
            "counts_ptr": "*i32",
            "in_prompt_ptr": "*i1",
            "presence_ptr": "*fp32",
            "frequency_ptr": "*fp32",
            "repetition_ptr": "*fp32",
            "vocab": "i32",
            "stride": "i32",
        },
        constants={"BLOCK": BLOCK},
    ),
    Specialization(
        kernel=_mask,
        name="vocabulary of any size",
        signature={
            "logits_ptr": "*fp32",
            "rows_ptr": "*i64",
            "bits_ptr": "*i32",
            "vocab": "i32",
            "stride": "i32",
            "words": "i32",
        },
        constants={"BLOCK": BLOCK},
    ),
    Specialization(
        kernel=_add_bias,
        name="any number",
        signature={
            "logits_ptr": "*fp32",
            "rows_ptr": "*i64",
            "tokens_ptr": "*i64",
            "biases_ptr": "*fp32",
            "count": "i32",
            "stride": "i32",
        },
        constants={"BLOCK": 128},
    ),
)

WORKS = (
    Work(
        operation="logits (penalise)",
        shape="256 rows, vocabulary 128256",
        bytes=256 * 128256 * (4 + 4 + 4 + 1),
        flops=8 * 256 * 128256,
        bound="bandwidth",
        target=0.8,
    ),
)
