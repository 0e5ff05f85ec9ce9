"""Training loaders that can go on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

from trainkit.data.loaders import num_batches_of, rebuilt
from trainkit.data.seed import rng_state, set_rng_state


class Resumable(Protocol):
    """Training batches that can begin an epoch at any batch."""

    @property
    def num_batches(self) -> float:
        """Of a whole epoch; infinite where the loader does not say."""

    def batches(self, epoch: int, skip: int) -> Iterator[Any]:
        """The batches of ``epoch`` from number ``skip`` on; after a resume, ``skip`` is where the run stood."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class TrainLoader:
    """Any loader.

    The user's loader is used as it is, so its order is what it would be in a plain loop. To go on in the middle of an
    epoch, random generators are put where they were at its beginning, and the batches before are passed over: only
    their indices are drawn where there are no worker processes, else they are read again.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._start: dict[str, Any] | None = None  # of the epoch under way

    @property
    def num_batches(self) -> float:
        return num_batches_of(self.loader)

    def batches(self, epoch: int, skip: int) -> Iterator[Any]:
        set_epoch(self.loader, epoch)
        if not skip or self._start is None:
            self._start = {"rng": rng_state(), "generators": [g.get_state() for g in self._generators()]}
        if not skip:
            return iter(self.loader)
        set_rng_state(self._start["rng"])
        self._set_generators(self._start["generators"])
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

    def _set_generators(self, states: list[torch.Tensor]) -> None:
        for generator, state in zip(self._generators(), states, strict=True):
            generator.set_state(state)

    def state_dict(self) -> dict[str, Any]:
        return {"start": self._start, "generators": [g.get_state() for g in self._generators()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._start = state["start"]
        self._set_generators(state["generators"])  # an epoch that begins anew goes on from here


class StatefulLoader:
    """A loader that keeps its own position, such as ``StatefulDataLoader`` of torchdata."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    @property
    def num_batches(self) -> float:
        return num_batches_of(self.loader)

    def batches(self, epoch: int, skip: int) -> Iterator[Any]:
        set_epoch(self.loader, epoch)
        return iter(self.loader)

    def state_dict(self) -> dict[str, Any]:
        return {"stateful": self.loader.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loader.load_state_dict(state["stateful"])


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


def is_stateful(loader: Any) -> bool:
    """Whether ``loader`` keeps its own position."""
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell samplers, and streams that shuffle by it, which epoch begins."""
    for one in (*(getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset")), loader):
        if one is not None and hasattr(one, "set_epoch"):
            one.set_epoch(epoch)
