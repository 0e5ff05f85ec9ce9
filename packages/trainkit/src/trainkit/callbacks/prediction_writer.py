"""Write predictions as they come, or all at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common_platform.errors import ConfigError
from trainkit.callbacks.base import Callback
from trainkit.loop.iterator import takes_iterator

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer

INTERVALS = ("batch", "epoch", "batch_and_epoch")


class BasePredictionWriter(Callback):
    """The base of callbacks that write what ``predict_step`` returns. Override one of the two methods.

    Args:
        write_interval: "batch", "epoch" or "batch_and_epoch".
    """

    def __init__(self, write_interval: str = "batch") -> None:
        if write_interval not in INTERVALS:
            raise ConfigError("write_interval", write_interval, f"one of {INTERVALS}")
        self.on_batch = "batch" in write_interval
        self.on_epoch = "epoch" in write_interval

    def setup(self, trainer: Trainer, pl_module: TrainModule, stage: str) -> None:
        """Raises:
        ConfigError: ``predict_step`` reads its batches itself, so that nothing is known of them.
        """
        if stage == "predict" and takes_iterator(pl_module.predict_step):
            raise ConfigError(type(self).__name__, "predict_step(dataloader_iter)", "predict_step(batch, batch_idx)")

    def write_on_batch_end(
        self, trainer: Trainer, pl_module: TrainModule, prediction: Any, batch_indices: Sequence[int] | None,
        batch: Any, batch_idx: int, dataloader_idx: int,
    ) -> None:  # fmt: skip
        """Write one batch; ``batch_indices`` are its samples' places in the dataset, None where they are not known."""

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: TrainModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write all: a list of batches, or a list a loader where there are several; the indices in the same form."""

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: TrainModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if self.on_batch:
            indices = trainer.batch_indices(dataloader_idx)
            found = indices[batch_idx] if indices else None
            self.write_on_batch_end(trainer, pl_module, outputs, found, batch, batch_idx, dataloader_idx)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if self.on_epoch:
            count = len(trainer.predictions)
            indices = [trainer.batch_indices(number) for number in range(count)]
            several = count > 1
            self.write_on_epoch_end(
                trainer,
                pl_module,
                trainer.predictions if several else trainer.predictions[0],
                indices if several else indices[:1],
            )
