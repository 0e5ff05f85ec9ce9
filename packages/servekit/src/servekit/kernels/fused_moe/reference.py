"""The experts one after the other, in plain steps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from servekit.kernels.fused_moe.experts import BlockExperts, ChannelExperts, ExpertWeights
from servekit.kernels.quantize.reference import quantize
from servekit.kernels.quantized_linear.weights import BLOCK


def fused_moe(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    shared: Tensor | None = None,
) -> Tensor:
    """Each token through its experts (SwiGLU), their results weighted and added up.

    Args:
        x: ``[tokens, hidden]``, float32, bfloat16 or float16.
        experts: ``[tokens, top_k]`` int32; numbers outside ``0..num_experts - 1`` are another rank's and add nothing.
        weights: ``[tokens, top_k]`` float32.
        gate_up: ``[experts, 2 * inner, hidden]``, gate above up.
        down: ``[experts, hidden, inner]``.
        shared: ``[tokens, hidden]``, the result of the experts that every token meets; added, or None.

    Returns:
        ``[tokens, hidden]`` in the dtype of ``x``; products and sums are float32. Between the two products values are
        rounded to the dtype of ``x``, and for the experts that ask for it (``rounded_inputs``) to eight bits.

    Source: Shazeer et al., "Outrageously large neural networks", ICLR 2017; Shazeer 2020 (SwiGLU).
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(gate_up.shape[0]):
        tokens, slots = torch.nonzero(experts == expert, as_tuple=True)
        gate, up = product(x[tokens], gate_up, expert).chunk(2, dim=-1)
        inner = (silu(gate) * up).to(x.dtype)
        out.index_add_(0, tokens, product(inner, down, expert) * weights[tokens, slots, None])
    return (out if shared is None else out + shared.float()).to(x.dtype)


def product(x: Tensor, weights: ExpertWeights, expert: int) -> Tensor:
    """``[rows, in]`` -> ``[rows, out]`` float32, by one expert."""
    return rounded_inputs(x, weights).float() @ weights.weight_of(expert).float().t()


def rounded_inputs(x: Tensor, weights: ExpertWeights) -> Tensor:
    """What is left of ``x`` where ``weights`` ask for activations of eight bits: float32, else ``x`` itself."""
    if isinstance(weights, BlockExperts):
        group = BLOCK
    elif isinstance(weights, ChannelExperts) and weights.rounds_inputs:
        group = x.shape[1]
    else:
        return x
    values, scales = quantize(x, weights.values.dtype, group)
    return values.float() * scales.repeat_interleave(group, dim=1)[:, : x.shape[1]]
