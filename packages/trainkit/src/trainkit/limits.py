"""How long and how often: the Trainer's numbers, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common_platform.errors import ConfigError

FOREVER = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Counts are exact when they are integers and shares of the whole when they are floats in [0, 1]."""

    max_epochs: int | None = None
    max_steps: int = FOREVER
    limit_train_batches: int | float = 1.0
    limit_val_batches: int | float = 1.0
    val_check_interval: int | float = 1.0
    check_val_every_n_epoch: int = 1
    num_val_batches: float = float("inf")

    def __post_init__(self) -> None:
        for name in ("limit_train_batches", "limit_val_batches", "val_check_interval"):
            value = getattr(self, name)
            if value < 0 or (isinstance(value, float) and value > 1):
                raise ConfigError(name, value, "a whole number from 0 on, or a share 0.0..1.0")
        if self.max_steps < FOREVER or self.max_steps == 0:
            raise ConfigError("max_steps", self.max_steps, "1 or more, or -1 for no limit")
        if self.max_epochs is not None and self.max_epochs < FOREVER:
            raise ConfigError("max_epochs", self.max_epochs, "0 or more, or -1 for no limit")
        if self.check_val_every_n_epoch < 1:
            raise ConfigError("check_val_every_n_epoch", self.check_val_every_n_epoch, "1 or more")

    def of_training(self, num_batches: float) -> float:
        return _of(num_batches, self.limit_train_batches)

    @property
    def validation_batches(self) -> int | None:
        most = _of(self.num_val_batches, self.limit_val_batches)
        return None if most == float("inf") else int(most)

    def validation_interval(self, num_batches: float) -> int:
        """In micro-batches; 0: only at the end of an epoch.

        Raises:
            ConfigError: an interval longer than the epoch, or a share of an endless one.
        """
        interval: Any = self.val_check_interval
        if isinstance(interval, float):
            if interval == 1.0:
                return 0
            if num_batches == float("inf"):
                raise ConfigError("val_check_interval", interval, "a whole number: the loader does not tell its length")
            return max(int(num_batches * interval), 1)
        if interval > num_batches:
            raise ConfigError("val_check_interval", interval, f"at most {num_batches:g}, the batches of an epoch")
        return int(interval)

    def reached_steps(self, global_step: int) -> bool:
        return self.max_steps != FOREVER and global_step >= self.max_steps

    def reached_epochs(self, epoch: int) -> bool:
        most = self.max_epochs if self.max_epochs is not None else (FOREVER if self.max_steps != FOREVER else 1000)
        return most != FOREVER and epoch >= most

    def validates_in(self, epoch: int) -> bool:
        return (epoch + 1) % self.check_val_every_n_epoch == 0 and self.limit_val_batches > 0


def _of(total: float, limit: int | float) -> float:
    if isinstance(limit, float):
        return total if limit == 1.0 or total == float("inf") else float(int(total * limit))
    return min(total, float(limit))
