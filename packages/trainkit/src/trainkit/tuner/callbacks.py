"""The Tuner's searches as callbacks, which run when a fit begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainkit.callbacks.base import Callback
from trainkit.tuner.batch_size import scale_batch_size
from trainkit.tuner.lr_finder import LRFinder, lr_find

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer


class LearningRateFinder(Callback):
    """Finds a learning rate when a fit begins, and trains with it. The arguments are those of ``Tuner.lr_find``."""

    def __init__(
        self,
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training_steps: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> None:
        self._settings = {
            "min_lr": min_lr,
            "max_lr": max_lr,
            "num_training": num_training_steps,
            "mode": mode,
            "early_stop_threshold": early_stop_threshold,
            "update_attr": update_attr,
            "attr_name": attr_name,
        }
        self.optimal_lr: LRFinder | None = None

    def lr_find(self, trainer: Trainer, pl_module: TrainModule) -> None:
        """Search, and set what was found; override ``on_fit_start`` to do it at other times."""
        self.optimal_lr = lr_find(trainer, pl_module, trainer.data.given_to_fit(), **self._settings)  # type: ignore[arg-type]
        rate = self.optimal_lr.suggestion() if self.optimal_lr is not None and self._settings["update_attr"] else None
        if rate is not None:
            for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
                group["lr"] = rate

    def on_fit_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        self.lr_find(trainer, pl_module)


class BatchSizeFinder(Callback):
    """Finds the largest batch that fits when a fit begins, and trains with it; the arguments are those of
    ``Tuner.scale_batch_size``."""

    def __init__(
        self,
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> None:
        self._settings = {
            "mode": mode,
            "steps_per_trial": steps_per_trial,
            "init_val": init_val,
            "max_trials": max_trials,
            "batch_arg_name": batch_arg_name,
            "margin": margin,
            "max_val": max_val,
        }
        self.optimal_batch_size: int | None = None

    def scale_batch_size(self, trainer: Trainer, pl_module: TrainModule) -> None:
        """Search, and set what was found."""
        given = trainer.data.given_to_fit()
        self.optimal_batch_size = scale_batch_size(trainer, pl_module, given, method="fit", **self._settings)  # type: ignore[arg-type]
        trainer.data.forget("fit")

    def on_fit_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        self.scale_batch_size(trainer, pl_module)
