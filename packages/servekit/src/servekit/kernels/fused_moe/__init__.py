"""The experts of a mixture, applied to the tokens that were routed to them."""

from servekit.kernels.fused_moe.experts import (
    BlockExperts,
    ChannelExperts,
    DenseExperts,
    ExpertWeights,
    Int4Experts,
)
from servekit.kernels.fused_moe.sorted import fused_moe

__all__ = ["BlockExperts", "ChannelExperts", "DenseExperts", "ExpertWeights", "Int4Experts", "fused_moe"]
