"""What the device does, beside the other metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common_platform.errors import ConfigError
from trainkit.callbacks.base import Callback
from trainkit.device_stats import CpuLoad, Energy, cpu_stats, device_memory

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer


class DeviceStatsMonitor(Callback):
    """Logs memory, load and energy of the device as ``DeviceStatsMonitor.on_train_batch_end/cpu_percent`` and the like,
    whenever a row of the log is due.

    Args:
        cpu_stats: also of the CPU; default: only where it is what trains.
        energy: joules since the beginning, where they can be read.

    Raises:
        ConfigError: there is no logger.
    """

    def __init__(self, cpu_stats: bool | None = None, *, energy: bool = True) -> None:
        self._cpu_stats, self._wants_energy = cpu_stats, energy
        self._load: CpuLoad | None = None
        self._energy: Energy | None = None

    def setup(self, trainer: Trainer, pl_module: TrainModule, stage: str) -> None:
        if stage == "fit" and not trainer.loggers:
            raise ConfigError("logger", None, "one, because DeviceStatsMonitor logs")
        device = trainer.strategy.device
        if self._cpu_stats or (self._cpu_stats is None and device.type == "cpu"):
            self._load = CpuLoad()
        self._energy = Energy(device) if self._wants_energy else None

    def stats(self, trainer: Trainer) -> dict[str, float]:
        """What can be read now."""
        found = device_memory(trainer.strategy.device)
        found |= cpu_stats(self._load) if self._load is not None else {}
        return found | (self._energy.joules() if self._energy is not None else {})

    def _log(self, trainer: Trainer, hook: str) -> None:
        if trainer.loggers and (trainer.logs_this_step or not trainer.is_fitting):
            trainer.log_metrics({f"{type(self).__qualname__}.{hook}/{n}": v for n, v in self.stats(trainer).items()})

    def on_train_batch_start(self, trainer: Trainer, pl_module: TrainModule, batch: Any, batch_idx: int) -> None:
        self._log(trainer, "on_train_batch_start")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: TrainModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._log(trainer, "on_train_batch_end")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: TrainModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._log(trainer, "on_validation_batch_start")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: TrainModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._log(trainer, "on_validation_batch_end")

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: TrainModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._log(trainer, "on_test_batch_start")

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: TrainModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._log(trainer, "on_test_batch_end")
