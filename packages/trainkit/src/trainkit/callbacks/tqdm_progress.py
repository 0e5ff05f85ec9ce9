"""A progress bar of tqdm's, one line for training and one for what is evaluated."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from common_platform.errors import ConfigError, ResourceError
from trainkit.callbacks.progress import ProgressBar

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer


class TQDMProgressBar(ProgressBar):
    """Batches, their rate, the time left, and the metrics logged with ``prog_bar=True``.

    Args:
        refresh_rate: batches between two updates; 0: no bar.
        process_position: lines to leave free above, for other processes.
        leave: keep the bar of each epoch.

    Raises:
        ResourceError: tqdm is not installed.
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        if refresh_rate < 0:
            raise ConfigError("TQDMProgressBar.refresh_rate", refresh_rate, "0 or more")
        if find_spec("tqdm") is None:
            raise ResourceError("TQDMProgressBar", "tqdm", "installed: pip install 'trainkit[tqdm]'")
        super().__init__()
        self.refresh_rate, self.process_position, self.leave = refresh_rate, process_position, leave
        self._train: Any = None
        self._other: Any = None

    def _new(self, what: str, total: float, *, position: int, leave: bool) -> Any:
        known = None if total == float("inf") else int(total)
        disabled = not self.refresh_rate or not self._is_shown
        tqdm = import_module("tqdm.auto").tqdm
        return tqdm(
            desc=what, total=known, position=self.process_position + position, disable=disabled, leave=leave,
            dynamic_ncols=True, bar_format=self.BAR_FORMAT if known is not None else None,
        )  # fmt: skip

    def _is_due(self, done: int, total: float) -> bool:
        return bool(self.refresh_rate) and (done % self.refresh_rate == 0 or done == total)

    def on_train_start(self, trainer: Trainer, pl_module: TrainModule) -> None: ...

    def on_train_epoch_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        self._close_train()
        what, total = f"Epoch {trainer.current_epoch}", trainer.num_training_batches
        self._train = self._new(what, total, position=0, leave=self.leave)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: TrainModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._train is None:  # resumed in the middle of an epoch
            self.on_train_epoch_start(trainer, pl_module)
        done = batch_idx + 1
        if self._is_due(done, trainer.num_training_batches):
            self._train.update(done - self._train.n)
            self._train.set_postfix(self.get_metrics(trainer, pl_module))

    def get_metrics(self, trainer: Trainer, pl_module: TrainModule) -> dict[str, Any]:
        """What stands behind the bar; override it for more or less."""
        number = trainer.logger.version if trainer.logger is not None and hasattr(trainer.logger, "version") else None
        shown: dict[str, Any] = {} if number is None else {"v_num": str(number).removeprefix("version_")}
        return shown | {name: f"{value:.3g}" for name, value in trainer.progress_bar_metrics.items()}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if self._train is not None:
            self._train.set_postfix(self.get_metrics(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: TrainModule) -> None:
        self._close_train()

    def _close_train(self) -> None:
        if self._train is not None:
            self._train.close()
            self._train = None

    # --- evaluation: one bar for all loaders of it ---

    def _begin_other(self, what: str, counts: list[float]) -> None:
        self._end_other()
        inside = self._train is not None
        self._other = self._new(what, sum(counts), position=int(inside), leave=not inside and self.leave)

    def _count_other(self) -> None:
        if self._other is not None and self.refresh_rate:
            self._other.update(1)

    def _end_other(self) -> None:
        if self._other is not None:
            self._other.close()
            self._other = None

    def on_validation_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        what = "Sanity Checking" if trainer.sanity_checking else "Validation"
        self._begin_other(what, trainer.num_batches_of("validate"))

    def on_validation_batch_end(self, *_: Any) -> None:
        self._count_other()

    def on_validation_end(self, trainer: Trainer, pl_module: TrainModule) -> None:
        self._end_other()

    def on_test_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        self._begin_other("Testing", trainer.num_batches_of("test"))

    def on_test_batch_end(self, *_: Any) -> None:
        self._count_other()

    def on_test_end(self, trainer: Trainer, pl_module: TrainModule) -> None:
        self._end_other()

    def on_predict_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        self._begin_other("Predicting", trainer.num_batches_of("predict"))

    def on_predict_batch_end(self, *_: Any) -> None:
        self._count_other()

    def on_predict_end(self, trainer: Trainer, pl_module: TrainModule) -> None:
        self._end_other()

    def on_exception(self, trainer: Trainer, pl_module: TrainModule, exception: BaseException) -> None:
        self._end_other()
        self._close_train()
