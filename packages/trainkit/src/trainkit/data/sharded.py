"""Datasets that can only be iterated, split over ranks and over the loader's worker processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from common_platform.errors import ConfigError
from trainkit.ranks import rank_zero_warn

UNEVEN = ("drop", "pad", "keep")


class ShardedIterable(IterableDataset[Any]):
    """``dataset`` of which each rank and each worker process reads its own share, every n-th sample.

    Every process goes over the whole of ``dataset``, which must give the same samples in the same order on all of
    them and must not split itself. A loader over it gives each rank its share; outside of a Trainer or a Runtime, say
    which with ``for_rank``.

    Args:
        dataset: any iterable of samples.
        uneven: what becomes of the last samples where there are not enough for all: "drop" them, so that all ranks
            have as many; "pad" with the first ones of the epoch; or "keep" them, for evaluations on one rank.

    Raises:
        ConfigError: ``uneven`` is something else.
    """

    def __init__(self, dataset: Iterable[Any], uneven: str = "drop") -> None:
        if uneven not in UNEVEN:
            raise ConfigError("ShardedIterable.uneven", uneven, f"one of {UNEVEN}")
        self.dataset, self.uneven = dataset, uneven
        self.rank, self.world_size = 0, 1

    def for_rank(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker is not None else (1, 0)
        shares, mine = self.world_size * workers, self.rank * workers + number
        turn: list[Any] = []  # one sample for each share
        first: list[Any] = []
        for sample in self.dataset:
            turn.append(sample)
            if len(turn) == shares:
                yield turn[mine]
                first = first or turn
                turn = []
        if self.uneven == "pad" and turn:
            turn += (first or turn * shares)[: shares - len(turn)]
        if self.uneven != "drop" and mine < len(turn):
            yield turn[mine]


def is_sharded(loader: Any) -> bool:
    return isinstance(getattr(loader, "dataset", None), ShardedIterable)


def warn_of_equal_batches(loader: Any, batch: Any, strategy: Any) -> None:
    """Say so where all ranks read the same samples of an iterable dataset; every rank must call it."""
    plain = type(loader) is DataLoader and isinstance(loader.dataset, IterableDataset)
    if strategy.world_size == 1 or not plain or is_sharded(loader):
        return
    if len(set(strategy.gather_plain(_digest(batch)))) == 1:
        rank_zero_warn("all ranks read the same samples of the iterable dataset: it must split itself by rank and "
                       "worker, or be wrapped, trainkit.data.ShardedIterable(dataset)")  # fmt: skip


def _digest(batch: Any) -> str:
    """Of all tensors in ``batch``."""
    found = hashlib.sha256()
    for leaf in torch.utils._pytree.tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            found.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()
