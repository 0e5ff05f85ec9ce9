"""The matrix product as torch has it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn.functional import linear

Linear = Callable[..., Tensor]  # of the rows: a tensor, or what servekit.layers.few_bits rounds them to


def linear_of(weight: Tensor, bias: Tensor | None) -> Linear:
    """A function from ``[rows, in]`` to ``[rows, out]``; ``weight`` is [out, in] and ``bias`` [out]."""
    return partial(linear, weight=weight, bias=bias)
