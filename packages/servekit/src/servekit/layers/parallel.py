"""What a layer must know of the ranks that share it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from common_platform.errors import ConfigError


class Ranks(Protocol):
    """Tensor-parallel ranks: each holds a part of every matrix."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, on each of them."""

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """The ranks' tensors side by side along ``dim``, on each of them."""


class SingleRank:
    """One rank holds everything."""

    rank = 0
    world_size = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor


def share(name: str, total: int, ranks: Ranks) -> int:
    """A rank's part of ``total`` units.

    Raises:
        ConfigError: it does not divide.
    """
    if total % ranks.world_size:
        raise ConfigError("tensor_parallel_size", ranks.world_size, f"a divisor of {name} = {total}")
    return total // ranks.world_size


def shard(tensor: Tensor, dim: int, ranks: Ranks) -> Tensor:
    """This rank's part of a mapped tensor along ``dim``: a view, so that only its pages are read."""
    size = share(f"dimension {dim} of {tuple(tensor.shape)}", tensor.shape[dim], ranks)
    return tensor.narrow(dim, ranks.rank * size, size)
