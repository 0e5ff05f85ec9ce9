"""Experts that every token meets, as more of the routed ones: then one launch computes them all."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from common_platform.errors import ConfigError
from servekit.kernels.fused_moe.experts import ExpertWeights


def join(routed: ExpertWeights, shared: ExpertWeights) -> ExpertWeights:
    """The experts of both, ``shared`` last; they are of one kind and size.

    Raises:
        ConfigError: they are not.
    """
    if type(routed) is not type(shared) or routed.shape[1:] != shared.shape[1:]:
        told = f"{type(shared).__name__} {shared.shape[1:]}"
        raise ConfigError("shared_experts", told, f"{type(routed).__name__} {routed.shape[1:]}, as the routed ones are")
    both = {field.name: (getattr(routed, field.name), getattr(shared, field.name)) for field in fields(routed)}
    joined = {name: torch.cat(pair) for name, pair in both.items() if isinstance(pair[0], Tensor)}
    alike = {name: pair for name, pair in both.items() if name not in joined}
    if any(one != other for one, other in alike.values()):
        raise ConfigError("shared_experts", {name: pair[1] for name, pair in alike.items()}, "as the routed ones have")
    made: ExpertWeights = replace(routed, **joined)  # type: ignore[arg-type] # the fields of one class
    return made


def route_to_shared(
    experts: Tensor, weights: Tensor, num_routed: int, num_shared: int, weight: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The slots of a routing with one more for each shared expert, whose numbers follow the routed ones'.

    Args:
        experts, weights: ``[tokens, top_k]``, as ``servekit.kernels.moe_routing`` makes them.
        weight: of a shared expert's result.
    """
    tokens = len(experts)
    numbers = torch.arange(num_routed, num_routed + num_shared, dtype=experts.dtype, device=experts.device)
    return (
        torch.cat((experts, numbers.expand(tokens, num_shared)), dim=1),
        torch.cat((weights, weights.new_full((tokens, num_shared), weight)), dim=1),
    )
