"""Validation: every batch once, without gradients, and the means of what was logged."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from trainkit.loop.move import to_device

if TYPE_CHECKING:
    from trainkit.trainer import Trainer


def validate(
    trainer: Trainer, loader: Any, *, limit: int | None = None, log: bool = True, fitting: bool = False
) -> dict[str, float]:
    """Run validation and return its metrics.

    Args:
        limit: batches at the most.
        log: whether the loggers hear of it.
        fitting: whether schedulers that watch a metric make their step.
    """
    module = trainer.module
    was_training = module.training
    module.eval()
    trainer.results.start_validation()
    try:
        with torch.inference_mode():
            trainer.call("on_validation_start")
            trainer.call("on_validation_epoch_start")
            for index, batch in enumerate(islice(loader, limit)):
                _step(trainer, batch, index)
            trainer.call("on_validation_epoch_end")
            trainer.results._step.clear()
            metrics = trainer.results.take_means()
        if log:
            trainer.log_metrics(metrics)
        if fitting:
            trainer.step_schedulers("validation", trainer.global_step)
        trainer.call("on_validation_end")
    finally:
        trainer.results.end_validation()
        module.train(was_training)
    return metrics


def _step(trainer: Trainer, batch: Any, index: int) -> None:
    batch = to_device(batch, trainer.strategy.device)
    trainer.call("on_validation_batch_start", batch, index)
    with trainer.precision.context(trainer.strategy.device):
        outputs = trainer.module.validation_step(batch, index)
    trainer.call("on_validation_batch_end", outputs, batch, index)
