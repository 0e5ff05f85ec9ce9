"""Loaders as the loops use them: split over ranks, counted, and able to go on in the middle of an epoch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from common_platform.errors import ConfigError
from trainkit.data.seed import rng_state, set_rng_state


class RankSampler(Sampler[int]):
    """Every ``world_size``-th index from ``rank`` on: each once, so that an evaluation counts no sample twice."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self._indices = range(rank, length, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


class TrainLoader:
    """Training batches that can begin an epoch at any batch.

    The user's loader is used as it is, so its order is what it would be in a plain loop. To go on in the middle of an
    epoch, random generators are put where they were at its beginning, and the batches before are passed over: only
    their indices are drawn where there are no worker processes, else they are read again.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._start: dict[str, Any] | None = None  # of the epoch under way

    @property
    def num_batches(self) -> float:
        """Of a whole epoch; infinite where the loader does not say."""
        return num_batches_of(self.loader)

    def batches(self, epoch: int, skip: int) -> Iterator[Any]:
        """The batches of ``epoch`` from number ``skip`` on."""
        for sampler in (getattr(self.loader, "sampler", None), getattr(self.loader, "batch_sampler", None)):
            if sampler is not None and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)
        if not skip or self._start is None:
            self._start = {"rng": rng_state(), "generators": [g.get_state() for g in self._generators()]}
        if not skip:
            return iter(self.loader)
        set_rng_state(self._start["rng"])
        for generator, state in zip(self._generators(), self._start["generators"], strict=True):
            generator.set_state(state)
        return self._passed_over(skip)

    def _passed_over(self, skip: int) -> Iterator[Any]:
        plain = type(self.loader) is DataLoader and not isinstance(self.loader.dataset, IterableDataset)
        if plain and self.loader.num_workers == 0 and self.loader.batch_sampler is not None:
            later = _Later(self.loader.batch_sampler)
            rest = iter(rebuilt(self.loader, batch_sampler=later))
            later.pass_over(skip)
            return rest
        batches = iter(self.loader)
        for _ in range(skip):
            next(batches, None)
        return batches

    def _generators(self) -> list[torch.Generator]:
        """The loader's own, that the state of the global ones does not cover."""
        owners = (self.loader, getattr(self.loader, "sampler", None))
        found = {id(g): g for g in (getattr(o, "generator", None) for o in owners) if isinstance(g, torch.Generator)}
        return list(found.values())

    def state_dict(self) -> dict[str, Any]:
        return {"start": self._start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._start = state["start"]


class _Later(Sampler[Any]):
    """A batch sampler without its first batches.

    A loader draws its own seed before the sampler draws: so they are passed over once the loader's iterator is there.
    """

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self._rest: Iterator[Any] = iter(())

    def pass_over(self, skip: int) -> None:
        self._rest = iter(self._batches)
        for _ in range(skip):
            next(self._rest, None)

    def __iter__(self) -> Iterator[Any]:
        yield from self._rest

    def __len__(self) -> int:
        return len(self._batches)


def num_batches_of(loader: Any) -> float:
    """Of a whole pass; infinite where the loader does not say."""
    try:
        return float(len(loader))
    except (TypeError, NotImplementedError):
        return math.inf


def for_rank(loader: Any, rank: int, world_size: int, *, training: bool) -> Any:
    """The part of ``loader`` that ``rank`` reads: in training as many batches on each, in evaluation each sample once.

    A loader with a sampler of its own kind, or over an iterable dataset, is left alone: it must split itself.
    """
    if world_size == 1 or type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        return loader
    if type(loader.sampler) not in (RandomSampler, SequentialSampler) or type(loader.batch_sampler) is not BatchSampler:
        return loader
    length = len(loader.dataset)  # type: ignore[arg-type]
    if training:
        shuffle = isinstance(loader.sampler, RandomSampler)
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        sampler: Any = DistributedSampler(loader.dataset, world_size, rank, shuffle=shuffle, seed=seed)
    else:
        sampler = RankSampler(length, rank, world_size)
    return rebuilt(loader, sampler=sampler)


def unshuffled(loader: Any) -> Any:
    """``loader`` without shuffling, for ``overfit_batches``: the same few batches each epoch."""
    if type(loader) is DataLoader and isinstance(loader.sampler, RandomSampler):
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


def rebuilt(loader: DataLoader[Any], *, sampler: Any = None, batch_sampler: Any = None) -> DataLoader[Any]:
    """A loader like ``loader`` with another sampler."""
    chosen: dict[str, Any] = {"batch_sampler": batch_sampler}
    if batch_sampler is None:
        chosen = {"sampler": sampler, "batch_size": loader.batch_size, "drop_last": loader.drop_last}
    return DataLoader(
        loader.dataset,
        **chosen,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def several(loaders: Any) -> list[Any]:
    """``loaders`` as a list: one loader, or a list, tuple or mapping of loaders. A list of batches is one loader."""
    inner = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
    if isinstance(inner, list | tuple) and inner and all(_is_loader(one) for one in inner):
        return list(inner)
    return [loaders]


def _is_loader(value: Any) -> bool:
    return hasattr(value, "dataset") or hasattr(value, "sampler") or hasattr(value, "loaders")


def check_not_empty(loader: Any, stage: str) -> None:
    """Raises:
    ConfigError: the loader says that it has no batches.
    """
    if num_batches_of(loader) == 0:
        raise ConfigError(f"{stage} loader", "0 batches", "one or more: look at the dataset and drop_last")
