"""Stop when a metric no longer improves, and go back to where it was best."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from common_platform.errors import ConfigError, TrainingError
from trainkit.callbacks.base import Callback

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer


class EarlyStopping(Callback):
    """Ends training after ``patience`` validations without improvement.

    Args:
        monitor: the metric.
        min_delta: smaller improvements do not count.
        patience: validations without improvement that are borne.
        mode: "min" or "max".
        restore_best: put the best weights back when training ends.
        check_finite: stop at once when the metric is NaN or infinite.
        stopping_threshold: stop at once when the metric is better than this.

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        mode: str = "min",
        *,
        restore_best: bool = False,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
    ) -> None:
        if mode not in ("min", "max"):
            raise ConfigError("EarlyStopping.mode", mode, "'min' or 'max'")
        if patience < 0 or min_delta < 0:
            raise ConfigError("EarlyStopping.patience", patience, "0 or more, and min_delta too")
        self.monitor = monitor
        self.min_delta = min_delta
        self.patience = patience
        self.mode = mode
        self.restore_best = restore_best
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.wait_count = 0
        self.stopped_step = 0  # the optimizer step at which it stopped; 0: it did not
        self.best_score = math.inf if mode == "min" else -math.inf
        self.best_step = 0
        self._best: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        return f"EarlyStopping({self.monitor},{self.mode})"

    def on_train_start(self, trainer: Trainer, module: TrainModule) -> None:
        trainer.should_stop = trainer.should_stop or bool(self.stopped_step)

    def on_validation_end(self, trainer: Trainer, module: TrainModule) -> None:
        if trainer.sanity_checking or not trainer.is_fitting:
            return
        score = trainer.callback_metrics.get(self.monitor)
        if score is None:
            raise TrainingError(
                "EarlyStopping.monitor", self.monitor, f"a logged metric: {sorted(trainer.callback_metrics)}"
            )
        if self._is_better(score):
            self.best_score, self.best_step, self.wait_count = score, trainer.global_step, 0
            if self.restore_best:
                state = trainer.strategy.state_dict()
                self._best = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        else:
            self.wait_count += 1
        if self._is_enough(score):
            self.stopped_step = max(trainer.global_step, 1)
            trainer.should_stop = True

    def _is_better(self, score: float) -> bool:
        gain = self.best_score - score if self.mode == "min" else score - self.best_score
        return math.isfinite(score) and gain > self.min_delta

    def _is_enough(self, score: float) -> bool:
        if self.check_finite and not math.isfinite(score):
            return True
        threshold = self.stopping_threshold
        if threshold is not None and (score < threshold if self.mode == "min" else score > threshold):
            return True
        return self.wait_count > 0 and self.wait_count >= self.patience

    def on_train_end(self, trainer: Trainer, module: TrainModule) -> None:
        if self._best is not None:
            trainer.strategy.load_state_dict(self._best)

    def state_dict(self) -> dict[str, Any]:
        return {
            "wait_count": self.wait_count,
            "stopped_step": self.stopped_step,
            "best_score": self.best_score,
            "best_step": self.best_step,
            "best": self._best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.wait_count, self.stopped_step = state["wait_count"], state["stopped_step"]
        self.best_score, self.best_step, self._best = state["best_score"], state["best_step"], state["best"]
