"""Experts by torch: pairs sorted by expert, so that each expert that is met is one product, of its own rows only."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from servekit.kernels.fused_moe.experts import ChannelExperts, ExpertWeights
from servekit.kernels.fused_moe.reference import rounded_inputs


def fused_moe(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    shared: Tensor | None = None,
) -> Tensor:
    """As ``reference.fused_moe``; products have the dtype of ``x``, and only experts that are met are dequantized."""
    num_experts, _, _ = gate_up.shape
    top_k = experts.shape[1]
    pairs, ends = by_expert(experts, num_experts)
    rows = rounded_inputs(x, gate_up).to(x.dtype)[pairs // top_k]
    results = torch.empty(len(pairs), x.shape[1], dtype=x.dtype, device=x.device)
    first = 0
    for expert, last in enumerate(ends):
        if last > first:
            _swiglu(rows[first:last], gate_up, down, expert, results[first:last])
        first = last
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    out.index_add_(0, pairs // top_k, results.float().mul_(weights.reshape(-1)[pairs, None]))
    return (out if shared is None else out.add_(shared)).to(x.dtype)


def by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """The pairs of token and slot sorted by expert, ``[pairs]`` int64, and where each expert's end among them."""
    flat = experts.reshape(-1).long()
    flat = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)  # another rank's come last
    ends: list[int] = torch.bincount(flat, minlength=num_experts + 1).cumsum(0).tolist()
    return flat.argsort(stable=True)[: ends[num_experts - 1]], ends[:num_experts]


def _swiglu(rows: Tensor, gate_up: ExpertWeights, down: ExpertWeights, expert: int, out: Tensor) -> None:
    both = rows.new_empty(len(rows), gate_up.shape[1])
    _product(rows, gate_up, expert, both)
    gate, up = both.chunk(2, dim=-1)
    _product(rounded_inputs(silu(gate).mul_(up), down).to(rows.dtype), down, expert, out)


def _product(rows: Tensor, weights: ExpertWeights, expert: int, out: Tensor) -> None:
    """int8 is exact in every dtype of rows, so its scales are applied to the product, which is smaller."""
    if isinstance(weights, ChannelExperts):
        torch.mm(rows, weights.values[expert].to(rows.dtype).t(), out=out)
        out.mul_(weights.scales[expert])
    else:
        torch.mm(rows, weights.weight_of(expert).to(rows.dtype).t(), out=out)
