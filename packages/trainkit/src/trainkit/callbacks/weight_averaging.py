"""Averages of the weights: of the last epochs (SWA), or of all steps, exponentially (EMA)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from common_platform.errors import ConfigError
from trainkit.callbacks.base import Callback

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer

Average = Callable[[Tensor, Tensor, Any], Tensor]


class StochasticWeightAveraging(Callback):
    """Averages the weights that the last epochs begin with, at a learning rate of their own.

    The module gets the average when training ends, and its batch norms the statistics of the training data with it.

    Args:
        swa_lrs: the learning rate, or one for each parameter group.
        swa_epoch_start: the first epoch that counts, from 1 on, or a share of ``max_epochs``.
        annealing_epochs: over which the rate goes to ``swa_lrs``.
        annealing_strategy: "cos" or "linear".
        avg_fn: (average, weights, number averaged) -> average; default: the mean.
        device: where the average is kept.

    Raises:
        ConfigError: an argument is out of range.

    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018.
    """

    def __init__(
        self,
        swa_lrs: float | list[float],
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: str = "cos",
        avg_fn: Average | None = None,
        device: torch.device | str | None = "cpu",
    ) -> None:
        rates = swa_lrs if isinstance(swa_lrs, list) else [swa_lrs]
        if not rates or any(not rate > 0 for rate in rates):
            raise ConfigError("swa_lrs", swa_lrs, "a number above 0, or a list of such")
        if swa_epoch_start < 1 if isinstance(swa_epoch_start, int) else not 0 <= swa_epoch_start <= 1:
            raise ConfigError("swa_epoch_start", swa_epoch_start, "an epoch from 1 on, or a share 0.0..1.0")
        if annealing_strategy not in ("cos", "linear"):
            raise ConfigError("annealing_strategy", annealing_strategy, "'cos' or 'linear'")
        self.swa_lrs, self.annealing_epochs, self.annealing_strategy = swa_lrs, annealing_epochs, annealing_strategy
        self._start, self._avg_fn, self._device = swa_epoch_start, avg_fn, device
        self._average: dict[str, Tensor] = {}
        self._count = 0
        self._first = 0
        self._rates: list[float] = []  # of the groups when averaging began

    def on_fit_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if trainer.max_epochs in (None, -1):
            raise ConfigError("max_epochs", trainer.max_epochs, "a number: StochasticWeightAveraging counts from it")
        if len(trainer.optimizers) != 1:
            raise ConfigError("configure_optimizers", f"{len(trainer.optimizers)} optimizers", "one")
        groups = trainer.optimizer.param_groups
        if isinstance(self.swa_lrs, list) and len(self.swa_lrs) != len(groups):
            raise ConfigError("swa_lrs", self.swa_lrs, f"one for each of {len(groups)} parameter groups")
        start = self._start
        total = trainer.max_epochs or 0
        self._first = max(start - 1, 0) if isinstance(start, int) else int(total * start)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if trainer.current_epoch < self._first:
            return
        if not self._count:
            self._rates = [float(group["lr"]) for group in trainer.optimizer.param_groups]
        weights = {name: p.detach() for name, p in pl_module.named_parameters()}
        for name, tensor in weights.items():
            kept = self._average.get(name)
            mine = tensor.to(self._device or tensor.device)
            self._average[name] = mine.clone() if kept is None else self._mean(kept, mine)
        self._count += 1

    def _mean(self, average: Tensor, weights: Tensor) -> Tensor:
        if self._avg_fn is not None:
            return self._avg_fn(average, weights, self._count)
        return average + (weights - average) / (self._count + 1)

    def on_train_batch_start(self, trainer: Trainer, pl_module: TrainModule, batch: Any, batch_idx: int) -> None:
        if not self._count:
            return
        done = min((trainer.current_epoch - self._first) / max(self.annealing_epochs, 1), 1.0)
        done = 1.0 if not self.annealing_epochs else done
        share = (1 - math.cos(math.pi * done)) / 2 if self.annealing_strategy == "cos" else done
        groups = trainer.optimizer.param_groups
        wanted = self.swa_lrs if isinstance(self.swa_lrs, list) else [self.swa_lrs] * len(groups)
        for group, before, after in zip(groups, self._rates, wanted, strict=True):
            group["lr"] = before + (after - before) * share  # whatever a scheduler has made of it

    def on_train_end(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if not self._count:
            return
        with torch.no_grad():
            for name, parameter in pl_module.named_parameters():
                parameter.copy_(self._average[name])
        if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in pl_module.modules()):
            batches = (trainer.move(batch, 0) for batch in trainer.loaders("fit")[0])
            update_bn(batches, pl_module, trainer.strategy.device)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "average": self._average, "rates": self._rates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._count, self._average, self._rates = state_dict["count"], state_dict["average"], state_dict["rates"]


class EMA(Callback):
    """An exponential average of the weights, made after each optimizer step; validation and the result use it.

    Args:
        decay: how much of the average stays at each step, in [0, 1).
        update_starting_at_step: optimizer steps before the average begins.

    Raises:
        ConfigError: ``decay`` is out of range.

    Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM J. Control 1992.
    """

    def __init__(self, decay: float = 0.999, update_starting_at_step: int = 0) -> None:
        if not 0 <= decay < 1:
            raise ConfigError("EMA.decay", decay, "in [0, 1)")
        self.decay, self.update_starting_at_step = decay, update_starting_at_step
        self._average: list[Tensor] = []
        self._own: list[Tensor] = []
        self._step = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: TrainModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step or trainer.global_step < self.update_starting_at_step:
            return
        self._step = trainer.global_step
        weights = [p.detach() for p in pl_module.parameters()]
        if not self._average:
            self._average = [tensor.clone() for tensor in weights]
            return
        self._average = [tensor.to(p.device) for tensor, p in zip(self._average, weights, strict=True)]
        torch._foreach_lerp_(self._average, weights, 1 - self.decay)

    def on_validation_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if self._average and trainer.is_fitting:
            self._own = [p.detach().clone() for p in pl_module.parameters()]
            self._put(pl_module, self._average)

    def on_validation_end(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if self._own:
            self._put(pl_module, self._own)
            self._own = []

    def on_train_end(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if self._average:
            self._put(pl_module, self._average)

    @staticmethod
    def _put(module: nn.Module, weights: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, tensor in zip(module.parameters(), weights, strict=True):
                parameter.copy_(tensor)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._average, self._step = state_dict["average"], state_dict["step"]
