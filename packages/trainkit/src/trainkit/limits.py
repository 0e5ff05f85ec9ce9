"""How long and how often: the Trainer's numbers, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from common_platform.errors import ConfigError

FOREVER = -1
SHARES = (
    "limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches",
)  # fmt: skip
LIMIT_OF = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Counts are exact when they are integers and shares of the whole when they are floats in [0, 1]."""

    max_epochs: int | None = None
    min_epochs: int = 0
    max_steps: int = FOREVER
    min_steps: int = 0
    limit_train_batches: int | float = 1.0
    limit_val_batches: int | float = 1.0
    limit_test_batches: int | float = 1.0
    limit_predict_batches: int | float = 1.0
    overfit_batches: int | float = 0.0
    val_check_interval: int | float | timedelta = 1.0
    check_val_every_n_epoch: int | None = 1  # None: every val_check_interval batches, whatever the epoch

    def __post_init__(self) -> None:
        timed = isinstance(self.val_check_interval, timedelta)
        for name in SHARES if timed else (*SHARES, "val_check_interval"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or value < 0 or (isinstance(value, float) and value > 1):
                raise ConfigError(name, value, "a whole number from 0 on, or a share 0.0..1.0")
        if not self.val_check_interval:
            raise ConfigError("val_check_interval", self.val_check_interval, "1 batch or more, or a share above 0.0")
        _whole("max_steps", self.max_steps, FOREVER)
        if self.max_steps == 0:
            raise ConfigError("max_steps", self.max_steps, "1 or more, or -1 for no limit")
        if self.max_epochs is not None:
            _whole("max_epochs", self.max_epochs, FOREVER)
        _whole("min_epochs", self.min_epochs, 0)
        _whole("min_steps", self.min_steps, 0)
        if self.check_val_every_n_epoch is not None:
            _whole("check_val_every_n_epoch", self.check_val_every_n_epoch, 1)
        elif not isinstance(self.val_check_interval, int | timedelta):
            raise ConfigError("val_check_interval", self.val_check_interval, "a whole number of batches, because "
                              "check_val_every_n_epoch is None")  # fmt: skip

    def of(self, stage: str, num_batches: float) -> float:
        """How many of ``num_batches`` (infinite: unknown) a loader of ``stage`` gives.

        Raises:
            ConfigError: a share that comes to no batch at all, or of a loader whose length is not known.
        """
        name = f"limit_{LIMIT_OF[stage]}_batches"
        limit = getattr(self, name)
        if self.overfit_batches and stage in ("fit", "validate"):
            name, limit = "overfit_batches", self.overfit_batches
        if not isinstance(limit, float):
            return min(num_batches, float(limit))
        if limit in (0.0, 1.0):
            return num_batches * limit if limit else 0.0
        if math.isinf(num_batches):
            raise ConfigError(name, limit, "a whole number: the loader does not tell its length")
        share = int(num_batches * limit)
        if share == 0 and num_batches:
            raise ConfigError(name, limit, f"at least one batch, {1 / num_batches:.3g} of {num_batches:g}")
        return float(share)

    def validation_interval(self, num_batches: float) -> float:
        """In micro-batches; infinite: at the end of an epoch, wherever that is, or by time.

        Raises:
            ConfigError: an interval longer than the epoch, or a share of an endless one.
        """
        interval: Any = self.val_check_interval
        if isinstance(interval, timedelta):
            return math.inf
        if isinstance(interval, float):
            if interval == 1.0:
                return num_batches
            if math.isinf(num_batches):
                raise ConfigError("val_check_interval", interval, "a whole number: the loader does not tell its length")
            return max(int(num_batches * interval), 1)
        if interval > num_batches and self.check_val_every_n_epoch is not None:
            raise ConfigError("val_check_interval", interval, f"at most {num_batches:g}, the batches of an epoch")
        return float(interval)

    @property
    def validation_interval_s(self) -> float | None:
        """Seconds of training between validations, where they come by time."""
        interval = self.val_check_interval
        return interval.total_seconds() if isinstance(interval, timedelta) else None

    def reached_epochs(self, epoch: int) -> bool:
        return self.max_epochs is not None and self.max_epochs != FOREVER and epoch >= self.max_epochs

    def may_stop(self, epoch: int, global_step: int) -> bool:
        """Whether enough was done for a wish to stop to be heard."""
        return epoch >= self.min_epochs and global_step >= self.min_steps

    def validates_in(self, epoch: int) -> bool:
        return self.check_val_every_n_epoch is None or (epoch + 1) % self.check_val_every_n_epoch == 0


def _whole(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(name, value, f"a whole number, {low} or more")
