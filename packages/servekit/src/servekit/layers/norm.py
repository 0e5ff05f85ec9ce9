"""Normalisation layers."""

from __future__ import annotations

from torch import Tensor

from servekit.layers.few_bits import EightBits, Rounded
from servekit.layers.weights import Weights


class RMSNorm:
    """Zhang and Sennrich 2019; with a residual, the two are added first and the sum comes back as well."""

    def __init__(self, weights: Weights, name: str, size: int, eps: float) -> None:
        self.weight = weights.settle(weights.read(name, (size,)))
        self.eps = eps
        self._kernels = weights.kernels

    def __call__(self, x: Tensor) -> Tensor:
        return self._kernels.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The normalised sum, and the sum: the residual of the next layer. ``x`` may be overwritten."""
        if residual is None:
            return self._kernels.rms_norm(x, self.weight, self.eps), x
        return self._kernels.add_rms_norm(x, residual, self.weight, self.eps)

    def add_to_linear(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor | Rounded, Tensor]:
        """As ``add``, for linear layers alone: with eight-bit ones the norm is rounded in the same pass."""
        few_bits = self._kernels.few_bits
        if isinstance(few_bits, EightBits):
            return few_bits.add_rms_norm(x, residual, self.weight, self.eps)
        return self.add(x, residual)
