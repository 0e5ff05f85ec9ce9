"""Routing in plain steps."""

from __future__ import annotations

import torch
from torch import Tensor

from servekit.kernels.moe_routing.rule import Routing

TINY = 1e-20  # a token whose scores are all zero still gets numbers


def route(logits: Tensor, routing: Routing, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose each token's experts.

    Args:
        logits: ``[tokens, experts]``, any float dtype; the arithmetic is float32.
        bias: ``[experts]`` float32, added to the scores for the choice and not for the weights, or None.

    Returns:
        ``[tokens, top_k]`` float32, the weights, and ``[tokens, top_k]`` int32, the experts: the best first, of equal
        ones the lower number.

    Source: Jiang et al., "Mixtral of Experts", 2024; DeepSeek-V2, 2024, 2.2 (groups); DeepSeek-V3, 2024, 2.1.2 (bias).
    """
    scores = logits.float().sigmoid() if routing.scoring == "sigmoid" else logits.float().softmax(dim=-1)
    choice = scores if bias is None else scores + bias
    if routing.top_groups < routing.groups:
        choice = choice.masked_fill(~_in_best_groups(choice, routing), float("-inf"))
    experts = choice.sort(dim=-1, descending=True, stable=True).indices[:, : routing.top_k]
    weights = scores.gather(1, experts)
    if routing.renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + TINY)
    return weights * routing.scale, experts.to(torch.int32)


def _in_best_groups(choice: Tensor, routing: Routing) -> Tensor:
    """``[tokens, experts]`` bool."""
    grouped = choice.view(len(choice), routing.groups, routing.num_experts // routing.groups)
    best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values
    group_scores = best[..., 0] if routing.group_score == "max" else best.sum(dim=-1)
    chosen = group_scores.sort(dim=-1, descending=True, stable=True).indices[:, : routing.top_groups]
    mask = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, chosen, True)
    return mask[..., None].expand_as(grouped).reshape(choice.shape)
