"""How far training is: a bar where there is a terminal, plain lines where there is none."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from trainkit.callbacks.base import Callback

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer

PLAIN_EVERY_S = 10.0
BAR_EVERY_S = 0.1


class ProgressBar(Callback):
    """Steps, loss, learning rate and the metrics logged with ``prog_bar=True``, on stderr.

    Args:
        plain_every_s: seconds between lines where stderr is not a terminal.
    """

    def __init__(self, *, plain_every_s: float = PLAIN_EVERY_S) -> None:
        self._plain_every_s = plain_every_s
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._line_at = 0.0
        self._is_shown = True

    def setup(self, trainer: Trainer, pl_module: TrainModule, stage: str) -> None:
        self._is_shown = trainer.is_global_zero

    def on_train_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        self._line_at = time.monotonic()
        if not self._console.is_terminal or not self._is_shown:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
        )
        self._bar = Progress(*columns, console=self._console, transient=False, refresh_per_second=4)
        self._bar.start()
        total = trainer.limits.max_steps if trainer.limits.max_steps > 0 else None
        self._task = self._bar.add_task("training", total=total, completed=trainer.global_step, metrics="")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: TrainModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if now - self._line_at < (BAR_EVERY_S if self._bar is not None else self._plain_every_s):
            return
        if self._bar is None:
            self._line(trainer)
            return
        self._line_at = now
        self._bar.update(self._task, completed=trainer.global_step, metrics=self._metrics(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if trainer.is_fitting and not trainer.sanity_checking and self._bar is None:
            self._line(trainer)

    def _metrics(self, trainer: Trainer) -> str:
        shown = {} if trainer.last_loss is None else {"loss": float(trainer.last_loss)}
        shown |= {"lr": trainer.learning_rate} if trainer.optimizers else {}
        shown |= trainer.results.progress_bar_metrics
        return " ".join(f"{name}={value:.4g}" for name, value in shown.items())

    def _line(self, trainer: Trainer) -> None:
        self._line_at = time.monotonic()
        if not self._is_shown:
            return
        print(f"epoch {trainer.current_epoch} step {trainer.global_step} {self._metrics(trainer)}", file=sys.stderr)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_end(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if self._bar is None:
            self._line(trainer)
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: TrainModule, exception: BaseException) -> None:
        self._stop()


class RichProgressBar(ProgressBar):
    """Our progress bar with the arguments of Lightning's, which are taken and not needed."""

    def __init__(
        self,
        refresh_rate: int = 1,
        leave: bool = False,
        theme: Any = None,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.refresh_rate = refresh_rate
