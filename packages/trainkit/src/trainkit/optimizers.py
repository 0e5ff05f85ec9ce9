"""What ``configure_optimizers`` may return, in one form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from common_platform.errors import TrainingError

WANTED = "an optimizer, ([optimizer], [schedulers]) or {'optimizer': ..., 'lr_scheduler': ...}"


@dataclass(slots=True)
class SchedulerSetup:
    """A scheduler and when it steps."""

    scheduler: Any
    interval: str = "epoch"  # step | epoch
    frequency: int = 1
    monitor: str | None = None  # the metric of a ReduceLROnPlateau

    @property
    def waits_for_metric(self) -> bool:
        return isinstance(self.scheduler, ReduceLROnPlateau)


def understand(configured: Any) -> tuple[Optimizer, list[SchedulerSetup]]:
    """The optimizer and its schedulers.

    Raises:
        TrainingError: it is none of the forms, or has more than one optimizer.
    """
    if isinstance(configured, Optimizer):
        return configured, []
    if isinstance(configured, Mapping) and isinstance(configured.get("optimizer"), Optimizer):
        given = configured.get("lr_scheduler")
        many = given if isinstance(given, list) else [] if given is None else [given]
        return configured["optimizer"], [_scheduler(one) for one in many]
    if isinstance(configured, list | tuple):
        optimizers, schedulers = configured, []
        if len(configured) == 2 and isinstance(configured[0], list | tuple):
            optimizers, schedulers = configured[0], list(configured[1])
        if len(optimizers) == 1 and isinstance(optimizers[0], Optimizer):
            return optimizers[0], [_scheduler(one) for one in schedulers]
        raise TrainingError("configure_optimizers", f"{len(optimizers)} optimizers", "one", code="user_code")
    raise TrainingError("configure_optimizers", type(configured).__name__, WANTED, code="user_code")


def _scheduler(given: Any) -> SchedulerSetup:
    if not isinstance(given, Mapping):
        return SchedulerSetup(given)
    known = {"scheduler", "interval", "frequency", "monitor", "name", "strict"}
    if "scheduler" not in given or set(given) - known:
        raise TrainingError("lr_scheduler", sorted(given), f"'scheduler' and some of {sorted(known)}", code="user_code")
    setup = SchedulerSetup(
        **{key: given[key] for key in ("scheduler", "interval", "frequency", "monitor") if key in given}
    )
    if setup.interval not in ("step", "epoch") or setup.frequency < 1:
        raise TrainingError("lr_scheduler.interval", setup.interval, "'step' or 'epoch'", code="user_code")
    if setup.waits_for_metric and setup.monitor is None:
        raise TrainingError("lr_scheduler.monitor", None, "the metric that ReduceLROnPlateau watches", code="user_code")
    return setup
