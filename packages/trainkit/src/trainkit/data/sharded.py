"""Datasets that can only be iterated, split over ranks and over the loader's worker processes."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker

from common_platform.errors import ConfigError
from trainkit.data.seed import raw_rng_state, rng_state, set_rng_state
from trainkit.hooks import user_error
from trainkit.ranks import rank_zero_info, rank_zero_warn

UNEVEN = ("drop", "pad", "keep")
PLAIN = (str, bytes, int, float, bool, complex, np.ndarray, np.generic, type(None))
PEEKED = 4  # samples that tell whether two streams are one
OF_THEIR_OWN = ("streaming", "webdataset", "litdata")  # libraries whose datasets split themselves


class ShardedIterable(IterableDataset[Any]):
    """``dataset`` of which each rank and each worker process reads its own share, every n-th sample.

    Every process goes over the whole of ``dataset``, which must give the same samples in the same order on all of
    them and must not split itself. A loader over it gives each rank its share; outside of a Trainer or a Runtime, say
    which with ``for_rank``.

    Args:
        dataset: any iterable of samples.
        uneven: what becomes of the last samples where there are not enough for all: "drop" them, so that all ranks
            have as many; "pad" with the first ones of the epoch; or "keep" them, for evaluations on one rank.
        over_workers: False where ``dataset`` gives each worker process its own part already: then each worker's is
            split over ranks.

    Raises:
        ConfigError: ``uneven`` is something else.
    """

    def __init__(self, dataset: Iterable[Any], uneven: str = "drop", *, over_workers: bool = True) -> None:
        if uneven not in UNEVEN:
            raise ConfigError("ShardedIterable.uneven", uneven, f"one of {UNEVEN}")
        self.dataset, self.uneven, self.over_workers = dataset, uneven, over_workers
        self.rank, self.world_size = 0, 1

    def for_rank(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info() if self.over_workers else None
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


class SizedShard(ShardedIterable):
    """One of a dataset that tells its length, in one process a rank."""

    def __len__(self) -> int:
        whole, rest = divmod(len(self.dataset), self.world_size)  # type: ignore[arg-type]
        match self.uneven:
            case "drop":
                return whole
            case "pad":
                return whole + (rest > 0)
        return whole + (self.rank < rest)


def is_sharded(loader: Any) -> bool:
    return isinstance(getattr(loader, "dataset", None), ShardedIterable)


def shard_of(loader: DataLoader[Any], strategy: Any, *, training: bool) -> ShardedIterable | None:
    """This rank's share of the iterable dataset of ``loader``; None where the dataset splits itself.

    It does so if it says ``shards_itself = True``, if it is of a library whose datasets do, or if it gives other
    samples on other ranks: the first few are compared, unless it says ``shards_itself = False``. In training every rank
    gets as many batches; what is missing for it at the end is taken from the beginning, or the rest left out where the
    loader has ``drop_last``. In an evaluation each sample comes once. Every rank must call it.
    """
    dataset: Any = loader.dataset
    if _says_so(dataset):
        return None
    over_workers = True
    if getattr(dataset, "shards_itself", None) is None and not hasattr(dataset, "__next__"):  # which reading uses up
        mine = _first_samples(dataset, 0, loader.num_workers)
        if len(set(strategy.gather_plain(mine))) > 1:
            rank_zero_info(f"{type(dataset).__name__} gives other samples on other ranks: it is not split again")
            return None
        over_workers = loader.num_workers < 2 or mine == _first_samples(dataset, 1, loader.num_workers)
    is_sized = hasattr(dataset, "__len__") and loader.num_workers < 2
    uneven = "keep" if not training else "drop" if loader.drop_last else "pad"
    share = (SizedShard if is_sized else ShardedIterable)(dataset, uneven, over_workers=over_workers)
    share.for_rank(strategy.rank, strategy.world_size)
    return share


def _says_so(dataset: Any) -> bool:
    library = type(dataset).__module__.partition(".")[0]
    of_datasets = library == "datasets" and getattr(dataset, "_distributed", None) is not None
    return getattr(dataset, "shards_itself", None) is True or library in OF_THEIR_OWN or of_datasets


def _first_samples(dataset: Any, worker: int, num_workers: int) -> str:
    """A digest of what a worker would read first, from a copy; random generators are left as they were.

    Raises:
        UserCodeError: the dataset raised.
    """
    before = rng_state(raw_rng_state())
    try:
        with _as_worker(worker, num_workers, dataset):
            return _digest(list(islice(iter(copy.copy(dataset)), PEEKED)))
    except Exception as error:
        raise user_error(type(dataset).__name__, "its first samples", error) from error
    finally:
        set_rng_state(before)


@contextlib.contextmanager
def _as_worker(number: int, num_workers: int, dataset: Any) -> Iterator[None]:
    """What ``get_worker_info`` says in a worker, without one."""
    before = torch_worker._worker_info
    if num_workers:
        torch_worker._worker_info = torch_worker.WorkerInfo(id=number, num_workers=num_workers, seed=0, dataset=dataset)
    try:
        yield
    finally:
        torch_worker._worker_info = before


def warn_of_equal_batches(loader: Any, batch: Any, strategy: Any) -> None:
    """Say so where all ranks read the same samples of an iterable dataset; every rank must call it."""
    plain = type(loader) is DataLoader and isinstance(loader.dataset, IterableDataset)
    if strategy.world_size == 1 or not plain or is_sharded(loader):
        return
    if len(set(strategy.gather_plain(_digest(batch)))) == 1:
        rank_zero_warn("all ranks read the same samples of the iterable dataset: it must split itself by rank and "
                       "worker, or not say so (shards_itself, use_distributed_sampler=False)")  # fmt: skip


def _digest(batch: Any) -> str:
    """Of all tensors and plain values in ``batch``."""
    found = hashlib.sha256()
    for leaf in torch.utils._pytree.tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            found.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:  # what else there is may show its address
            found.update(repr(leaf if isinstance(leaf, PLAIN) else type(leaf)).encode())
    return found.hexdigest()
