"""Training: epochs of batches, one or more of them to an optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from common_platform.errors import CheckpointError, CollectiveMismatch, PlatformError
from trainkit.data import Resumable, rng_state, set_rng_state
from trainkit.data.prefetch import DevicePrefetch, is_worth_it
from trainkit.data.seed import raw_rng_state
from trainkit.data.sharded import warn_of_equal_batches
from trainkit.hooks import user_error
from trainkit.loop.evaluate import VALIDATION, evaluate
from trainkit.loop.optimization import AutomaticOptimization, ManualOptimization

if TYPE_CHECKING:
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

    Args:
        train: the training batches.
        validation: loaders, each any iterable of batches; none: no validation.
    """

    def __init__(self, trainer: Trainer, train: Resumable, validation: list[Any]) -> None:
        self.trainer = trainer
        self.train = train
        self.validation = validation
        self.num_batches = trainer.limits.of("fit", train.num_batches)
        self.validate_every = trainer.limits.validation_interval(self.num_batches) if validation else math.inf
        automatic = trainer.module.automatic_optimization
        self.optimization = AutomaticOptimization(trainer) if automatic else ManualOptimization(trainer)
        self._group_left = 0  # micro-batches until the optimizer steps
        self._prefetch = self._make_prefetch()
        self._reads_ahead = self._prefetch is not None or math.isinf(train.num_batches)
        self._ahead: list[Any] = []  # a batch read ahead, to know which one is the last or to move it early
        self._raw_before_ahead: Any = None  # generators when it was read
        self._loader_before_ahead: dict[str, Any] = {}
        self._before_ahead: dict[str, Any] | None = None
        self._ended_early = False
        self._ranks_may_differ = trainer.world_size > 1 and math.isinf(train.num_batches)
        if trainer.world_size > 1:
            self._check_lengths()

    def _make_prefetch(self) -> DevicePrefetch | None:
        trainer = self.trainer
        wanted = trainer.prefetch_to_device
        if wanted is None:
            loader = trainer.loaders("fit")[0]
            wanted = is_worth_it(loader, trainer.strategy.device) and not trainer.data.has_transfer_hooks
        return DevicePrefetch(trainer.strategy.device, lambda batch: trainer.move(batch, 0)) if wanted else None

    def _check_lengths(self) -> None:
        """Raises:
        CollectiveMismatch: the ranks' loaders have different lengths, so that some would wait for ever.
        """
        lengths = self.trainer.strategy.gather_plain(str(self.num_batches))
        if len(set(lengths)) > 1:
            by_rank = ", ".join(f"rank {rank}: {length}" for rank, length in enumerate(lengths))
            raise CollectiveMismatch(
                "training loader", by_rank, "as many batches on every rank", flag="limit_train_batches"
            )

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
        while not self._is_done():
            self._epoch()
            self.progress.next_epoch()
        trainer.call("on_train_end")
        trainer.call_last("on_train_end")

    def _is_done(self) -> bool:
        return self.trainer.limits.reached_epochs(self.progress.epoch) or self._is_to_stop(self.progress.epoch)

    def _is_to_stop(self, epochs: int) -> bool:
        trainer, step = self.trainer, self.progress.global_step
        return trainer.limits.reached_steps(step) or (trainer.should_stop and trainer.limits.may_stop(epochs, step))

    # --- an epoch ---

    def _epoch(self) -> None:
        trainer, progress = self.trainer, self.progress
        batches = self._batches()
        if progress.batch == 0:
            trainer.results.in_batch = False
            trainer.call("on_train_epoch_start")
            trainer.call_last("on_train_epoch_start")
        else:
            self._after_batch()  # the checkpoint may stand between a batch and its validation
        self._ended_early = False
        while progress.batch < self.num_batches and not self._is_to_stop(progress.epoch):
            if not self._batch(batches):
                break
            self._after_batch()
            trainer.between_batches()
        self._end_epoch()

    def _batches(self) -> Iterator[Any]:
        """The rest of the epoch; generators are put back after the loader has drawn from them."""
        batches = self.train.batches(self.progress.epoch, self.progress.batch)
        self._ahead.clear()
        if self.progress.batch and self._reads_ahead:
            if self._before_ahead is not None:
                set_rng_state(self._before_ahead)
            self._read_ahead(batches)  # which was read before the state was saved
        state = self.trainer.take_rng_state()
        if state is not None:
            set_rng_state(state)
        return batches

    def _next(self, batches: Iterator[Any]) -> tuple[Any, bool]:
        """The next batch and whether it is the epoch's last.

        Raises:
            StopIteration: there is none.
            UserCodeError: the loader raised.
        """
        try:
            batch = self._ahead.pop() if self._ahead else self._send(next(batches))
            if self.progress.batch + 1 == self.num_batches:
                return batch, True
            if self._reads_ahead:
                self._raw_before_ahead = raw_rng_state()
                self._loader_before_ahead = self.train.state_dict()
                self._read_ahead(batches)
                return batch, not self._ahead
        except (StopIteration, PlatformError):
            raise
        except Exception as error:
            at = f"batch {self.progress.batch}, rank {self.trainer.global_rank}"
            raise user_error("the training loader", at, error) from error
        return batch, False

    def _read_ahead(self, batches: Iterator[Any]) -> None:
        self._ahead.extend(self._send(batch) for batch in [next(batches, batches)] if batch is not batches)

    def _send(self, batch: Any) -> Any:
        return batch if self._prefetch is None else self._prefetch.send(batch)

    def _next_on_all(self, batches: Iterator[Any]) -> tuple[Any, bool] | None:
        """The next batch, or None where there is none.

        Raises:
            CollectiveMismatch: other ranks still have some, or none any more.
        """
        try:
            found = self._next(batches)
        except StopIteration:
            found = None
        if self._ranks_may_differ:
            here = self.progress.batch + (found is not None) + len(self._ahead)
            counts = self.trainer.strategy.gather_plain(here)
            if len(set(counts)) > 1:
                by_rank = ", ".join(f"rank {rank}: {count}" for rank, count in enumerate(counts))
                raise CollectiveMismatch(
                    "training loader", by_rank, "as many batches on every rank", flag="limit_train_batches"
                )
        return found

    def _batch(self, batches: Iterator[Any]) -> bool:
        """One micro-batch; False where the epoch ends before it."""
        trainer, progress = self.trainer, self.progress
        found = self._next_on_all(batches)
        if found is None:  # the loader gave less than its length
            self._finish_group()
            return False
        batch, is_last = found
        index = progress.batch
        if not progress.total_batches:
            warn_of_equal_batches(trainer.loaders("fit")[0], batch, trainer.strategy)
        batch = trainer.move(batch, 0) if self._prefetch is None else self._prefetch.receive(batch)
        trainer.results.batch, trainer.results.in_batch = batch, True
        progress.log_step = progress.steps_logged
        if trainer.call("on_train_batch_start", batch, index) == -1:
            trainer.step_schedulers("epoch", progress.epoch + 1)
            self._ended_early = True
            return False
        outputs, steps = self._optimize(batch, index, is_last)
        progress.batch += 1
        progress.total_batches += 1
        progress.steps_logged += steps
        progress.phase = BATCH
        if steps:
            trainer.step_schedulers("step", progress.batch)
        if is_last:
            trainer.step_schedulers("epoch", progress.epoch + 1)
        trainer.call("on_train_batch_end", outputs, batch, index)
        if steps and trainer.logs_this_step:
            self.optimization.look()
            trainer.log_metrics(trainer.results.take_step())
        trainer.results.in_batch, trainer.results.batch = False, None
        trainer.call_last("on_train_batch_end", outputs, batch, index)
        return True

    def _finish_group(self) -> None:
        if self._group_left and isinstance(self.optimization, AutomaticOptimization):
            self._group_left = 0
            self.trainer.managed_optimizers[0].step()
            self.progress.steps_logged += 1

    def _optimize(self, batch: Any, index: int, is_last: bool) -> tuple[dict[str, Any], bool]:
        is_first = self._group_left == 0
        if is_first:
            self._group_left = int(min(self.trainer.accumulate_grad_batches, self.num_batches - index))
        expected = self._group_left
        self._group_left = 0 if is_last else self._group_left - 1
        steps = self._group_left == 0
        outputs = self.optimization.run(batch, index, is_first=is_first, is_last=steps, expected=expected)
        return outputs, steps

    # --- validation and the end of an epoch ---

    def _after_batch(self) -> None:
        trainer, progress = self.trainer, self.progress
        if progress.phase == QUIET:
            return
        if progress.phase == BATCH and self._validation_is_due():
            self.validate()
        if self._group_left == 0:
            trainer.step_schedulers("step", progress.batch, plateau=True)
        progress.phase = QUIET

    def _validation_is_due(self) -> bool:
        trainer, progress = self.trainer, self.progress
        if not self.validation or not trainer.limits.validates_in(progress.epoch):
            return False
        if trainer.should_stop and trainer.limits.may_stop(progress.epoch, progress.global_step):
            return True
        if math.isinf(self.validate_every):
            return math.isinf(self.num_batches) and not self._ahead
        counted = progress.total_batches if trainer.limits.check_val_every_n_epoch is None else progress.batch
        return counted % self.validate_every == 0

    def validate(self) -> None:
        trainer = self.trainer
        if self._group_left == 0:
            trainer.module.on_validation_model_zero_grad()
        self.progress.phase = VALIDATED
        with trainer.stage("validate"):
            evaluate(trainer, VALIDATION, self.validation)

    def _end_epoch(self) -> None:
        trainer, progress = self.trainer, self.progress
        results = trainer.results
        results.in_batch, results.batch = False, None
        self.optimization.look()
        results.publish_means()
        trainer.call("on_train_epoch_end")
        if (not self._ended_early and progress.batch >= self.num_batches) or math.isinf(self.num_batches):
            trainer.step_schedulers("epoch", progress.epoch + 1, plateau=True)
        trainer.log_metrics(results.take_means())
        progress.phase = EPOCH
        trainer.agree_to_stop()
        trainer.call_last("on_train_epoch_end")

    # --- resuming ---

    def loader_state(self) -> dict[str, Any]:
        """Where this rank's loader stands; with a batch read ahead, where it stood before."""
        loader = self._loader_before_ahead if self._ahead else self.train.state_dict()
        return {"loader": loader, "ahead": self._generators_before_ahead(), "num_batches": self.train.num_batches}

    def _generators_before_ahead(self) -> dict[str, Any] | None:
        return rng_state(self._raw_before_ahead) if self._raw_before_ahead is not None else None

    def load_loader_state(self, state: dict[str, Any]) -> None:
        """Raises:
        CheckpointError: in mid-epoch, the loader has another length than that of the run that is gone on with.
        """
        if state:
            before, now = state["num_batches"], self.train.num_batches
            if self.progress.batch and before != now:
                raise CheckpointError("train_dataloaders", f"{now:g} batches", f"{before:g}, as many as when it "
                                      f"was saved, after batch {self.progress.batch} of an epoch")  # fmt: skip
            self.train.load_state_dict(state["loader"])
            self._before_ahead = state["ahead"]

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
