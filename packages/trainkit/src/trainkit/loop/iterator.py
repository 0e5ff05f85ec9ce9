"""Steps that read their batches themselves: ``training_step(self, dataloader_iter)`` and the like."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from common_platform.errors import ConfigError

NAME = "dataloader_iter"
Numbered = tuple[Any, int, int, bool]  # a batch, its number, that of its loader, whether it is known to be the last


def takes_iterator(step: Callable[..., Any]) -> bool:
    """Whether ``step`` wants the batches' iterator in place of a batch.

    Raises:
        ConfigError: it wants something else beside it.
    """
    parameters = list(inspect.signature(step).parameters)
    if NAME not in parameters:
        return False
    if parameters != [NAME]:
        raise ConfigError(getattr(step, "__name__", "step"), ", ".join(parameters), f"{NAME} alone: the numbers of a "
                          "batch come with it")  # fmt: skip
    return True


class StepIterator(Iterator[tuple[Any, int, int]]):
    """Gives ``(batch, batch_idx, dataloader_idx)``: batches as the loader makes them, on whatever device that is.

    Args:
        batches: with their numbers.
        taken: batches that were read before.
        length: of all; infinite where it is not known.
    """

    def __init__(
        self, batches: Iterable[tuple[Any, int, int, bool]], *, taken: int = 0, length: float = math.inf
    ) -> None:
        self._batches = iter(batches)
        self.length = length
        self.fetched = taken
        self.done = taken >= length
        self.batch: Any = None  # the newest, for hooks
        self.batch_idx = max(taken - 1, 0)
        self.dataloader_idx = 0

    def __next__(self) -> tuple[Any, int, int]:
        if self.done:
            raise StopIteration
        found = next(self._batches, None)
        if found is None:
            self.done = True
            raise StopIteration
        self.batch, self.batch_idx, self.dataloader_idx, self.done = found
        self.fetched += 1
        return self.batch, self.batch_idx, self.dataloader_idx
