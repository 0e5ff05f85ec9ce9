"""End training after a time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from common_platform.errors import ConfigError
from trainkit.callbacks.base import Callback
from trainkit.durations import Duration, seconds_of
from trainkit.ranks import rank_zero_info

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer


class Timer(Callback):
    """Stops training once ``duration`` of it has passed, the time before a resume included.

    Args:
        duration: a ``timedelta``, "DD:HH:MM:SS", "HH:MM:SS", or a mapping of keyword arguments of ``timedelta``.
        interval: look at the time after each "step", or after each "epoch".
        verbose: say so when the time is over.

    Raises:
        ConfigError: ``duration`` is none of these or not above zero, or there is no such interval.
    """

    def __init__(self, duration: Duration, interval: str = "step", verbose: bool = True) -> None:
        if interval not in ("step", "epoch"):
            raise ConfigError("Timer.interval", interval, "'step' or 'epoch'")
        self.seconds = seconds_of("max_time", duration)
        self._interval, self._verbose = interval, verbose
        self._before = 0.0
        self._started: float | None = None

    def time_elapsed(self) -> float:
        """Seconds of training so far."""
        return self._before + (time.monotonic() - self._started if self._started is not None else 0.0)

    def time_remaining(self) -> float:
        return max(self.seconds - self.time_elapsed(), 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        self._started = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: TrainModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._interval == "step":
            self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if self._interval == "epoch":
            self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        if trainer.strategy.broadcast_plain(self.time_elapsed() >= self.seconds):
            trainer.should_stop = True
            if self._verbose:
                rank_zero_info(f"the time of {self.seconds:g} s is over, after {self.time_elapsed():.0f} s")

    def on_train_end(self, trainer: Trainer, pl_module: TrainModule) -> None:
        self._before, self._started = self.time_elapsed(), None

    def state_dict(self) -> dict[str, Any]:
        return {"elapsed": self.time_elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["elapsed"]
