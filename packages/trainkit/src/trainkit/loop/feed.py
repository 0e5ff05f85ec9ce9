"""The training batches of a run, on their device: from any batch of an epoch on, read ahead where that is needed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from common_platform.errors import CheckpointError, CollectiveMismatch, PlatformError
from trainkit.data import Resumable, rng_state, set_rng_state
from trainkit.data.prefetch import DevicePrefetch, is_worth_it
from trainkit.data.seed import raw_rng_state
from trainkit.data.sharded import warn_of_equal_batches
from trainkit.hooks import user_error

if TYPE_CHECKING:
    from trainkit.trainer import Trainer


class Feed:
    """Gives batch after batch of one ``Trainer.fit``.

    Args:
        train: the training batches as the loader makes them.
        num_batches: of an epoch; infinite: as many as there are.
        as_read: whether batches are given as the loader made them, to a step that moves them itself.

    Raises:
        CollectiveMismatch: the ranks' loaders have different lengths, so that some would wait for ever.
    """

    def __init__(self, trainer: Trainer, train: Resumable, num_batches: float, *, as_read: bool = False) -> None:
        self._trainer = trainer
        self._batches: Iterator[Any] = iter(())
        self._ahead: list[Any] = []  # a batch read ahead, to know which one is the last or to move it early
        self._raw_before_ahead: Any = None  # generators when it was read
        self._loader_before_ahead: dict[str, Any] = {}
        self._before_ahead: dict[str, Any] | None = None
        self._as_read = as_read
        self.taken = 0  # batches of this epoch that were given
        self.move = trainer.data.mover() if not as_read else _as_it_is
        self.replace(train, num_batches)

    def replace(self, train: Resumable, num_batches: float) -> None:
        """Give the batches of another loader from the next epoch on; the arguments and errors are the constructor's."""
        trainer = self._trainer
        self.train, self._num_batches = train, num_batches
        self._prefetch = self._make_prefetch()
        self._reads_ahead = self._prefetch is not None or math.isinf(train.num_batches)
        self._ranks_may_differ = trainer.world_size > 1 and math.isinf(train.num_batches)
        if trainer.world_size > 1:
            self._check_same_on_all(str(num_batches))

    def _make_prefetch(self) -> DevicePrefetch | None:
        trainer = self._trainer
        if self._as_read:
            return None
        wanted = trainer.prefetch_to_device
        if wanted is None:
            loader = trainer.loaders("fit")[0]
            wanted = is_worth_it(loader, trainer.strategy.device) and not trainer.data.has_transfer_hooks
        return DevicePrefetch(trainer.strategy.device, lambda batch: trainer.move(batch, 0)) if wanted else None

    @property
    def has_read_ahead(self) -> bool:
        """Whether a batch waits that is not trained on yet."""
        return bool(self._ahead)

    def begin_epoch(self) -> None:
        """Go to where the run stands in its epoch; generators are put back after the loader has drawn from them."""
        progress = self._trainer.progress
        if not self._as_read or not progress.batch:  # a step that reads for itself may have read more than one
            self.taken = progress.batch
        self._batches = self.train.batches(progress.epoch, self.taken)
        self._ahead.clear()
        if self.taken and self._reads_ahead:
            if self._before_ahead is not None:
                set_rng_state(self._before_ahead)
            self._read_ahead()  # which was read before the state was saved
        state = self._trainer.take_rng_state()
        if state is not None:
            set_rng_state(state)

    def close(self) -> None:
        """Let the epoch's iterator go, and with it its worker processes.

        Left to the collector of garbage, which may end its queues first, each worker is waited for in vain, 5 s.
        """
        self._batches = iter(())

    def next(self) -> tuple[Any, bool] | None:
        """The next batch and whether it is the epoch's last; None where there is none.

        Raises:
            UserCodeError: the loader raised.
            CollectiveMismatch: other ranks still have some, or none any more.
        """
        try:
            found = self.read()
        except StopIteration:
            found = None
        if self._ranks_may_differ:
            self._check_same_on_all(self.taken + (found is not None) + len(self._ahead))
        if found is None:
            return None
        batch, is_last = found
        self.taken += 1
        if not self._trainer.progress.total_batches:
            warn_of_equal_batches(self._trainer.loaders("fit")[0], batch, self._trainer.strategy)
        return self.move(batch, 0) if self._prefetch is None else self._prefetch.receive(batch), is_last

    def read(self) -> tuple[Any, bool]:
        """The next batch as it was read, and whether it is the epoch's last.

        Raises:
            StopIteration: there is none.
            UserCodeError: the loader raised.
        """
        try:
            if not self._reads_ahead:
                return next(self._batches), self.taken + 1 == self._num_batches
            batch = self._ahead.pop() if self._ahead else self._send(next(self._batches))
            if self.taken + 1 == self._num_batches:
                return batch, True
            self._raw_before_ahead = raw_rng_state()
            self._loader_before_ahead = self.train.state_dict()
            self._read_ahead()
            return batch, not self._ahead
        except (StopIteration, PlatformError):
            raise
        except Exception as error:
            at = f"batch {self.taken}, rank {self._trainer.global_rank}"
            raise user_error("the training loader", at, error) from error

    def _read_ahead(self) -> None:
        batches = self._batches
        self._ahead.extend(self._send(batch) for batch in [next(batches, batches)] if batch is not batches)

    def _send(self, batch: Any) -> Any:
        return batch if self._prefetch is None else self._prefetch.send(batch)

    def _check_same_on_all(self, here: Any) -> None:
        found = self._trainer.strategy.gather_plain(here)
        if len(set(found)) > 1:
            by_rank = ", ".join(f"rank {rank}: {one}" for rank, one in enumerate(found))
            raise CollectiveMismatch(
                "training loader", by_rank, "as many batches on every rank", flag="limit_train_batches"
            )

    # --- resuming ---

    def state_dict(self) -> dict[str, Any]:
        """Where this rank's loader stands; with a batch read ahead, where it stood before."""
        loader = self._loader_before_ahead if self._ahead else self.train.state_dict()
        ahead = rng_state(self._raw_before_ahead) if self._raw_before_ahead is not None else None
        return {"loader": loader, "ahead": ahead, "num_batches": self.train.num_batches, "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises:
        CheckpointError: in mid-epoch, the loader has another length than that of the run that is gone on with.
        """
        if not state:
            return
        before, now, done = state["num_batches"], self.train.num_batches, self._trainer.progress.batch
        if done and before != now:
            raise CheckpointError("train_dataloaders", f"{now:g} batches", f"{before:g}, as many as when it was saved, "
                                  f"after batch {done} of an epoch")  # fmt: skip
        self.train.load_state_dict(state["loader"])
        self._before_ahead = state["ahead"]
        self.taken = state.get("taken", done)


def _as_it_is(batch: Any, loader: int) -> Any:
    return batch
