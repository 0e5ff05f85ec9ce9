"""Normalisation layers."""

from __future__ import annotations

from torch import Tensor

from servekit.kernels.rms_norm import add_rms_norm, rms_norm
from servekit.layers.weights import Weights


class RMSNorm:
    """Zhang and Sennrich 2019; with a residual, the two are added first and the sum comes back as well."""

    def __init__(self, weights: Weights, name: str, size: int, eps: float) -> None:
        self.weight = weights.settle(weights.read(name, (size,)))
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The normalised sum, and the sum: the residual of the next layer. ``x`` may be overwritten."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps), x
        return add_rms_norm(x, residual, self.weight, self.eps)
