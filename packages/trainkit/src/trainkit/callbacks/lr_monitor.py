"""The learning rate beside the other metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainkit.callbacks.base import Callback

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer


class LearningRateMonitor(Callback):
    """Logs the rate that each step was made with, as ``lr-AdamW``; one column a parameter group where they differ."""

    def on_train_batch_start(self, trainer: Trainer, module: TrainModule, batch: Any, batch_idx: int) -> None:
        optimizer = trainer.optimizer
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        name = f"lr-{type(optimizer).__name__}"
        if len(set(rates)) == 1:
            module.log(name, rates[0], on_step=True, on_epoch=False)
            return
        for index, rate in enumerate(rates):
            module.log(f"{name}/group{index}", rate, on_step=True, on_epoch=False)
