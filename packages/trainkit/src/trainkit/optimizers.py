"""What ``configure_optimizers`` may return, in one form, and the optimizers as users see them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from common_platform.errors import ConfigError

WANTED = "an optimizer, several, ([optimizers], [schedulers]) or {'optimizer': ..., 'lr_scheduler': ...}"
SETUP_KEYS = ("scheduler", "interval", "frequency", "monitor", "strict", "name", "reduce_on_plateau")


@dataclass(slots=True)
class SchedulerSetup:
    """A scheduler and when it steps."""

    scheduler: Any
    interval: str = "epoch"  # step | epoch
    frequency: int = 1
    monitor: str | None = None  # the metric of a ReduceLROnPlateau
    strict: bool = True  # whether a missing metric is an error
    name: str | None = None  # for the learning-rate monitor
    reduce_on_plateau: bool = False  # whether it is given the metric


class ManagedOptimizer:
    """An optimizer whose ``step`` goes through hooks, precision and strategy. Everything else is the optimizer's own.

    Args:
        optimizer: torch's.
        make_step: called with the optimizer, the closure and further arguments of ``step``.
        module: whose parameters ``toggle_model`` toggles.
    """

    def __init__(self, optimizer: Optimizer, make_step: Callable[..., Any], module: Any) -> None:
        self.optimizer = optimizer
        self._make_step, self._module = make_step, module

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        return self._make_step(self.optimizer, closure, **kwargs)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Only this optimizer's parameters need gradients in the block.

        Args:
            sync_grad: average gradients over ranks in it; False while they are accumulated.
        """
        with self._module.trainer.strategy.gradient_sync(sync_grad), self._module.toggled_optimizer(self):
            yield

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    @property
    def __class__(self) -> Any:  # so that isinstance tells the kind of optimizer
        return type(self.optimizer)

    @__class__.setter
    def __class__(self, kind: type) -> None:
        raise AttributeError("an optimizer cannot change its class")


def clear_gradients(optimizer: Optimizer) -> None:
    """What ``optimizer.zero_grad()`` does; without torch's bookkeeping around it where it is torch's own method."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad or "zero_grad" in vars(optimizer):
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def understand(configured: Any) -> tuple[list[Optimizer], list[SchedulerSetup]]:
    """The optimizers and their schedulers.

    Raises:
        ConfigError: it is none of the forms, or a learning rate is not a finite number.
    """
    optimizers, schedulers = _take_apart(configured)
    for optimizer in optimizers:
        _check(optimizer)
    return optimizers, [_scheduler(one) for one in schedulers]


def in_our_words(error: ValueError) -> ValueError:
    """What torch's optimizers complain of, as a ConfigError."""
    if "empty parameter list" in str(error):
        return ConfigError("optimizer", "0 parameters", "some to train: model.parameters()")
    if str(error).startswith("Invalid learning rate"):
        return ConfigError("lr", str(error).rpartition(" ")[2], "a finite number, 0 or more")
    return error


def _take_apart(configured: Any) -> tuple[list[Optimizer], list[Any]]:
    if isinstance(configured, Optimizer):
        return [configured], []
    if isinstance(configured, Mapping) and isinstance(configured.get("optimizer"), Optimizer):
        given = configured.get("lr_scheduler")
        return [configured["optimizer"]], given if isinstance(given, list) else [] if given is None else [given]
    if isinstance(configured, list | tuple) and configured:
        if len(configured) == 2 and isinstance(configured[0], list | tuple):
            schedulers = configured[1] if isinstance(configured[1], list | tuple) else [configured[1]]
            parts = [_take_apart(one) for one in configured[0]]
            return [o for found, _ in parts for o in found], list(schedulers)
        parts = [_take_apart(one) for one in configured]
        return [o for found, _ in parts for o in found], [s for _, found in parts for s in found]
    raise ConfigError("configure_optimizers", type(configured).__name__, WANTED)


def _check(optimizer: Optimizer) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not parameters:
        raise ConfigError("optimizer", "0 parameters", "some to train: model.parameters()")
    for group in optimizer.param_groups:
        rate = float(group.get("lr", 0.0))
        if not math.isfinite(rate) or rate < 0:
            raise ConfigError("lr", rate, "a finite number, 0 or more")


def _scheduler(given: Any) -> SchedulerSetup:
    if not isinstance(given, Mapping):
        given = {"scheduler": given}
    if "scheduler" not in given or set(given) - set(SETUP_KEYS):
        raise ConfigError("lr_scheduler", sorted(given), f"'scheduler' and some of {SETUP_KEYS}")
    setup = SchedulerSetup(**given)
    setup.reduce_on_plateau = setup.reduce_on_plateau or isinstance(setup.scheduler, ReduceLROnPlateau)
    if setup.interval not in ("step", "epoch"):
        raise ConfigError("lr_scheduler.interval", setup.interval, "'step' or 'epoch'")
    if setup.frequency < 1:
        raise ConfigError("lr_scheduler.frequency", setup.frequency, "1 or more")
    if setup.reduce_on_plateau and setup.monitor is None:
        raise ConfigError("lr_scheduler.monitor", None, "the metric that ReduceLROnPlateau watches")
    return setup
