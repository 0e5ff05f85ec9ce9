"""Loaders as the loops use them: split over ranks, and counted."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Sampler,
    SequentialSampler,
)

from common_platform.errors import ConfigError
from trainkit.data.sharded import is_sharded, shard_of


class RankSampler(Sampler[int]):
    """Every ``world_size``-th index from ``rank`` on: each once, so that an evaluation counts no sample twice."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self._indices = range(rank, length, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


def num_batches_of(loader: Any) -> float:
    """Of a whole pass; infinite where the loader does not say."""
    try:
        return float(len(loader))
    except (TypeError, NotImplementedError):
        return math.inf


def for_rank(loader: Any, strategy: Any, *, training: bool) -> Any:
    """The part of ``loader`` that this rank reads: in training as many batches on each, in evaluation each sample once.

    A loader with a sampler of its own kind, or over an iterable dataset that splits itself, is left alone. Every rank
    must call it.
    """
    rank, world_size = strategy.rank, strategy.world_size
    if is_sharded(loader):
        loader.dataset.for_rank(rank, world_size)
        return loader
    if world_size == 1 or not _is_known(loader):
        return loader
    if isinstance(loader.dataset, IterableDataset):
        share = shard_of(loader, strategy, training=training)
        return loader if share is None else rebuilt(loader, dataset=share)
    usual = {"RandomSampler", "SequentialSampler"}  # of torch, and those of torchdata by the same names
    if type(loader.sampler).__name__ not in usual or type(loader.batch_sampler).__name__ != "BatchSampler":
        return loader
    length = len(loader.dataset)
    if training:
        shuffle = type(loader.sampler).__name__ == "RandomSampler"
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        sampler: Any = DistributedSampler(loader.dataset, world_size, rank, shuffle=shuffle, seed=seed)
    else:
        sampler = RankSampler(length, rank, world_size)
    return rebuilt(loader, sampler=sampler)


def _is_known(loader: Any) -> bool:
    """Whether ``loader`` can be made again with another sampler."""
    return type(loader) is DataLoader or type(loader).__name__ == "StatefulDataLoader"


def unshuffled(loader: Any) -> Any:
    """``loader`` without shuffling, for ``overfit_batches``: the same few batches each epoch."""
    if _is_known(loader) and type(loader.sampler).__name__ == "RandomSampler":
        return rebuilt(loader, sampler=SequentialSampler(loader.dataset))  # type: ignore[arg-type]
    return loader


class Remembers(Sampler[Any]):
    """A batch sampler that keeps the indices it gave."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self.seen: list[list[int]] = []

    def __iter__(self) -> Iterator[Any]:
        self.seen.clear()
        for indices in self._batches:
            self.seen.append(list(indices))
            yield indices

    def __len__(self) -> int:
        return len(self._batches)


def remembering(loader: Any) -> Any:
    """``loader`` with ``Remembers``, where it has a batch sampler."""
    plain = type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset)
    if not plain or loader.batch_sampler is None:
        return loader
    return rebuilt(loader, batch_sampler=Remembers(loader.batch_sampler))


def rebuilt(
    loader: DataLoader[Any],
    *,
    dataset: Any = None,
    sampler: Any = None,
    batch_sampler: Any = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
) -> DataLoader[Any]:
    """A loader like ``loader`` with another dataset, sampler, batch size or number of workers."""
    workers = loader.num_workers if num_workers is None else num_workers
    chosen: dict[str, Any] = {"batch_sampler": batch_sampler}
    if batch_sampler is None:
        iterable = isinstance(loader.dataset, IterableDataset)
        size = loader.batch_size if batch_size is None else batch_size
        chosen = {"batch_size": size, "drop_last": loader.drop_last if size is not None else False}
        chosen |= {} if iterable else {"sampler": loader.sampler if sampler is None else sampler}
        if size is None and loader.batch_sampler is not None:
            chosen = {"batch_sampler": loader.batch_sampler}
    if hasattr(loader, "snapshot_every_n_steps"):  # torchdata's
        chosen["snapshot_every_n_steps"] = loader.snapshot_every_n_steps
    return type(loader)(
        loader.dataset if dataset is None else dataset,
        **chosen,
        num_workers=workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout if workers else 0,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if workers else None,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor if workers else None,
        persistent_workers=loader.persistent_workers and workers > 0,
    )


def is_loader(value: Any) -> bool:
    """Whether ``value`` gives batches and is no plain list of them."""
    return hasattr(value, "dataset") or hasattr(value, "sampler") or hasattr(value, "flattened")


def check_not_empty(loader: Any, stage: str) -> None:
    """Raises:
    ConfigError: the loader says that it has no batches.
    """
    if num_batches_of(loader) == 0:
        raise ConfigError(f"{stage} loader", "0 batches", "one or more: look at the dataset and drop_last")
