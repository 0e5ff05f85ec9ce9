"""The Trainer's smaller settings, checked once: how the loop goes, and torch's own switches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from common_platform.errors import ConfigError

ALGORITHMS = ("norm", "value")


def at_least(name: str, value: Any, low: int) -> int:
    """``value``, a whole number not below ``low``.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(name, value, f"a whole number, >= {low}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """How the loop goes from batch to batch; how long is in ``Limits``. What the arguments mean is said in Trainer."""

    accumulate_grad_batches: int = 1
    log_every_n_steps: int = 50
    num_sanity_val_steps: int = 2
    reload_dataloaders_every_n_epochs: int = 0
    max_skipped: int = 100
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str | None = None

    def __post_init__(self) -> None:
        at_least("accumulate_grad_batches", self.accumulate_grad_batches, 1)
        at_least("log_every_n_steps", self.log_every_n_steps, 0)
        at_least("num_sanity_val_steps", self.num_sanity_val_steps, -1)
        at_least("reload_dataloaders_every_n_epochs", self.reload_dataloaders_every_n_epochs, 0)
        at_least("max_skipped", self.max_skipped, 1)
        value, algorithm = self.gradient_clip_val, self.gradient_clip_algorithm
        if algorithm not in (None, *ALGORITHMS):
            raise ConfigError("gradient_clip_algorithm", algorithm, "'norm' or 'value'")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
            raise ConfigError("gradient_clip_val", value, "a number, 0 or more, or None")


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchConfig:
    """Torch's own switches."""

    deterministic: bool | str | None = None
    benchmark: bool | None = None
    detect_anomaly: bool = False
    inference_mode: bool = True

    def apply(self) -> None:
        """Set those that hold for the whole process."""
        if self.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=self.deterministic == "warn")
        if self.benchmark is not None:
            torch.backends.cudnn.benchmark = self.benchmark
