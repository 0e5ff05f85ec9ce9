"""The learning rate beside the other metrics."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from common_platform.errors import ConfigError
from trainkit.callbacks.base import Callback

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer


class LearningRateMonitor(Callback):
    """Logs the rate that each step was made with, as ``lr-AdamW``; several optimizers of one class are numbered, and
    parameter groups get ``/pg1`` and so on. A scheduler's own ``name`` takes the place of ``lr-AdamW``.

    Args:
        logging_interval: "step", or "epoch": once, at the beginning of each.
        log_momentum: also the momentum, ``-momentum`` behind the name.
        log_weight_decay: also the weight decay, ``-weight_decay`` behind the name.
    """

    def __init__(
        self, logging_interval: str | None = None, log_momentum: bool = False, log_weight_decay: bool = False
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            raise ConfigError("LearningRateMonitor.logging_interval", logging_interval, "'step', 'epoch' or None")
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self.log_weight_decay = log_weight_decay

    def on_train_epoch_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if self.logging_interval == "epoch":
            trainer.log_metrics(self._values(trainer))

    def on_train_batch_start(self, trainer: Trainer, pl_module: TrainModule, batch: Any, batch_idx: int) -> None:
        if self.logging_interval != "epoch" and trainer.logs_this_step:
            for name, value in self._values(trainer).items():
                pl_module.log(name, value, on_step=True, on_epoch=False)

    def _values(self, trainer: Trainer) -> dict[str, float]:
        found: dict[str, float] = {}
        kinds = Counter(type(one).__name__ for one in trainer.optimizers)
        numbers: Counter[str] = Counter()
        for optimizer in trainer.optimizers:
            kind = type(optimizer).__name__
            numbers[kind] += 1
            name = f"lr-{kind}" if kinds[kind] == 1 or numbers[kind] == 1 else f"lr-{kind}-{numbers[kind] - 1}"
            found |= self._of_groups(self._given_name(trainer, optimizer) or name, optimizer)
        return found

    def _given_name(self, trainer: Trainer, optimizer: Optimizer) -> str | None:
        names = [s.name for s in trainer.schedulers if getattr(s.scheduler, "optimizer", None) is optimizer]
        return next((name for name in names if name), None)

    def _of_groups(self, name: str, optimizer: Optimizer) -> dict[str, float]:
        groups = optimizer.param_groups
        found: dict[str, float] = {}
        for index, group in enumerate(groups):
            full = name if len(groups) == 1 else f"{name}/{group.get('name', f'pg{index + 1}')}"
            found[full] = float(group["lr"])
            if self.log_momentum:
                found[f"{full}-momentum"] = float(group.get("momentum", group.get("betas", (0.0,))[0]))
            if self.log_weight_decay:
                found[f"{full}-weight_decay"] = float(group.get("weight_decay", 0.0))
        return found
