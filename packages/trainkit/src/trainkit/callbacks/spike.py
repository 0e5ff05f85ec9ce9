"""A loss that jumps ends the run, and the batches to leave out the next time are written down."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common_platform.errors import ConfigError, TrainingError
from trainkit.callbacks.base import Callback

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer


class TrainingSpikeException(TrainingError):
    """The loss jumped at batch ``batch_idx``."""

    default_code = "loss_spike"

    def __init__(self, batch_idx: int, loss: float = math.nan, mean: float = math.nan) -> None:
        super().__init__("loss", loss, f"near its mean, {mean:.6g} (batch {batch_idx})")
        self.batch_idx = batch_idx


class SpikeDetection(Callback):
    """Raises ``TrainingSpikeException`` on all ranks when the loss of one of them is worse than the last one and far
    from the mean of the newest; that batch and the one before it are written to ``exclude_batches_path``.

    Args:
        mode: "min" or "max": what is better.
        window: losses that the mean is of.
        warmup: batches of an epoch that are not looked at.
        atol: differences below it are no spike.
        rtol: differences below this share of the mean are no spike.
        exclude_batches_path: a JSON file, or a folder for one; default ``default_root_dir/skip_batches.json``.
        finite_only: a loss that is NaN or infinite is a spike.
    """

    def __init__(
        self,
        mode: str = "min",
        window: int = 10,
        warmup: int = 1,
        atol: float | None = None,
        rtol: float | None = 2.0,
        exclude_batches_path: str | Path | None = None,
        finite_only: bool = True,
    ) -> None:
        if mode not in ("min", "max"):
            raise ConfigError("SpikeDetection.mode", mode, "'min' or 'max'")
        if window < 1:
            raise ConfigError("SpikeDetection.window", window, "1 or more")
        self.mode, self.window, self.warmup, self.atol, self.rtol = mode, window, warmup, atol, rtol
        self.exclude_batches_path, self.finite_only = exclude_batches_path, finite_only
        self.bad_batches: list[int] = []
        self.last_val = 0.0
        self._newest: deque[float] = deque(maxlen=window)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: TrainModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is None:
            return
        value = float(loss)
        spikes = torch.tensor(float(batch_idx >= self.warmup and self._is_spike(value)))
        if trainer.strategy.reduce(spikes, "max") > 0:
            self._raise(trainer, batch_idx, value)
        if math.isfinite(value):
            self._newest.append(value)
            self.last_val = value

    def _mean(self) -> float:
        return sum(self._newest) / len(self._newest) if self._newest else math.nan

    def _is_spike(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return self.finite_only
        better = loss <= self.last_val if self.mode == "min" else loss >= self.last_val
        if better or not self._newest:
            return False
        away = abs(loss - self._mean())
        is_far = self.atol is None or away >= abs(self.atol)
        return is_far and (self.rtol is None or away >= abs(self.rtol * self._mean()))

    def _raise(self, trainer: Trainer, batch_idx: int, loss: float) -> None:
        self.bad_batches += [batch_idx - 1, batch_idx]  # the one before may have spoilt the weights
        path = Path(self.exclude_batches_path or trainer.default_root_dir)
        path = path if path.suffix == ".json" else path / "skip_batches.json"
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.bad_batches))
        raise TrainingSpikeException(batch_idx, loss, self._mean())

    def state_dict(self) -> dict[str, Any]:
        return {"last_val": self.last_val, "newest": list(self._newest), "bad_batches": list(self.bad_batches)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_val, self.bad_batches = state_dict["last_val"], list(state_dict["bad_batches"])
        self._newest = deque(state_dict["newest"], maxlen=self.window)
