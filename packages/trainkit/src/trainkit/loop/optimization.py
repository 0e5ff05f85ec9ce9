"""From a batch to an optimizer step: by the Trainer, or by the user's own ``training_step``."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from common_platform.errors import ConfigError, NonFiniteLoss, PlatformError, TrainingError
from trainkit.hooks import is_written, user_error
from trainkit.loop.group import Group
from trainkit.loop.steps import loss_of, manual_outputs, step_arguments
from trainkit.module import TrainModule
from trainkit.optimizers import clear_gradients
from trainkit.precision import Precision
from trainkit.strategies import Strategy

if TYPE_CHECKING:
    from trainkit.hooks import Method
    from trainkit.trainer import Trainer

OVERRIDES = ("optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "clip_gradients")


class Optimization:
    """What automatic and manual optimization have in common."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._takes = step_arguments(trainer.module.training_step)
        self._waiting: list[tuple[Tensor, str]] = []  # losses on a device, looked at all at once
        self._on_before_step: Method | None = None
        self._precision_context: Callable[[], Any] | None = None
        self._step: Callable[..., Any] = trainer.strategy.training_step

    def look_up(self) -> None:
        """Find what each step of an epoch calls."""
        trainer = self.trainer
        precision, device = trainer.precision_plugin, trainer.strategy.device
        has_context = is_written(precision, Precision, "context")
        self._precision_context = partial(precision.context, device) if has_context else None
        self._on_before_step = trainer.hook("on_before_optimizer_step")
        own = is_written(trainer.strategy, Strategy, "training_step")
        step = trainer.strategy.training_step if own else trainer.module.training_step
        self._step = trainer.profiled(step, "training_step")

    def training_step(self, batch: Any, index: int) -> Any:
        arguments = (batch, index) if self._takes == 2 else (batch, index)[: self._takes]
        try:
            if self._precision_context is None:
                return self._step(*arguments)
            with self._precision_context():
                return self._step(*arguments)
        except (PlatformError, StopIteration):
            raise
        except Exception as error:
            where = f"{type(self.trainer.module).__name__}.training_step"
            raise user_error(where, f"step {self.trainer.global_step}, batch {index}", error) from error

    def before_step(self, optimizer: Optimizer) -> None:
        """Gradients are whole and unscaled, and the optimizer is going to make its step."""
        if self._on_before_step is not None:
            self._on_before_step(optimizer)

    def watch(self, loss: Tensor) -> None:
        """Refuse a loss that is not finite: on the CPU at once, elsewhere when rows are logged or state is saved."""
        if loss.is_cpu and math.isfinite(loss.item()):
            return
        trainer = self.trainer
        where = f"step {trainer.global_step}, batch {trainer.progress.batch}, rank {trainer.global_rank}"
        self._waiting.append((loss, where))
        if loss.is_cpu:
            self.look()

    def look(self) -> None:
        """Look at the losses that wait.

        Raises:
            NonFiniteLoss: one is NaN or infinite; the first is named.
        """
        if not self._waiting:
            return
        values = torch.stack([loss.reshape(()) for loss, _ in self._waiting]).tolist()
        for value, (_, where) in zip(values, self._waiting, strict=True):
            if not math.isfinite(value):
                raise _not_finite(value, where)
        self._waiting.clear()


class AutomaticOptimization(Optimization):
    """Forward, backward and step, with gradients of several micro-batches averaged exactly."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        if len(trainer.optimizers) != 1:
            raise ConfigError("configure_optimizers", f"{len(trainer.optimizers)} optimizers", "one, or several with "
                              "self.automatic_optimization = False")  # fmt: skip
        self.group = Group(1, trainer.strategy)
        self._skipped = 0
        self._batch: Any = None
        self._index = 0
        self._is_first = self._has_run = False
        self._outputs: dict[str, Any] = {}
        self._on_before_zero_grad: Method | None = None
        self._on_before_backward: Method | None = None
        self._on_after_backward: Method | None = None
        self._steps_itself = self._clears_itself = self._clips_itself = False
        self._backward = self._compute_gradients
        self._make_step = trainer.stepping.make_step

    def look_up(self) -> None:
        super().look_up()
        trainer = self.trainer
        self._on_before_zero_grad = trainer.hook("on_before_zero_grad")
        self._on_before_backward = trainer.hook("on_before_backward")
        self._on_after_backward = trainer.hook("on_after_backward")
        self._steps_itself, self._clears_itself, self._clips_itself, clips_in_its_way = (
            is_written(trainer.module, TrainModule, name) for name in OVERRIDES
        )
        self._clips_itself |= clips_in_its_way
        self._backward = trainer.profiled(self._compute_gradients, "backward")
        self._make_step = trainer.profiled(trainer.stepping.make_step, "optimizer_step")

    def run(self, batch: Any, index: int, is_first: bool, is_last: bool, expected: int) -> dict[str, Any]:
        """One micro-batch.

        Args:
            is_first, is_last: of its optimizer step.
            expected: micro-batches of the step.

        Returns:
            What ``on_train_batch_end`` is given: the loss as it went into backward, and what else the step returned.
        """
        trainer = self.trainer
        if is_first:
            self.group.begin(expected)
        self._batch, self._index, self._is_first, self._has_run = batch, index, is_first, False
        if not is_last:
            with trainer.strategy.gradient_sync(False):
                self._forward_and_backward()
        elif self._steps_itself:
            optimizer = trainer.managed_optimizers[0]
            trainer.module.optimizer_step(trainer.current_epoch, index, optimizer, self._forward_and_backward)
        else:
            self._make_step(trainer.optimizer, self._forward_and_backward)
        if not self._has_run:
            raise TrainingError("optimizer_step", "a closure that was not called", "optimizer.step(closure="
                                "optimizer_closure), or optimizer_closure() alone", code="user_code")  # fmt: skip
        outputs, self._batch, self._outputs = self._outputs, None, {}
        return outputs

    def _forward_and_backward(self) -> Tensor | None:
        """What an optimizer calls, LBFGS often: each time after the first is the same step anew."""
        if self._has_run and self._is_first:
            self.group.begin(self.group.expected)
        loss, weight, self._outputs = loss_of(self.training_step(self._batch, self._index))
        self._has_run = True
        if loss is not None:
            self.trainer.last_loss = plain = loss.detach()
            if not (plain.is_cpu and math.isfinite(plain.item())):
                self.watch(plain)
            scaled = self.group.scaled(loss, weight)
            self._outputs = {"loss": plain if scaled is loss else scaled.detach(), **self._outputs}
            loss, self._skipped = scaled, 0
        else:
            self._count_skipped()
        if self._is_first:
            self._zero_grad()
        if loss is not None and weight != 0:
            self._backward(loss)
        return loss

    def _zero_grad(self) -> None:
        trainer = self.trainer
        optimizer = trainer.optimizer
        if self._on_before_zero_grad is not None:
            self._on_before_zero_grad(optimizer)
        if self._clears_itself:
            trainer.module.optimizer_zero_grad(trainer.current_epoch, self._index, optimizer)
        else:
            clear_gradients(optimizer)

    def _compute_gradients(self, loss: Tensor) -> None:
        loss = self.trainer.precision_plugin.scaled(loss)
        if self._on_before_backward is not None:
            self._on_before_backward(loss)
        self.trainer.module.backward(loss)
        if self._on_after_backward is not None:
            self._on_after_backward()

    def before_step(self, optimizer: Optimizer) -> None:
        self.group.finish(optimizer)
        super().before_step(optimizer)
        trainer = self.trainer
        value, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        if value or self._clips_itself:
            trainer.module.configure_gradient_clipping(
                optimizer, gradient_clip_val=value, gradient_clip_algorithm=algorithm
            )

    def _count_skipped(self) -> None:
        trainer = self.trainer
        self._skipped += 1
        if trainer.world_size > 1:
            raise TrainingError("training_step", "None", "a loss on every rank: others wait for its gradients")
        if self._skipped >= trainer.max_skipped:
            raise TrainingError(
                "training_step",
                message=f"training_step returned None for {self._skipped} batches in a row; allowed fewer than "
                f"{trainer.max_skipped}; change with max_skipped",
                code="user_code",
            )


class ManualOptimization(Optimization):
    """The user's ``training_step`` does everything; ``manual_backward`` and the optimizers' ``step`` lead back here."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        wrong = {
            "accumulate_grad_batches": trainer.accumulate_grad_batches != 1,
            "gradient_clip_val": trainer.gradient_clip_val is not None,
        }
        for name, is_set in wrong.items():
            if is_set:
                raise ConfigError(name, getattr(trainer, name), "its default: manual optimization does it itself")

    def run(self, batch: Any, index: int, is_first: bool, is_last: bool, expected: int) -> dict[str, Any]:
        outputs = manual_outputs(self.training_step(batch, index))
        if isinstance(outputs.get("loss"), Tensor) and outputs["loss"].numel() == 1:
            self.trainer.last_loss = outputs["loss"]
        return outputs


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _not_finite(value: float, where: str) -> NonFiniteLoss:
    return NonFiniteLoss("loss", value, f"a finite number ({where}): lower lr, or clip")
