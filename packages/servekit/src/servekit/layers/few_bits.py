"""Linear layers whose weights are rounded to few bits as they are loaded, and the eight-bit rows between them.

A norm or a gate that feeds such a layer rounds what it writes itself (``Rounded``): nobody reads it once more for that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from servekit.kernels.linear import Linear
from servekit.kernels.quantized_linear.weights import ChannelWeight, Int4Weight, quantize_channels, quantize_int4

INT4_GROUP = 128  # input columns that share a scale


@dataclass(frozen=True, slots=True)
class Rounded:
    """Rows in eight bits: ``values`` ``[rows, width]``, ``scales`` ``[rows]`` float32; they were of ``dtype``."""

    values: Tensor
    scales: Tensor
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class FewBitKernels:
    """The operations of ``servekit.kernels`` that few bits need, of one backend."""

    w8a8_linear: Callable[[Tensor, ChannelWeight, Tensor | None], Tensor]
    w8a8_product: Callable[[Tensor, Tensor, ChannelWeight, Tensor | None, torch.dtype], Tensor]
    w4a16_linear: Callable[[Tensor, Int4Weight, Tensor | None], Tensor]
    rms_norm_quantized: Callable[..., tuple[Tensor, Tensor, Tensor]]
    silu_and_mul_quantized: Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class EightBits:
    """Weights and activations of eight bits, int8 or a float8; a scale for each output channel and for each token."""

    kernels: FewBitKernels
    kind: torch.dtype

    def linear_of(self, weight: Tensor, bias: Tensor | None) -> Linear:
        rounded = quantize_channels(weight, self.kind)

        def product(x: Tensor | Rounded) -> Tensor:
            if isinstance(x, Rounded):
                return self.kernels.w8a8_product(x.values, x.scales[:, None], rounded, bias, x.dtype)
            return self.kernels.w8a8_linear(x, rounded, bias)

        return product

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Rounded, Tensor]:
        """What a norm hands to a linear layer, and the sum; either of the two given may be overwritten."""
        values, scales, total = self.kernels.rms_norm_quantized(x, residual, weight, eps, self.kind)
        return Rounded(values, scales, x.dtype), total

    def silu_and_mul(self, x: Tensor) -> Rounded:
        return Rounded(*self.kernels.silu_and_mul_quantized(x, self.kind), x.dtype)


@dataclass(frozen=True, slots=True)
class FourBits:
    """int4 weights in groups; activations stay as they are."""

    kernels: FewBitKernels

    def linear_of(self, weight: Tensor, bias: Tensor | None) -> Linear:
        rounded = quantize_int4(weight, INT4_GROUP)
        return lambda x: self.kernels.w4a16_linear(x, rounded, bias)
