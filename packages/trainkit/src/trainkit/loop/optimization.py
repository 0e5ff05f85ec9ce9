"""From a batch to an optimizer step: by the Trainer, or by the user's own ``training_step``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from common_platform.errors import ConfigError, NonFiniteLoss, PlatformError, TrainingError
from trainkit.hooks import is_written, user_error
from trainkit.loop.group import Group
from trainkit.loop.steps import loss_of, manual_outputs, step_arguments
from trainkit.module import TrainModule

if TYPE_CHECKING:
    from trainkit.trainer import Trainer


class Optimization:
    """What automatic and manual optimization have in common."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._takes = step_arguments(trainer.module.training_step)
        self._waiting: list[tuple[Tensor, str]] = []  # losses on a device, looked at all at once

    def training_step(self, batch: Any, index: int) -> Any:
        trainer = self.trainer
        try:
            with trainer.precision_plugin.context(trainer.strategy.device):
                return trainer.strategy.training_step(*(batch, index)[: self._takes])
        except (PlatformError, StopIteration):
            raise
        except Exception as error:
            where = f"{type(trainer.module).__name__}.training_step"
            raise user_error(where, f"step {trainer.global_step}, batch {index}", error) from error

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
        self._zero_grad_is_usual = not is_written(trainer.module, TrainModule, "optimizer_zero_grad")

    def run(self, batch: Any, index: int, *, is_first: bool, is_last: bool, expected: int) -> dict[str, Any]:
        """One micro-batch.

        Args:
            is_first, is_last: of its optimizer step.
            expected: micro-batches of the step.

        Returns:
            What ``on_train_batch_end`` is given: the loss as it went into backward, and what else the step returned.
        """
        if is_first:
            self.group = Group(expected, self.trainer.strategy)
        closure = _Closure(self, batch, index, is_first)
        if not is_last:
            with self.trainer.strategy.gradient_sync(False):
                closure()
            return closure.outputs
        self.trainer.module.optimizer_step(
            self.trainer.current_epoch, index, self.trainer.managed_optimizers[0], closure
        )
        if not closure.ran:
            raise TrainingError("optimizer_step", "a closure that was not called", "optimizer.step(closure="
                                "optimizer_closure), or optimizer_closure() alone", code="user_code")  # fmt: skip
        return closure.outputs

    def forward_and_backward(self, batch: Any, index: int, *, is_first: bool) -> tuple[Tensor | None, dict[str, Any]]:
        trainer = self.trainer
        loss, weight, extra = loss_of(self.training_step(batch, index))
        if loss is not None:
            trainer.last_loss = plain = loss.detach()
            self.watch(plain)
            scaled = self.group.scaled(loss, weight)
            extra = {"loss": plain if scaled is loss else scaled.detach(), **extra}
            loss = scaled
        self._count_skipped(loss)
        if is_first:
            self._zero_grad(index)
        if loss is not None and weight != 0:
            trainer.backward(loss)
        return loss, extra

    def _zero_grad(self, index: int) -> None:
        trainer, optimizer = self.trainer, self.trainer.optimizer
        trainer.call("on_before_zero_grad", optimizer)
        if self._zero_grad_is_usual:
            optimizer.zero_grad()
        else:
            trainer.module.optimizer_zero_grad(trainer.current_epoch, index, optimizer)

    def _count_skipped(self, loss: Tensor | None) -> None:
        trainer = self.trainer
        self._skipped = 0 if loss is not None else self._skipped + 1
        if loss is None and trainer.world_size > 1:
            raise TrainingError("training_step", "None", "a loss on every rank: others wait for its gradients")
        if self._skipped >= trainer.max_skipped:
            raise TrainingError(
                "training_step",
                message=f"training_step returned None for {self._skipped} batches in a row; allowed fewer than "
                f"{trainer.max_skipped}; change with max_skipped",
                code="user_code",
            )


class _Closure:
    """Forward and backward of the last micro-batch, which the optimizer calls; closures of LBFGS are called often."""

    def __init__(self, owner: AutomaticOptimization, batch: Any, index: int, is_first: bool) -> None:
        self._owner, self._batch, self._index, self._is_first = owner, batch, index, is_first
        self.outputs: dict[str, Any] = {}
        self.ran = False

    def __call__(self) -> Tensor | None:
        if self.ran and self._is_first:  # called again: the same step anew
            self._owner.group = Group(self._owner.group.expected, self._owner.trainer.strategy)
        loss, self.outputs = self._owner.forward_and_backward(self._batch, self._index, is_first=self._is_first)
        self.ran = True
        return loss


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

    def run(self, batch: Any, index: int, **_: Any) -> dict[str, Any]:
        outputs = manual_outputs(self.training_step(batch, index))
        if isinstance(outputs.get("loss"), Tensor) and outputs["loss"].numel() == 1:
            self.trainer.last_loss = outputs["loss"]
        return outputs


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _not_finite(value: float, where: str) -> NonFiniteLoss:
    return NonFiniteLoss("loss", value, f"a finite number ({where}): lower lr, or clip")
