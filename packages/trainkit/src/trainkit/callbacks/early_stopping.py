"""Stop when a metric no longer improves, and go back to where it was best."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from common_platform.errors import ConfigError
from trainkit.callbacks.base import Callback

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer


class EarlyStoppingReason(Enum):
    """Why training was stopped."""

    NOT_STOPPED = 0
    STOPPING_THRESHOLD = 1
    DIVERGENCE_THRESHOLD = 2
    PATIENCE_EXHAUSTED = 3
    NON_FINITE_METRIC = 4


class EarlyStopping(Callback):
    """Ends training after ``patience`` looks without improvement.

    Args:
        monitor: the metric; or a function, trainer -> a number, whose name it then has.
        min_delta: smaller improvements do not count.
        patience: looks without improvement that are borne.
        verbose: print why it stops.
        mode: "min" or "max".
        strict: whether a metric that nobody logged is an error.
        check_finite: stop at once when the metric is NaN or infinite.
        stopping_threshold: stop at once when the metric is better than this.
        divergence_threshold: stop at once when the metric is worse than this.
        check_on_train_epoch_end: look at the end of an epoch and not after each validation; default: where there is
            one validation an epoch.
        log_rank_zero_only: taken for Lightning's sake; only the first rank prints.
        every_n: only every n-th of these moments counts.
        every_n_train_steps: look after every so many optimizer steps instead.
        restore_best: put the best weights back when training ends.

    Raises:
        ConfigError: an argument is out of its range.
    """

    watches_metrics = True

    def __init__(
        self,
        monitor: str | Callable[[Trainer], float | torch.Tensor],
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
        *,
        every_n: int = 1,
        every_n_train_steps: int | None = None,
        restore_best: bool = False,
    ) -> None:
        if mode not in ("min", "max"):
            raise ConfigError("EarlyStopping.mode", mode, "'min' or 'max'")
        if patience < 0:
            raise ConfigError("EarlyStopping.patience", patience, "0 or more")
        if not min_delta >= 0:
            raise ConfigError("EarlyStopping.min_delta", min_delta, "0 or more")
        for name, number in (("every_n", every_n), ("every_n_train_steps", every_n_train_steps)):
            if number is not None and number < 1:
                raise ConfigError(f"EarlyStopping.{name}", number, "1 or more")
        if every_n_train_steps is not None and (every_n != 1 or check_on_train_epoch_end is not None):
            raise ConfigError("EarlyStopping.every_n_train_steps", every_n_train_steps, "None beside every_n or "
                              "check_on_train_epoch_end")  # fmt: skip
        self._measure = monitor if callable(monitor) else None
        self.monitor = monitor if isinstance(monitor, str) else getattr(monitor, "__name__", type(monitor).__name__)
        self.every_n, self.every_n_train_steps = every_n, every_n_train_steps
        self._moments = 0
        self._looked_at = 0  # the optimizer step
        self.min_delta = min_delta
        self.patience = patience
        self.verbose = verbose
        self.mode = mode
        self.strict = strict
        self.restore_best = restore_best
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.wait_count = 0
        self.stopped_epoch = 0
        self.stopped_step = 0  # the optimizer step at which it stopped; 0: it did not
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message: str | None = None
        self.best_score = torch.tensor(math.inf if mode == "min" else -math.inf)
        self.best_step = 0
        self._on_train_epoch_end = check_on_train_epoch_end
        self._best: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    def on_train_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        trainer.should_stop = trainer.should_stop or bool(self.stopped_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: TrainModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, every = trainer.global_step, self.every_n_train_steps
        if every is not None and step % every == 0 and step != self._looked_at:
            self._looked_at = step
            self._look(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if trainer.is_fitting and not trainer.sanity_checking and not self._looks_after_epoch(trainer):
            self._come_by(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if self._looks_after_epoch(trainer):
            self._come_by(trainer)

    def _come_by(self, trainer: Trainer) -> None:
        if self.every_n_train_steps is not None:
            return
        self._moments += 1
        if self._moments % self.every_n == 0:
            self._look(trainer)

    def _looks_after_epoch(self, trainer: Trainer) -> bool:
        if self._on_train_epoch_end is not None:
            return self._on_train_epoch_end
        limits = trainer.limits
        return limits.val_check_interval == 1.0 and limits.check_val_every_n_epoch == 1

    def _look(self, trainer: Trainer) -> None:
        found = self._measured(trainer)
        if found is None:
            if self.strict:
                known = sorted(trainer.callback_metrics)
                raise ConfigError("EarlyStopping.monitor", self.monitor, f"a logged metric: {known}")
            return
        score = float(found)
        if self._is_better(score):
            self.best_score, self.best_step, self.wait_count = found.detach().cpu(), trainer.global_step, 0
            if self.restore_best:
                state = trainer.strategy.state_dict()
                self._best = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        else:
            self.wait_count += 1
        reason, message = self._reason(score)
        self.stopping_reason, self.stopping_reason_message = reason, message
        stops = torch.tensor(float(reason is not EarlyStoppingReason.NOT_STOPPED))
        if trainer.strategy.reduce(stops, "max") > 0:  # all ranks stop where one does
            self.stopped_step, self.stopped_epoch = max(trainer.global_step, 1), trainer.current_epoch
            trainer.should_stop = True
            if self.verbose:
                trainer.print(f"stopped at step {trainer.global_step}: {self.monitor} {message}")

    def _measured(self, trainer: Trainer) -> torch.Tensor | None:
        if self._measure is None:
            return trainer.callback_metrics.get(self.monitor)
        return torch.as_tensor(self._measure(trainer), dtype=torch.float64)

    def _is_better(self, score: float) -> bool:
        best = float(self.best_score)
        gain = best - score if self.mode == "min" else score - best
        return math.isfinite(score) and gain > self.min_delta

    def _reason(self, score: float) -> tuple[EarlyStoppingReason, str | None]:
        better = operator.lt if self.mode == "min" else operator.gt
        if self.check_finite and not math.isfinite(score):
            return EarlyStoppingReason.NON_FINITE_METRIC, f"is {score}"
        if self.stopping_threshold is not None and better(score, self.stopping_threshold):
            return EarlyStoppingReason.STOPPING_THRESHOLD, f"is better than {self.stopping_threshold}"
        if self.divergence_threshold is not None and better(self.divergence_threshold, score):
            return EarlyStoppingReason.DIVERGENCE_THRESHOLD, f"is worse than {self.divergence_threshold}"
        if self.wait_count > 0 and self.wait_count >= self.patience:
            message = f"has not improved {self.wait_count} times; best {float(self.best_score):.6g}"
            return EarlyStoppingReason.PATIENCE_EXHAUSTED, message
        return EarlyStoppingReason.NOT_STOPPED, None

    def on_train_end(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if self._best is not None:
            trainer.strategy.load_state_dict(self._best)

    def state_dict(self) -> dict[str, Any]:
        return {
            "wait_count": self.wait_count,
            "stopped_step": self.stopped_step,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score,
            "best_step": self.best_step,
            "best": self._best,
            "moments": self._moments,
            "looked_at": self._looked_at,
            "stopping_reason": self.stopping_reason.value,
            "stopping_reason_message": self.stopping_reason_message,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.wait_count, self.stopped_step = state_dict["wait_count"], state_dict["stopped_step"]
        self.stopped_epoch, self.best_score = state_dict["stopped_epoch"], state_dict["best_score"]
        self.best_step, self._best = state_dict["best_step"], state_dict["best"]
        self._moments, self._looked_at = state_dict["moments"], state_dict["looked_at"]
        self.stopping_reason = EarlyStoppingReason(state_dict["stopping_reason"])
        self.stopping_reason_message = state_dict["stopping_reason_message"]
