"""End training after a time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from trainkit.callbacks.base import Callback
from trainkit.durations import Duration, seconds_of

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer


class Timer(Callback):
    """Stops training once ``duration`` of it has passed, the time before a resume included.

    Args:
        duration: a ``timedelta``, "DD:HH:MM:SS", "HH:MM:SS", or a mapping of keyword arguments of ``timedelta``.

    Raises:
        ConfigError: it is none of these, or not above zero.
    """

    def __init__(self, duration: Duration) -> None:
        self.seconds = seconds_of("max_time", duration)
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
        if trainer.strategy.broadcast_plain(self.time_elapsed() >= self.seconds):
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: TrainModule) -> None:
        self._before, self._started = self.time_elapsed(), None

    def state_dict(self) -> dict[str, Any]:
        return {"elapsed": self.time_elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["elapsed"]
