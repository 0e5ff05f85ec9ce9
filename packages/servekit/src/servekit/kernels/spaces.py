"""What ``servekit tune`` tries: attention, products with few-bit weights, and experts, at the sizes of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from servekit.kernels.fused_moe.experts import quantize_experts
from servekit.kernels.paged_attention.flashinfer_adapter import FlashInferAttention
from servekit.kernels.paged_attention.metadata import paged_metadata
from servekit.kernels.quantized_linear.weights import quantize_channels, quantize_int4
from servekit.kernels.tune import LAUNCHES, Space
from servekit.kernels.tuning import bucket

Call = Callable[[], Any]
BLOCK_SIZE = 16
KEYS = {"block_n": (32, 64, 128)} | LAUNCHES
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)  # of a step; each is a bucket of ``tuning.bucket``
STAGES = {"num_warps": (4, 8), "num_stages": (2, 3, 4)}
DECODE_CONTEXT, PREFILL_TOKENS, ROWS = 4096, 4096, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """Of one rank: what its kernels are called with.

    ``linears``: ``(out, in)`` of each linear layer. ``experts``: ``(experts, top_k, hidden, inner)``; None without.
    """

    heads: int
    kv_heads: int
    head_dim: int
    linears: tuple[tuple[int, int], ...]
    experts: tuple[int, int, int, int] | None = None


def spaces_of(
    sizes: ModelSizes, dtype: torch.dtype, device: torch.device, kinds: Sequence[str], float8: torch.dtype
) -> Iterator[Space]:
    """Everything for ``sizes``; ``kinds`` are the quantizations (int8, fp8, int4) whose products and experts to try."""
    for name, rows, context, count in (("decode", ROWS, DECODE_CONTEXT - 1, 1), ("prefill", 2, 0, PREFILL_TOKENS)):
        yield attention_space(name, sizes, dtype, device, rows=rows, context=context, count=count)
    for kind in kinds:
        for out, width in sorted(set(sizes.linears)):
            for tokens in TOKENS:
                yield linear_space(kind, tokens, out, width, dtype, device, float8)
    if sizes.experts:
        for kind in ("dense", *kinds):
            for tokens in TOKENS:
                yield from expert_spaces(kind, tokens, sizes.experts, dtype, device)


def attention_space(
    name: str, sizes: ModelSizes, dtype: torch.dtype, device: torch.device, *, rows: int, context: int, count: int
) -> Space:
    """Of ``rows`` rows with ``count`` new tokens each after ``context`` others, in blocks that lie in no order."""
    from servekit.kernels.paged_attention.triton_backend import paged_attention

    def make(attend: Callable[..., Any] = paged_attention) -> Call:
        per_row = -(-(context + count) // BLOCK_SIZE)
        shape = (2, rows * per_row + 1, BLOCK_SIZE, sizes.kv_heads, sizes.head_dim)
        cache = torch.randn(shape, device=device, dtype=dtype)
        order = np.random.default_rng(0).permutation(rows * per_row).astype(np.int32) + 1
        starts, counts = np.full(rows, context), np.full(rows, count)
        metadata = paged_metadata(order.reshape(rows, per_row), starts, counts, BLOCK_SIZE, 0, device)
        query = torch.randn(rows * count, sizes.heads, sizes.head_dim, device=device, dtype=dtype)
        return lambda: attend(query, cache, metadata, sizes.head_dim**-0.5)

    shape = {"head_dim": sizes.head_dim, "groups": sizes.heads // sizes.kv_heads}
    return Space(
        kernel=f"paged_attention_{name}",
        shape=shape,
        choices=KEYS,
        make=make,
        make_other=lambda: make(FlashInferAttention(paged_attention)),
    )


def linear_space(
    kind: str, tokens: int, out: int, width: int, dtype: torch.dtype, device: torch.device, float8: torch.dtype
) -> Space:
    """Of one product with a weight of ``out`` x ``width``."""
    from servekit.kernels.quantize.triton_backend import quantize
    from servekit.kernels.quantized_linear import triton_backend as linear

    def make() -> Call:
        x = torch.randn(tokens, width, device=device, dtype=dtype)
        weight = torch.randn(out, width, device=device, dtype=dtype)
        if kind == "int4":
            four = quantize_int4(weight, 128)
            return lambda: linear.w4a16_linear(x, four)
        eight = quantize_channels(weight, torch.int8 if kind == "int8" else float8)
        values, scales = quantize(x, eight.values.dtype, width)
        return lambda: linear.w8a8_product(values, scales, eight, None, dtype)

    kernel = "w4a16" if kind == "int4" else linear.w8a8_name(torch.int8 if kind == "int8" else float8)
    return Space(
        kernel=kernel,
        shape={"tokens": bucket(tokens), "out": out, "width": width},
        choices={"block_m": _heights(tokens), "block_n": (32, 64, 128)} | STAGES,
        make=make,
    )


def expert_spaces(
    kind: str, tokens: int, experts: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Iterator[Space]:
    """Both products of a mixture's experts, tokens spread over them evenly."""
    from servekit.kernels.fused_moe import triton_backend as moe

    num_experts, top_k, hidden, inner = experts

    def make() -> Call:
        x = torch.randn(tokens, hidden, device=device, dtype=dtype)
        chosen = torch.arange(tokens * top_k, device=device, dtype=torch.int32).view(tokens, top_k) % num_experts
        weights = torch.full((tokens, top_k), 1 / top_k, device=device)
        gate_up = quantize_experts(
            torch.randn(num_experts, 2 * inner, hidden, device=device, dtype=dtype), kind, parts=2
        )
        down = quantize_experts(torch.randn(num_experts, hidden, inner, device=device, dtype=dtype), kind)
        return lambda: moe.fused_moe(x, chosen, weights, gate_up, down)

    for out, width in ((2 * inner, hidden), (hidden, inner)):
        yield Space(
            kernel=moe.tuned_name(kind),
            shape={"pairs": bucket(tokens * top_k), "experts": num_experts, "out": out, "width": width},
            choices={"block_m": _heights(tokens * top_k // num_experts), "block_n": (32, 64, 128)} | STAGES,
            make=make,
        )


def _heights(rows: int) -> tuple[int, ...]:
    """Rows of a tile worth trying where there are ``rows``."""
    return (16,) if rows <= 16 else (32, 64) if rows <= 64 else (64, 128)
