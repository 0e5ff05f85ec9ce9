"""How far training is: a bar where there is a terminal, plain lines where there is none."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trainkit.callbacks.base import Callback
from trainkit.loop.results import batch_size_of

if TYPE_CHECKING:
    from rich.progress import Progress

    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer

PLAIN_EVERY_S = 10.0
BAR_EVERY_S = 0.1


class ProgressBar(Callback):
    """Steps, time left, loss, learning rate, throughput and the metrics logged with ``prog_bar=True``, on stderr.

    Throughput is of this rank: in tokens a second where batches hold ``input_ids`` (padding, as ``attention_mask`` has
    it, is not counted), else in samples a second.

    Args:
        plain_every_s: seconds between lines where stderr is not a terminal.
    """

    def __init__(self, *, plain_every_s: float = PLAIN_EVERY_S) -> None:
        self._plain_every_s = plain_every_s
        self._bar: Progress | None = None
        self._task: Any = None  # of the bar
        self._line_at = 0.0
        self._is_shown = True
        self._items = 0  # tokens or samples since the last look
        self._unit = "samples/s"
        self._looked_at = 0.0
        self._began_at, self._began_with = 0.0, 0
        self._total: int | None = None

    def setup(self, trainer: Trainer, pl_module: TrainModule, stage: str) -> None:
        self._is_shown = trainer.is_global_zero

    def on_train_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        self._line_at = self._looked_at = self._began_at = time.monotonic()
        self._items, self._began_with, self._total = 0, trainer.global_step, _total_steps(trainer)
        if not sys.stderr.isatty() or not self._is_shown:
            return
        self._bar = _new_bar()
        self._bar.start()
        self._task = self._bar.add_task("training", total=self._total, completed=trainer.global_step, metrics="")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: TrainModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._is_shown:
            return
        self._count(batch)
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

    def _count(self, batch: Any) -> None:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor):
            self._items += batch_size_of(batch)
            return
        mask = batch.get("attention_mask")
        seen = mask if isinstance(mask, Tensor) and mask.is_cpu and mask.ndim == 2 else None
        self._items += ids.numel() if seen is None else int(seen.sum())
        self._unit = "tokens/s"

    def _throughput(self) -> str:
        """Since it was asked for last."""
        now = time.monotonic()
        rate = self._items / max(now - self._looked_at, 1e-9)
        self._items, self._looked_at = 0, now
        return f"{rate:.4g} {self._unit}"

    def _time_left(self, trainer: Trainer) -> str:
        done = trainer.global_step - self._began_with
        if self._total is None or done < 1:
            return ""
        left = (time.monotonic() - self._began_at) / done * max(self._total - trainer.global_step, 0)
        return f" left={timedelta(seconds=round(left))}"

    def get_metrics(self, trainer: Trainer, pl_module: TrainModule) -> dict[str, Any]:
        """What is shown, by name; override it to show other things."""
        shown: dict[str, Any] = {} if trainer.last_loss is None else {"loss": float(trainer.last_loss)}
        shown |= {"lr": trainer.learning_rate} if trainer.optimizers else {}
        return shown | trainer.results.progress_bar_metrics

    def _metrics(self, trainer: Trainer) -> str:
        shown = self.get_metrics(trainer, trainer.module)
        parts = [f"{n}={value:.4g}" if isinstance(value, float) else f"{n}={value}" for n, value in shown.items()]
        found = " ".join(parts)
        return f"{found} {self._throughput()}" if self._items else found

    def _line(self, trainer: Trainer) -> None:
        self._line_at = time.monotonic()
        if not self._is_shown:
            return
        about = f"{self._metrics(trainer)}{self._time_left(trainer)}"
        print(f"epoch {trainer.current_epoch} step {trainer.global_step} {about}", file=sys.stderr)

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


def _total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run, where something says how many they are."""
    total = trainer.estimated_stepping_batches
    return None if math.isinf(total) else int(total)


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


def _new_bar() -> Progress:
    """rich is imported where a bar is shown: it takes a tenth of the time that torch takes."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}"),
    )
    return Progress(*columns, console=Console(stderr=True), transient=False, refresh_per_second=4)
