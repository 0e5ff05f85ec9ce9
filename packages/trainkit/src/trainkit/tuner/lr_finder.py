"""The learning-rate range test (Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common_platform.errors import ConfigError, NonFiniteLoss
from trainkit.callbacks.base import Callback
from trainkit.plot_schedule import matplotlib_part
from trainkit.ranks import rank_zero_info, rank_zero_warn
from trainkit.tuner import attributes
from trainkit.tuner.trial import sibling, without_trace

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer

MODES = ("exponential", "linear")
NAMES = ("lr", "learning_rate")
MEMORY = 0.98  # share of the running mean of the loss that stays at each step


class LRFinder:
    """What a range test found: ``results["lr"]`` and ``results["loss"]``, the running mean of the loss at each."""

    def __init__(self, mode: str, lr_min: float, lr_max: float, num_training: int) -> None:
        self.mode, self.lr_min, self.lr_max, self.num_training = mode, lr_min, lr_max, num_training
        self.results: dict[str, list[float]] = {"lr": [], "loss": []}
        self._best: int | None = None

    def rate(self, step: int) -> float:
        """Of step ``step``, from 0 on; the first is made with ``lr_min`` and the last with ``lr_max``."""
        if step == 0:
            return self.lr_min
        done = (step + 1) / self.num_training
        if self.mode == "linear":
            return self.lr_min + done * (self.lr_max - self.lr_min)
        return self.lr_min * float((self.lr_max / self.lr_min) ** done)

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float | None:
        """The rate at which the loss fell most steeply; None where there are fewer than two points.

        Args:
            skip_begin, skip_end: points to leave out at both ends, which mislead.
        """
        last = len(self.results["loss"]) - skip_end
        kept = [i for i in range(skip_begin, last) if math.isfinite(self.results["loss"][i])]
        self._best = None
        if len(kept) < 2:
            rank_zero_warn("too few points for a suggestion of a learning rate: more steps, or a larger dataset")
            return None
        losses = torch.tensor([self.results["loss"][i] for i in kept])
        rates = torch.tensor([self.results["lr"][i] for i in kept])
        self._best = kept[int(torch.argmin(torch.gradient(losses, spacing=(rates,))[0]))]
        return self.results["lr"][self._best]

    def plot(self, suggest: bool = False, show: bool = False, ax: Any = None, path: str | Path | None = None) -> Any:
        """The loss over the rate.

        Args:
            suggest: mark the suggestion with a point.
            show: open a window.
            ax: matplotlib's axes to draw on; default: new ones.
            path: a file to write, PNG, SVG or PDF by its ending.

        Returns:
            matplotlib's figure.

        Raises:
            ResourceError: matplotlib is not installed.
        """
        if ax is None and show:
            ax = matplotlib_part("pyplot", "LRFinder.plot").subplots()[1]
        elif ax is None:
            ax = matplotlib_part("figure", "LRFinder.plot").Figure(layout="constrained").subplots()
        figure = ax.figure
        ax.plot(self.results["lr"], self.results["loss"])
        if self.mode == "exponential":
            ax.set_xscale("log")
        ax.set_xlabel("Learning rate")
        ax.set_ylabel("Loss")
        if suggest and self.suggestion() is not None and self._best is not None:
            ax.plot(self.results["lr"][self._best], self.results["loss"][self._best], "o", markersize=10, color="red")
        if path is not None:
            figure.savefig(path)
        if show:
            matplotlib_part("pyplot", "LRFinder.plot").show()
        return figure


class _Search(Callback):
    """Sets the rate before each step and keeps the loss after it."""

    def __init__(self, finder: LRFinder, stop_at: float | None) -> None:
        self._finder, self._stop_at = finder, stop_at
        self._mean = 0.0
        self._best = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if len(trainer.optimizers) != 1:
            raise ConfigError("configure_optimizers", f"{len(trainer.optimizers)} optimizers", "one, for lr_find")
        trainer.schedulers.clear()

    def on_train_batch_start(self, trainer: Trainer, pl_module: TrainModule, batch: Any, batch_idx: int) -> None:
        rate = self._finder.rate(trainer.global_step)
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: TrainModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.progress.batch) % trainer.accumulate_grad_batches or not outputs:
            return
        step = trainer.global_step
        loss = float(trainer.strategy.reduce(outputs["loss"].float(), "mean"))
        self._mean = MEMORY * self._mean + (1 - MEMORY) * loss
        smooth = self._mean / (1 - MEMORY ** (step + 1))
        self._finder.results["lr"].append(self._finder.rate(step - 1))
        self._finder.results["loss"].append(smooth)
        if self._stop_at is not None and step > 1 and smooth > self._stop_at * self._best:
            trainer.should_stop = True
        if smooth < self._best or step == 1:
            self._best = smooth


def lr_find(
    trainer: Trainer,
    model: TrainModule,
    given: dict[str, Any],
    *,
    min_lr: float,
    max_lr: float,
    num_training: int,
    mode: str,
    early_stop_threshold: float | None,
    update_attr: bool,
    attr_name: str,
) -> LRFinder | None:
    """See ``Tuner.lr_find``; ``given`` are the data arguments of ``Trainer.fit``."""
    if mode not in MODES:
        raise ConfigError("lr_find.mode", mode, f"one of {MODES}")
    if not 0 < min_lr < max_lr or not math.isfinite(max_lr):
        raise ConfigError("lr_find.min_lr", min_lr, f"above 0 and below max_lr={max_lr}")
    if num_training < 2:
        raise ConfigError("lr_find.num_training", num_training, "2 or more")
    if trainer.fast_dev_run:
        rank_zero_warn("lr_find does nothing with fast_dev_run")
        return None
    data = given.get("datamodule")
    if update_attr:
        names = (attr_name,) if attr_name else NAMES
        attr_name = attributes.first_of(names, model, data)
    finder = LRFinder(mode, min_lr, max_lr, num_training)
    with without_trace(trainer, model):
        run = sibling(trainer, [_Search(finder, early_stop_threshold)], max_steps=num_training, max_epochs=-1,
                      min_steps=0, min_epochs=0, limit_val_batches=0)  # fmt: skip
        try:
            run.fit(model, **given)
        except NonFiniteLoss:
            rank_zero_info(f"lr_find ended after {run.global_step} steps: the loss was not finite any more")
    suggested = finder.suggestion() if update_attr else None
    if suggested is not None:
        for owner in attributes.holders(attr_name, model, data):
            attributes.put(owner, attr_name, suggested)
        rank_zero_info(f"{attr_name} is {suggested} now")
    return finder
