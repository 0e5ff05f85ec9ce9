"""The matrix product in calls of few fixed shapes, which were seen to give a row the same bits in every place."""

from __future__ import annotations

import torch
from torch import Tensor

from servekit.kernels.agreeing import Shape, agreeing_shapes, next_size

SIZES = (64, 32, 16, 8, 4, 1)  # rows of a call
ALIGNMENT = 64  # bytes; libraries look at where a matrix begins


class TiledLinear:
    """Called as ``reference.linear_of``'s function is.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]``.
        sizes: the numbers of rows that a call may have.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...]) -> None:
        self._weight = weight.t()
        self._bias = bias
        self._sizes = sizes

    def __call__(self, x: Tensor) -> Tensor:
        out = x.new_empty(len(x), self._weight.shape[1])
        first = 0
        while first < len(x):
            size = next_size(len(x) - first, self._sizes)
            rows = x[first : first + size]
            out[first : first + size] = torch.mm(_whole(rows, size), self._weight)[: len(rows)]
            first += size
        return out if self._bias is None else out.add_(self._bias)


def _whole(rows: Tensor, size: int) -> Tensor:
    """``rows`` in memory of their own, which is aligned, with zeros below."""
    if len(rows) == size:
        return rows.clone(memory_format=torch.contiguous_format)
    tile = rows.new_zeros(size, rows.shape[1])
    tile[: len(rows)] = rows
    return tile


class TiledLinears:
    """Makes ``TiledLinear``; the sizes are tried out once for each kind of weight, on the first that comes."""

    def __init__(self) -> None:
        self._sizes: dict[tuple[object, ...], tuple[int, ...]] = {}

    def __call__(self, weight: Tensor, bias: Tensor | None) -> TiledLinear:
        kind = (weight.shape, weight.dtype, weight.device, weight.data_ptr() % ALIGNMENT)
        if kind not in self._sizes:
            self._sizes[kind] = agreeing_sizes(weight)
        return TiledLinear(weight, bias, self._sizes[kind])


def agreeing_sizes(weight: Tensor) -> tuple[int, ...]:
    """Those of ``SIZES`` that may be mixed; one row a call where nothing else is sure.

    Cost: three products with 125 rows.
    """
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(SIZES[0], weight.shape[1], generator=generator).to(weight.device, weight.dtype)

    def product(ids: Tensor, shape: Shape) -> Tensor:
        return torch.mm(bank[ids], weight.t())

    found = agreeing_shapes(product, [(size,) for size in SIZES], weight.device)
    return tuple(size for (size,) in found) or (1,)
