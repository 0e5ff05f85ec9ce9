"""Training: epochs of batches, one or more of them to an optimizer step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from common_platform.errors import ConfigError
from trainkit.data import Resumable
from trainkit.limits import FOREVER
from trainkit.loop.evaluate import VALIDATION, evaluate
from trainkit.loop.feed import Feed
from trainkit.loop.iterator import NAME as ITERATOR
from trainkit.loop.iterator import Numbered, StepIterator
from trainkit.loop.optimization import AutomaticOptimization, ManualOptimization

if TYPE_CHECKING:
    from trainkit.hooks import Method
    from trainkit.trainer import Trainer

QUIET, BATCH, VALIDATED, EPOCH = "quiet", "batch", "validated", "epoch"


@dataclass(slots=True)
class Progress:
    """Where a run stands. Saved and resumed."""

    epoch: int = 0
    batch: int = 0  # micro-batches done in this epoch
    global_step: int = 0  # optimizer steps
    total_batches: int = 0
    steps_logged: int = 0  # batches that ended a group: what loggers count by
    log_step: int = 0  # the number that rows have now
    phase: str = QUIET  # what was done last: nothing, a batch, a validation, an epoch

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def resumed(cls, state: dict[str, Any]) -> Progress:
        """Where the run goes on: a checkpoint of an epoch's end is the next one's beginning."""
        progress = cls(**state)
        if progress.phase == EPOCH:
            progress.next_epoch()
        return progress

    def next_epoch(self) -> None:
        self.epoch += 1
        self.batch = 0
        self.phase = QUIET


class FitLoop:
    """The loop of one ``Trainer.fit``.

    What does not change in a run is looked up when it begins, so that a step asks for nothing that nobody wanted.

    Args:
        train: the training batches.
        validation: loaders, each any iterable of batches; none: no validation.
    """

    def __init__(self, trainer: Trainer, train: Resumable, validation: list[Any]) -> None:
        self.trainer = trainer
        self.validation = validation
        self._measure(train)
        automatic = trainer.module.automatic_optimization
        self.optimization = AutomaticOptimization(trainer) if automatic else ManualOptimization(trainer)
        self.feed = self._make_feed(train)
        self._reload_every = trainer.reload_dataloaders_every_n_epochs
        self._loaded_in = trainer.progress.epoch // max(self._reload_every, 1) * self._reload_every  # which epoch
        self._validation_loaded_in = self._first_load_of_validation()
        self._validated_at = time.monotonic()
        self._group_left = 0  # micro-batches until the optimizer steps
        self._max_steps = math.inf if trainer.limits.max_steps == FOREVER else trainer.limits.max_steps
        self._ended_early = False
        self._on_batch_start: Method | None = None
        self._on_batch_end: Method | None = None
        self._keep_after_batch: Method | None = None

    def _make_feed(self, train: Resumable) -> Feed:
        return Feed(self.trainer, train, self._num_fed(train))

    def _num_fed(self, train: Resumable) -> float:
        """Batches of an epoch that are read."""
        return self.num_batches

    def _measure(self, train: Resumable) -> None:
        limits = self.trainer.limits
        self.num_batches = limits.of("fit", train.num_batches)
        self.validate_every = limits.validation_interval(self.num_batches) if self.validation else math.inf

    @property
    def progress(self) -> Progress:
        return self.trainer.progress

    @property
    def is_between_groups(self) -> bool:
        """Whether the optimizer has made its step with all micro-batches so far."""
        return self._group_left == 0

    def run(self) -> None:
        trainer = self.trainer
        if self._is_done() or self.num_batches == 0:
            return
        trainer.call("on_train_start")
        trainer.call_last("on_train_start")
        self._validated_at = time.monotonic()
        try:
            while not self._is_done():
                self._epoch()
                self.progress.next_epoch()
        finally:
            self.feed.close()
        trainer.call("on_train_end")
        trainer.call_last("on_train_end")

    def _is_done(self) -> bool:
        return self.trainer.limits.reached_epochs(self.progress.epoch) or self._is_to_stop()

    def _is_to_stop(self) -> bool:
        trainer = self.trainer
        step = trainer.progress.global_step
        return step >= self._max_steps or (
            trainer.should_stop and trainer.limits.may_stop(trainer.progress.epoch, step)
        )

    # --- an epoch ---

    def _epoch(self) -> None:
        trainer, progress = self.trainer, self.progress
        if self._reload_every and progress.epoch - self._loaded_in >= self._reload_every:
            self._reload()
        self.feed.begin_epoch()
        if progress.batch == 0:
            trainer.results.in_batch = False
            trainer.call("on_train_epoch_start")
            trainer.call_last("on_train_epoch_start")
        else:
            self._after_batch()  # the checkpoint may stand between a batch and its validation
        self._look_up()
        self._ended_early = False
        while progress.batch < self.num_batches and not self._is_to_stop():
            if not self._batch():
                break
            self._after_batch()
            if trainer.interruption is not None:
                trainer.interruption.between_batches()  # the state is whole here
        self._end_epoch()

    def _reload(self) -> None:
        """Ask for the training batches anew."""
        self._loaded_in = self.progress.epoch
        self.trainer.data.forget("fit")
        train = self.trainer.train_batches()
        self._measure(train)
        self.feed.replace(train, self._num_fed(train))

    def _first_load_of_validation(self) -> float | None:
        """The epoch that the sanity check's loaders count for; None: those of the first validation are new."""
        trainer = self.trainer
        if not trainer.num_sanity_val_steps or trainer.progress.batch:
            return None
        return trainer.progress.epoch if trainer.limits.validates_in(trainer.progress.epoch) else -math.inf

    def _reload_validation(self) -> None:
        epoch, before = self.progress.epoch, self._validation_loaded_in
        if before is not None and epoch - before < self._reload_every:
            return
        self._validation_loaded_in = epoch
        if before is not None:
            self.trainer.data.forget("validate")
            self.validation = self.trainer.validation_loaders()

    def _look_up(self) -> None:
        """What each step of the epoch calls; a hook that nobody wrote is None."""
        trainer = self.trainer
        self._on_batch_start = trainer.hook("on_train_batch_start")
        self._on_batch_end = trainer.hook("on_train_batch_end")
        self._keep_after_batch = trainer.hook_last("on_train_batch_end")
        self.optimization.look_up()

    def _batch(self) -> bool:
        """One micro-batch; False where the epoch ends before it."""
        found = self.feed.next()
        if found is None:  # the loader gave less than its length
            self._finish_group()
            return False
        batch, is_last = found
        index = self.trainer.progress.batch
        if not self._begin_batch(batch, index):
            return False
        is_first, steps, expected = self._place_in_group(index, is_last)
        outputs = self.optimization.run(batch, index, is_first, steps, expected)
        self._end_batch(outputs, batch, index, steps, is_last)
        return True

    def _begin_batch(self, batch: Any, index: int) -> bool:
        """False where a hook ends the epoch."""
        trainer = self.trainer
        trainer.results.batch, trainer.results.in_batch = batch, True
        trainer.progress.log_step = trainer.progress.steps_logged
        if self._on_batch_start is not None and self._on_batch_start(batch, index) == -1:
            trainer.stepping.step_schedulers("epoch", trainer.progress.epoch + 1)
            self._ended_early = True
            return False
        return True

    def _place_in_group(self, index: int, is_last: bool) -> tuple[bool, bool, int]:
        """Whether a micro-batch is the first of its group and whether the last, and how many come from it on."""
        is_first = self._group_left == 0
        if is_first:
            self._group_left = self._length_of_group(index)
        expected = self._group_left
        self._group_left = 0 if is_last else expected - 1
        return is_first, self._group_left == 0, expected

    def _end_batch(self, outputs: Any, batch: Any, index: int, steps: bool, is_last: bool) -> None:
        trainer = self.trainer
        progress, results = trainer.progress, trainer.results
        progress.batch += 1
        progress.total_batches += 1
        progress.steps_logged += steps
        progress.phase = BATCH
        if trainer.schedulers:
            self._step_schedulers(steps, is_last)
        if self._on_batch_end is not None:
            self._on_batch_end(outputs, batch, index)
        if steps and trainer.logs_this_step:
            self.optimization.look()
            trainer.log_metrics(results.take_step())
        results.in_batch, results.batch = False, None
        if self._keep_after_batch is not None:
            self._keep_after_batch(outputs, batch, index)

    def _length_of_group(self, index: int) -> int:
        length = self.trainer.accumulate_grad_batches
        return length if length == 1 else int(min(length, self.num_batches - index))

    def _step_schedulers(self, steps: bool, is_last: bool) -> None:
        if steps:
            self.trainer.stepping.step_schedulers("step", self.progress.batch)
        if is_last:
            self.trainer.stepping.step_schedulers("epoch", self.progress.epoch + 1)

    def _finish_group(self) -> None:
        if self._group_left and isinstance(self.optimization, AutomaticOptimization):
            self._group_left = 0
            self.trainer.managed_optimizers[0].step()
            self.progress.steps_logged += 1

    # --- validation and the end of an epoch ---

    def _after_batch(self) -> None:
        trainer, progress = self.trainer, self.trainer.progress
        if progress.phase == QUIET:
            return
        if self.validation and progress.phase == BATCH and self._validation_is_due():
            self.validate()
        if trainer.schedulers and self._group_left == 0:
            trainer.stepping.step_schedulers("step", progress.batch, plateau=True)
        progress.phase = QUIET

    def _validation_is_due(self) -> bool:
        trainer, progress = self.trainer, self.progress
        if not trainer.limits.validates_in(progress.epoch):
            return False
        if trainer.should_stop and trainer.limits.may_stop(progress.epoch, progress.global_step):
            return True
        interval = trainer.limits.validation_interval_s
        if interval is not None:
            return bool(trainer.strategy.broadcast_plain(time.monotonic() - self._validated_at >= interval))
        if math.isinf(self.validate_every):
            return math.isinf(self.num_batches) and not self.feed.has_read_ahead
        counted = progress.total_batches if trainer.limits.check_val_every_n_epoch is None else progress.batch
        return counted % self.validate_every == 0

    def validate(self) -> None:
        trainer = self.trainer
        if self._group_left == 0:
            trainer.module.on_validation_model_zero_grad()
        self.progress.phase = VALIDATED
        with trainer.stage("validate"):
            if self._reload_every:
                self._reload_validation()
            evaluate(trainer, VALIDATION, self.validation)
        self._validated_at = time.monotonic()

    def _end_epoch(self) -> None:
        trainer, progress = self.trainer, self.progress
        results = trainer.results
        results.in_batch, results.batch = False, None
        self.optimization.look()
        results.publish_means()
        trainer.call("on_train_epoch_end")
        if self._is_whole_epoch():
            trainer.stepping.step_schedulers("epoch", progress.epoch + 1, plateau=True)
        trainer.log_metrics(results.take_means())
        progress.phase = EPOCH
        trainer.agree_to_stop()
        trainer.call_last("on_train_epoch_end")

    def _is_whole_epoch(self) -> bool:
        return math.isinf(self.num_batches) or (not self._ended_early and self.progress.batch >= self.num_batches)

    # --- resuming ---

    def state_dict(self) -> dict[str, Any]:
        """What of a group of micro-batches is not yet in the weights."""
        if self._group_left == 0 or not isinstance(self.optimization, AutomaticOptimization):
            return {}
        gradients = {n: p.grad for n, p in self.trainer.module.named_parameters() if p.grad is not None}
        return {"left": self._group_left, "group": self.optimization.group.state_dict(), "gradients": gradients}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state or not isinstance(self.optimization, AutomaticOptimization):
            return
        self._group_left = state["left"]
        self.optimization.group.load_state_dict(state["group"])
        for name, parameter in self.trainer.module.named_parameters():
            if name in state["gradients"]:
                parameter.grad = state["gradients"][name].to(parameter.device)


class IteratorFitLoop(FitLoop):
    """The loop of a ``training_step(self, dataloader_iter)``, which reads as many batches a step as it likes.

    What is counted are its steps. The epoch ends when the loader does, also in the middle of a step: what that step has
    read is not trained on.
    """

    iterator = StepIterator(())  # of the epoch under way

    def _make_feed(self, train: Resumable) -> Feed:
        if self.trainer.prefetch_to_device:
            raise ConfigError("prefetch_to_device", True, f"None beside a training_step that takes {ITERATOR}")
        return Feed(self.trainer, train, self._num_fed(train), as_read=True)

    def _num_fed(self, train: Resumable) -> float:
        return train.num_batches

    def _look_up(self) -> None:
        super()._look_up()
        self.iterator = StepIterator(self._from_feed(), taken=self.feed.taken, length=self.feed.train.num_batches)

    def _from_feed(self) -> Iterator[Numbered]:
        while (found := self.feed.next()) is not None:
            yield found[0], self.feed.taken - 1, 0, found[1]

    def _batch(self) -> bool:
        iterator, progress = self.iterator, self.trainer.progress
        if iterator.done:
            self._finish_group()
            return False
        if not self._begin_batch(iterator.batch, iterator.batch_idx):
            return False
        is_last = progress.batch + 1 == self.num_batches
        left = self._group_left
        is_first, steps, expected = self._place_in_group(progress.batch, is_last)
        self.trainer.results.needs_weight = True
        try:
            outputs = self.optimization.run(iterator, progress.batch, is_first, steps, expected)
        except StopIteration:
            self._group_left = left  # this step has added nothing
            self._end_with_loader()
            return False
        finally:
            self.trainer.results.needs_weight = False
        self._end_batch(outputs, iterator.batch, iterator.batch_idx, steps, is_last or iterator.done)
        return True

    def _end_with_loader(self) -> None:
        """The loader has ended in the middle of a step: what else is done after the last one."""
        self._finish_group()
        self.trainer.stepping.step_schedulers("epoch", self.progress.epoch + 1)
        self.progress.phase = BATCH
        self._after_batch()

    def _validation_is_due(self) -> bool:
        ends = self.iterator.done and self.trainer.limits.validates_in(self.progress.epoch)
        return ends or super()._validation_is_due()

    def _is_whole_epoch(self) -> bool:
        return super()._is_whole_epoch() or (not self._ended_early and self.iterator.done)
