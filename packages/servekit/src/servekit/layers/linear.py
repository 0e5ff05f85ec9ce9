"""Linear layers whose weight is spread over tensor-parallel ranks (Shoeybi et al., "Megatron-LM", 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from servekit.layers.few_bits import Rounded
from servekit.layers.parallel import Ranks, shard
from servekit.layers.weights import Weights


class ColumnParallelLinear:
    """Several matrices that read the same input, stacked into one; each rank has its rows of every one.

    Args:
        weights: where they are read from.
        names: the tensors, without ``.weight``.
        in_features: of all of them.
        out_features: of each, whole.
        bias: whether each has a ``.bias``.
    """

    def __init__(
        self, weights: Weights, names: Sequence[str], in_features: int, out_features: Sequence[int], *, bias: bool
    ) -> None:
        ranks = weights.ranks
        pairs = list(zip(names, out_features, strict=True))

        def rows(whole: Tensor) -> Tensor:
            return shard(whole, 0, ranks)

        weight = weights.settle(*(weights.read(f"{n}.weight", (out, in_features), rows) for n, out in pairs))
        self.out_features = len(weight)  # of this rank
        self.bias = weights.settle(*(weights.read(f"{n}.bias", (out,), rows) for n, out in pairs)) if bias else None
        self._product = weights.kernels.layer_linear_of(weight, self.bias)

    def __call__(self, x: Tensor | Rounded) -> Tensor:
        """``[tokens, in_features]`` -> ``[tokens, this rank's rows of all matrices]``."""
        return self._product(x)


class RowParallelLinear:
    """A matrix that reads what a column-parallel one made: each rank has its columns, and the results are summed."""

    def __init__(self, weights: Weights, name: str, in_features: int, out_features: int, *, bias: bool) -> None:
        self.ranks: Ranks = weights.ranks

        def columns(whole: Tensor) -> Tensor:
            return shard(whole, 1, weights.ranks)

        weight = weights.settle(weights.read(f"{name}.weight", (out_features, in_features), columns))
        self.bias: Tensor | None = None
        if bias:
            whole = weights.settle(weights.read(f"{name}.bias", (out_features,)))
            self.bias = whole if self.ranks.rank == 0 else torch.zeros_like(whole)
        self._product = weights.kernels.layer_linear_of(weight, self.bias)

    def __call__(self, x: Tensor | Rounded) -> Tensor:
        """``[tokens, this rank's in_features]`` -> ``[tokens, out_features]``, summed over the ranks."""
        return self.ranks.all_reduce(self._product(x))
