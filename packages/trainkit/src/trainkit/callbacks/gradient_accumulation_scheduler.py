"""More or fewer micro-batches to a step as training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from common_platform.errors import ConfigError
from trainkit.callbacks.base import Callback

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer


class GradientAccumulationScheduler(Callback):
    """``accumulate_grad_batches`` by epoch.

    Args:
        scheduling: from which epoch on how many; ``{0: 8, 4: 4}`` is 8, and 4 from the fifth epoch on.

    Raises:
        ConfigError: it is empty, or a number is out of range.
    """

    def __init__(self, scheduling: Mapping[int, int]) -> None:
        wrong = [pair for pair in scheduling.items() if not all(isinstance(n, int) for n in pair)]
        if not scheduling or wrong or min(scheduling) < 0 or min(scheduling.values()) < 1:
            raise ConfigError("scheduling", dict(scheduling), "epochs from 0 on, each with a number >= 1")
        self.scheduling = {0: 1} | dict(scheduling)
        self.epochs = sorted(self.scheduling)

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        return self.scheduling[max(first for first in self.epochs if first <= epoch)]

    def on_train_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if trainer.accumulate_grad_batches != 1:
            raise ConfigError("accumulate_grad_batches", trainer.accumulate_grad_batches, "1 beside "
                              "GradientAccumulationScheduler")  # fmt: skip
        self._set(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        self._set(trainer)

    def teardown(self, trainer: Trainer, pl_module: TrainModule, stage: str) -> None:
        trainer.accumulate_grad_batches = 1

    def _set(self, trainer: Trainer) -> None:
        trainer.accumulate_grad_batches = self.get_accumulate_grad_batches(trainer.current_epoch)
