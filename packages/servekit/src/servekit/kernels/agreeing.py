"""Which shapes of a matrix product give a row the same bits in every place: found by trying, not by trust.

A library picks its loops by the shape of the call, and with them the order of its additions. Data has no say in that,
so random numbers tell: two orders would give other bits in some of the many results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Shape = tuple[int, ...]
Product = Callable[[Tensor, Shape], Tensor]  # ids of rows, and the shape to compute them in -> [rows, ...]


def agreeing_shapes(product: Product, shapes: Sequence[Shape], device: torch.device) -> list[Shape]:
    """The first of ``shapes`` in which every row is the same in every place, and those that agree with it on each row.

    Args:
        product: computes the rows named by ``[math.prod(shape)]`` int64, put together in a given shape.
        shapes: the preferred ones first; the first has the most rows.
    """
    found: list[Shape] = []
    known = torch.empty(0)
    for shape in shapes:
        ids = torch.arange(math.prod(shape), device=device)
        rows = product(ids, shape)
        others = product(ids.flip(0), shape).flip(0)
        one = product(torch.zeros_like(ids), shape)
        if not torch.equal(rows, others) or not torch.equal(one, rows[:1].expand_as(one)):
            continue
        if not found:
            known = rows
        if torch.equal(rows, known[: len(rows)]):
            found.append(shape)
    return found


def next_size(left: int, sizes: Sequence[int]) -> int:
    """Of ``sizes``, which to compute first when ``left`` rows are left: the next larger one if half of it is used."""
    larger = min((size for size in sizes if size >= left), default=0)
    if larger and larger <= 2 * left:
        return larger
    return max((size for size in sizes if size <= left), default=larger)
