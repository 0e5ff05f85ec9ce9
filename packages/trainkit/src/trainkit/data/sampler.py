"""The order of samples as a function of a seed and an epoch, so that a run can go on in the middle of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler


class ResumableSampler(Sampler[int]):
    """All indices once an epoch, shuffled by (seed, epoch) or in order; may start in the middle.

    Args:
        length: of the dataset.
        shuffle: whether to shuffle.
        seed: the same on every rank.
    """

    def __init__(self, length: int, *, shuffle: bool, seed: int = 0) -> None:
        self._length = length
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = 0
        self._skip = 0

    def set_position(self, epoch: int, samples: int = 0) -> None:
        """The next iteration is of ``epoch`` and leaves the first ``samples`` out."""
        self._epoch, self._skip = epoch, samples

    def __iter__(self) -> Iterator[int]:
        if not self._shuffle:
            return iter(range(self._skip, self._length))
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + self._epoch) % 2**63)
        return iter(torch.randperm(self._length, generator=generator).tolist()[self._skip :])

    def __len__(self) -> int:
        return self._length


class TrainLoader:
    """A user's loader that can begin an epoch at any batch.

    A ``DataLoader`` over a map-style dataset with torch's own samplers gets a ``ResumableSampler``; any other iterable
    is used as it is, and the batches before the position are drawn and dropped.
    """

    def __init__(self, loader: Any, seed: int) -> None:
        self._sampler: ResumableSampler | None = None
        self._loader = loader
        self._generator = torch.Generator()
        if _takes_our_sampler(loader):
            shuffle = isinstance(loader.sampler, RandomSampler)
            self._sampler = ResumableSampler(len(loader.dataset), shuffle=shuffle, seed=seed)
            self._loader = _with_sampler(loader, self._sampler, self._generator)

    def __len__(self) -> int:
        return len(self._loader)

    @property
    def num_batches(self) -> float:
        """Of a whole epoch; infinite where the loader does not say."""
        try:
            return len(self)
        except TypeError:
            return float("inf")

    def batches(self, epoch: int, skip: int) -> Iterator[Any]:
        """The batches of ``epoch`` from number ``skip`` on."""
        self._generator.manual_seed(epoch)
        if self._sampler is not None:
            self._sampler.set_position(epoch, skip * (self._loader.batch_size or 1))
            return iter(self._loader)
        if hasattr(getattr(self._loader, "sampler", None), "set_epoch"):
            self._loader.sampler.set_epoch(epoch)
        iterator = iter(self._loader)
        for _ in range(skip):
            next(iterator, None)
        return iterator


def _takes_our_sampler(loader: Any) -> bool:
    return (
        type(loader) is DataLoader
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_size is not None
        and type(loader.sampler) in (RandomSampler, SequentialSampler)
        and not getattr(loader.sampler, "replacement", False)
        and (not isinstance(loader.sampler, RandomSampler) or loader.sampler._num_samples is None)
    )


def _with_sampler(loader: Any, sampler: ResumableSampler, generator: torch.Generator) -> DataLoader[Any]:
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
