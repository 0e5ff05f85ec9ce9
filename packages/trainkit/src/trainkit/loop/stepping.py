"""The steps of optimizers and schedulers, with what precision, strategy and hooks have to do with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from common_platform.errors import ConfigError
from trainkit.loop.optimization import parameters_of
from trainkit.optimizers import SchedulerSetup

if TYPE_CHECKING:
    from trainkit.trainer import Trainer


class Stepping:
    """The steps of one Trainer."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._overflows = 0  # steps in a row that were skipped

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients of ``loss`` in manual optimization, with the hooks around it."""
        self._trainer.profiled(self._backward, "backward")(loss, *args, **kwargs)

    def _backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        if trainer.fit_loop is not None:
            trainer.fit_loop.optimization.watch(loss.detach())
        loss = trainer.precision_plugin.scaled(loss)
        trainer.call("on_before_backward", loss)
        trainer.module.backward(loss, *args, **kwargs)
        trainer.strategy.after_manual_backward()
        trainer.call("on_after_backward")

    def make_step(self, optimizer: Optimizer, closure: Any, **kwargs: Any) -> None:
        """One step of ``optimizer``, as precision makes it; ``closure`` computes gradients that are not there yet.

        Raises:
            NonFiniteLoss: precision has skipped too many steps in a row.
        """
        trainer = self._trainer
        stepped = trainer.precision_plugin.step(optimizer, closure or _nothing, self._before_step, **kwargs)
        trainer.progress.global_step += 1
        self._overflows = 0 if stepped else self._overflows + 1
        if self._overflows >= trainer.max_skipped:
            trainer.precision_plugin.refuse_overflow(self._overflows, trainer.global_step)

    def _before_step(self, optimizer: Optimizer) -> None:
        trainer = self._trainer
        if trainer.fit_loop is not None:
            trainer.fit_loop.optimization.before_step(optimizer)
        else:  # a step before training, in a hook of the user's
            trainer.call("on_before_optimizer_step", optimizer)

    def clip_gradients(self, optimizer: Optimizer, value: float | None, algorithm: str | None) -> None:
        """Clip by ``value``, or by what the Trainer was given; without either, nothing.

        Raises:
            ConfigError: there is no such algorithm.
        """
        trainer = self._trainer
        value = trainer.gradient_clip_val if value is None else value
        algorithm = algorithm or trainer.gradient_clip_algorithm or "norm"
        if algorithm not in ("norm", "value"):
            raise ConfigError("gradient_clip_algorithm", algorithm, "'norm' or 'value'")
        if value:
            by_norm = algorithm == "norm"
            trainer.strategy.clip_gradients(
                parameters_of(optimizer), max_norm=value if by_norm else None, max_value=None if by_norm else value
            )

    def step_schedulers(self, interval: str, count: int, *, plateau: bool = False) -> None:
        """Let the schedulers of ``interval`` ("step" or "epoch") make their step, but not those of manual optimization.

        Args:
            count: batches of the epoch, or epochs, that are done.
            plateau: those that are given a metric, or the others.
        """
        schedulers = self._trainer.schedulers
        if not schedulers or not self._trainer.module.automatic_optimization:
            return
        for setup in schedulers:
            is_due = setup.interval == interval and setup.reduce_on_plateau == plateau and count % setup.frequency == 0
            if is_due and not (self._overflows and interval == "step"):
                self._step_scheduler(setup)

    def _step_scheduler(self, setup: SchedulerSetup) -> None:
        metric = None
        if setup.reduce_on_plateau:
            metrics = self._trainer.callback_metrics
            metric = metrics.get(str(setup.monitor))
            if metric is None and setup.strict:
                raise ConfigError("lr_scheduler.monitor", setup.monitor, f"a logged metric: {sorted(metrics)}")
            if metric is None:
                return
        self._trainer.module.lr_scheduler_step(setup.scheduler, metric)


def _nothing() -> None:
    return None
