"""Training: epochs of optimizer steps, each made of one or more micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common_platform.errors import NonFiniteLoss, TrainingError
from trainkit.data import TrainLoader, set_rng_state
from trainkit.loop.evaluate import validate
from trainkit.loop.move import to_device

if TYPE_CHECKING:
    from trainkit.trainer import Trainer


@dataclass(slots=True)
class Progress:
    """Where a run stands. Saved and resumed."""

    epoch: int = 0
    batch: int = 0  # micro-batches done in this epoch
    global_step: int = 0  # optimizer steps
    total_batches: int = 0
    validated_at: int = -1  # total_batches at the last validation
    epoch_ended: bool = False

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def resumed(cls, state: dict[str, Any]) -> Progress:
        """Where the run goes on: a checkpoint of an epoch's end is the next one's beginning."""
        progress = cls(**state)
        if progress.epoch_ended:
            progress.next_epoch()
        return progress

    def next_epoch(self) -> None:
        self.epoch += 1
        self.batch = 0
        self.epoch_ended = False


@dataclass(slots=True)
class MicroBatch:
    """A training step's loss, and by how much it counts among those it is accumulated with."""

    loss: Tensor
    weight: float
    outputs: Any


class FitLoop:
    """The loop of one ``Trainer.fit``.

    Args:
        train: the training batches.
        validation: any iterable of batches, or None.
    """

    def __init__(self, trainer: Trainer, train: TrainLoader, validation: Any | None) -> None:
        self.trainer = trainer
        self.train = train
        self.validation = validation
        self.num_batches = trainer.limits.of_training(train.num_batches)
        self.validate_every = trainer.limits.validation_interval(self.num_batches)

    def run(self) -> None:
        trainer, progress = self.trainer, self.trainer.progress
        trainer.call("on_train_start")
        while not self._done() and not trainer.limits.reached_epochs(progress.epoch):
            self._epoch()
            progress.next_epoch()
        trainer.call("on_train_end")

    def _done(self) -> bool:
        return self.trainer.should_stop or self.trainer.limits.reached_steps(self.trainer.progress.global_step)

    def _epoch(self) -> None:
        trainer, progress = self.trainer, self.trainer.progress
        trainer.module.train()
        batches = self._batches()
        if progress.batch == 0:
            trainer.call("on_train_epoch_start")
        else:
            self._validate_if_due()  # the checkpoint may stand between a step and its validation
        while not self._done() and progress.batch < self.num_batches:
            group = self._next_group(batches)
            if not group:
                break
            self._optimizer_step(group)
            self._validate_if_due()
        self._end_epoch()

    def _batches(self) -> Iterator[Any]:
        """The rest of the epoch; generators are put back after the loader has drawn from them."""
        batches = self.train.batches(self.trainer.progress.epoch, self.trainer.progress.batch)
        state = self.trainer.take_rng_state()
        if state is not None:
            set_rng_state(state)
        return batches

    def _next_group(self, batches: Iterator[Any]) -> list[Any]:
        left = self.num_batches - self.trainer.progress.batch
        return list(islice(batches, int(min(self.trainer.accumulate_grad_batches, left))))

    # --- one optimizer step ---

    def _optimizer_step(self, group: list[Any]) -> None:
        trainer = self.trainer
        first = trainer.progress.batch
        done: list[tuple[MicroBatch | None, Any]] = []
        scale = 0.0
        for index, batch in enumerate(group):
            batch = to_device(batch, trainer.strategy.device)
            trainer.call("on_train_batch_start", batch, first + index)
            with trainer.strategy.micro_batch(is_last=index == len(group) - 1):
                micro = self._forward(batch, first + index)
                if micro is not None:
                    scale = scale or micro.weight
                    self._backward(micro, micro.weight / scale)
            done.append((micro, batch))
            if index < len(group) - 1:
                self._end_batch(micro, batch)
        self._step([micro.weight / scale for micro, _ in done if micro is not None])
        self._end_batch(*done[-1], logs=trainer.logs_this_step)

    def _forward(self, batch: Any, index: int) -> MicroBatch | None:
        trainer = self.trainer
        with trainer.precision.context(trainer.strategy.device):
            outputs = trainer.module.training_step(batch, index)
        if outputs is None:
            return None
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        weight = outputs.get("weight", 1.0) if isinstance(outputs, dict) else 1.0
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TrainingError(
                "training_step", type(loss).__name__, "a scalar loss tensor, {'loss': ...} or None", code="user_code"
            )
        if not torch.isfinite(loss):
            raise NonFiniteLoss(
                "loss",
                float(loss.detach()),
                f"a finite number (step {trainer.global_step}, batch {index}): lower lr, or clip",
            )
        return MicroBatch(loss, float(weight), outputs) if weight else None

    def _backward(self, micro: MicroBatch, share: float) -> None:
        """Gradients of ``loss * share`` are added up; ``_step`` divides by the sum of the shares."""
        trainer = self.trainer
        trainer.call("on_before_backward", micro.loss)
        trainer.precision.backward(micro.loss if share == 1.0 else micro.loss * share)
        trainer.call("on_after_backward")

    def _step(self, shares: list[float]) -> None:
        trainer, optimizer = self.trainer, self.trainer.optimizer
        if not shares:
            return
        trainer.progress.global_step += 1
        trainer.precision.unscale(optimizer)
        if sum(shares) != 1.0:
            gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            torch._foreach_div_(gradients, sum(shares))
        trainer.clip_gradients()
        trainer.call("on_before_optimizer_step", optimizer)
        stepped = trainer.precision.step(optimizer)
        trainer.call("on_before_zero_grad", optimizer)
        trainer.module.optimizer_zero_grad(optimizer)
        if stepped:
            trainer.step_schedulers("step", trainer.progress.global_step)

    def _end_batch(self, micro: MicroBatch | None, batch: Any, *, logs: bool = False) -> None:
        trainer, progress = self.trainer, self.trainer.progress
        index = progress.batch
        progress.batch += 1
        progress.total_batches += 1
        if micro is not None:
            trainer.last_loss = micro.loss.detach()
        if logs:
            trainer.log_metrics(trainer.results.take_step())
        trainer.call("on_train_batch_end", micro.outputs if micro else None, batch, index)

    # --- validation and the end of an epoch ---

    def _validate_if_due(self) -> None:
        progress = self.trainer.progress
        due = self.validate_every and progress.batch % self.validate_every == 0
        if due and progress.batch < self.num_batches:
            self._validate()

    def _validate(self) -> None:
        progress, limits = self.trainer.progress, self.trainer.limits
        wanted = self.validation is not None and limits.validates_in(progress.epoch)
        if wanted and progress.validated_at != progress.total_batches:
            progress.validated_at = progress.total_batches
            validate(self.trainer, self.validation, limit=limits.validation_batches, fitting=True)

    def _end_epoch(self) -> None:
        trainer, progress = self.trainer, self.trainer.progress
        self._validate()
        trainer.log_metrics(trainer.results.take_means())
        trainer.step_schedulers("epoch", progress.epoch + 1)
        progress.epoch_ended = True
        trainer.call("on_train_epoch_end")
