"""The weights of all experts of a layer, each expert with scales of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from servekit.kernels.quantized_linear.reference import dequantize_blocks, dequantize_int4
from servekit.kernels.quantized_linear.weights import (
    BlockWeight,
    ChannelWeight,
    Int4Weight,
    quantize_blocks,
    quantize_channels,
    quantize_int4,
)


@dataclass(frozen=True, slots=True, eq=False)
class DenseExperts:
    """``values``: ``[experts, out, in]``, the dtype of activations."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, out, in."""
        experts, out, width = self.values.shape
        return experts, out, width

    def weight_of(self, expert: int) -> Tensor:
        """``[out, in]``."""
        return self.values[expert]


@dataclass(frozen=True, slots=True, eq=False)
class ChannelExperts:
    """``values``: ``[experts, out, in]`` int8; ``scales``: ``[experts, out]`` float32.

    ``rounds_inputs``: activations become int8 as well, with a scale for each row; else they stay as they are.
    """

    values: Tensor
    scales: Tensor
    rounds_inputs: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, out, width = self.values.shape
        return experts, out, width

    def weight_of(self, expert: int) -> Tensor:
        """``[out, in]`` float32."""
        return self.values[expert].float() * self.scales[expert][:, None]


@dataclass(frozen=True, slots=True, eq=False)
class BlockExperts:
    """float8 in blocks of 128 x 128; activations are quantized in groups of 128 columns.

    ``values``: ``[experts, out, in]`` float8; ``scales``: ``[experts, blocks of out, ceil(in / 128)]`` float32.
    ``parts``: 2 where rows are a gate and an up matrix, one below the other: each begins with a block of its own.
    """

    values: Tensor
    scales: Tensor
    parts: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, out, width = self.values.shape
        return experts, out, width

    def weight_of(self, expert: int) -> Tensor:
        """``[out, in]`` float32."""
        values, scales = self.values[expert].chunk(self.parts), self.scales[expert].chunk(self.parts)
        parts = [BlockWeight(v, s) for v, s in zip(values, scales, strict=True)]
        return torch.cat([dequantize_blocks(part) for part in parts])


@dataclass(frozen=True, slots=True, eq=False)
class Int4Experts:
    """As ``Int4Weight``, with one more dimension in front.

    ``packed``: ``[experts, ceil(in / 128) * 64, out]`` uint8; ``scales``: ``[experts, groups, out]``; ``zeros``:
    ``[experts, groups, out]`` uint8, or None.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    group: int
    in_features: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.packed.shape[0], self.packed.shape[2], self.in_features

    def weight_of(self, expert: int) -> Tensor:
        """``[out, in]`` float32."""
        zeros = None if self.zeros is None else self.zeros[expert]
        weight = Int4Weight(self.packed[expert], self.scales[expert], zeros, self.group, self.in_features)
        return dequantize_int4(weight)


ExpertWeights = DenseExperts | ChannelExperts | BlockExperts | Int4Experts


def quantize_experts(values: Tensor, kind: str, *, group: int = 128, parts: int = 1) -> ExpertWeights:
    """Round ``[experts, out, in]``, expert by expert.

    Args:
        kind: "dense" (as they are), "int8", "w8a8" (int8 as activations are), "fp8" (blocks of 128 x 128) or "int4".
        group: columns of an int4 group.
        parts: 2 for a gate and an up matrix, one below the other.
    """
    if kind in ("int8", "w8a8"):
        weights = stack_channels([quantize_channels(one, torch.int8) for one in values])
        return replace(weights, rounds_inputs=kind == "w8a8")
    if kind == "fp8":
        return stack_blocks([[quantize_blocks(part) for part in one.chunk(parts)] for one in values])
    if kind == "int4":
        return stack_int4([quantize_int4(one, group) for one in values])
    return DenseExperts(values)


def stack_channels(weights: Sequence[ChannelWeight]) -> ChannelExperts:
    """One weight an expert."""
    return ChannelExperts(torch.stack([w.values for w in weights]), torch.stack([w.scales for w in weights]))


def stack_blocks(weights: Sequence[Sequence[BlockWeight]]) -> BlockExperts:
    """One weight an expert, or two: gate and up."""
    values = torch.stack([torch.cat([part.values.view(torch.uint8) for part in one]) for one in weights])
    scales = torch.stack([torch.cat([part.scales for part in one]) for one in weights])
    return BlockExperts(values.view(weights[0][0].values.dtype), scales, len(weights[0]))


def stack_int4(weights: Sequence[Int4Weight]) -> Int4Experts:
    """One weight an expert; all with zeros or none, and none with an ``order``."""
    zeros = [w.zeros for w in weights if w.zeros is not None]
    if zeros and len(zeros) < len(weights):
        zeros = [torch.full_like(w.scales, 8, dtype=torch.uint8) if w.zeros is None else w.zeros for w in weights]
    return Int4Experts(
        torch.stack([w.packed for w in weights]),
        torch.stack([w.scales for w in weights]),
        torch.stack(zeros) if zeros else None,
        weights[0].group,
        weights[0].in_features,
    )
