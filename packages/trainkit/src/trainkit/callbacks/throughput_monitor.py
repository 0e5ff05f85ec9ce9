"""Batches, samples, tokens and operations a second, and the share of what the device could do (MFU)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from common_platform.errors import ConfigError, TrainingError
from trainkit.callbacks.base import Callback
from trainkit.flops import available_flops

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer


class Count(NamedTuple):
    """What was done up to ``seconds``."""

    seconds: float
    batches: int
    samples: int
    items: int
    flops: float


class Throughput:
    """Rates over the newest counts.

    Args:
        available_flops: operations a second that one device could do.
        world_size: devices.
        window_size: counts that a rate is taken over.
        separator: between "device" and a name.

    Source: Chowdhery et al., "PaLM", appendix B (model FLOPs utilisation).
    """

    def __init__(
        self,
        available_flops: float | None = None,
        world_size: int = 1,
        window_size: int = 100,
        separator: str = "/",
    ) -> None:
        if window_size < 2:
            raise ConfigError("window_size", window_size, "2 or more")
        self.available_flops, self.world_size, self.separator = available_flops, world_size, separator
        self._counts: deque[Count] = deque(maxlen=window_size)

    def update(
        self, *, time: float, batches: int, samples: int, lengths: int | None = None, flops: float | None = None
    ) -> None:
        """Sums so far, none less than before; ``flops`` are those since the last call."""
        before = self._counts[-1] if self._counts else Count(0.0, 0, 0, 0, 0.0)
        if time < before.seconds or batches < before.batches or samples < before.samples:
            raise ConfigError("Throughput.update", (time, batches, samples), f"no less than {before}")
        self._counts.append(Count(time, batches, samples, lengths or 0, before.flops + (flops or 0.0)))

    def compute(self) -> dict[str, float]:
        """The sums, and the rates once there are two counts."""
        if not self._counts:
            return {}
        first, last = self._counts[0], self._counts[-1]
        found = {"time": last.seconds, "batches": float(last.batches), "samples": float(last.samples)}
        if last.items:
            found["lengths"] = float(last.items)
        elapsed = last.seconds - first.seconds
        if len(self._counts) < 2 or elapsed <= 0:
            return found
        rates = {"batches": last.batches - first.batches, "samples": last.samples - first.samples}
        if last.items:
            rates["items"] = last.items - first.items
        if last.flops:
            rates["flops"] = last.flops - first.flops  # type: ignore[assignment]
        for name, amount in rates.items():
            found[f"device{self.separator}{name}_per_sec"] = amount / elapsed
            if self.world_size > 1:
                found[f"{name}_per_sec"] = amount / elapsed * self.world_size
        if last.flops and self.available_flops:
            found[f"device{self.separator}mfu"] = rates["flops"] / elapsed / self.available_flops
        return found

    def reset(self) -> None:
        self._counts.clear()


class ThroughputMonitor(Callback):
    """Logs rates as ``train/device/samples_per_sec`` and the like, whenever a row of the log is due.

    A module with an attribute ``flops_per_batch`` (see ``trainkit.flops.measure_flops``) also has
    ``device/flops_per_sec`` and ``device/mfu``, of one rank. Time spent in validation does not count as training.

    Args:
        batch_size_fn: batch -> samples.
        length_fn: batch -> items, such as tokens.
        window_size: batches that a rate is taken over.
        separator: between the parts of a name.
        available_flops: operations a second that one device could do; default: found by ``trainkit.flops``.
    """

    def __init__(
        self,
        batch_size_fn: Callable[[Any], int],
        length_fn: Callable[[Any], int] | None = None,
        *,
        window_size: int = 100,
        separator: str = "/",
        available_flops: float | None = None,
    ) -> None:
        self.batch_size_fn, self.length_fn = batch_size_fn, length_fn
        self.window_size, self.separator, self.available_flops = window_size, separator, available_flops
        self._throughput: dict[str, Throughput] = {}
        self._began: dict[str, float] = {}
        self._sums: dict[str, list[int]] = {}

    def setup(self, trainer: Trainer, pl_module: TrainModule, stage: str) -> None:
        if self.available_flops is None and getattr(pl_module, "flops_per_batch", None):
            self.available_flops = available_flops(trainer.strategy.device, trainer.precision_plugin.compute_dtype)

    def _start(self, trainer: Trainer, stage: str) -> None:
        self._throughput[stage] = Throughput(self.available_flops, trainer.world_size, self.window_size, self.separator)
        self._sums[stage] = [0, 0, 0]
        self._began[stage] = time.perf_counter()

    def _update(self, pl_module: TrainModule, stage: str, batch: Any) -> None:
        if stage not in self._throughput:
            return
        flops = getattr(pl_module, "flops_per_batch", None)
        sums = self._sums[stage]
        samples, items = self.batch_size_fn(batch), self.length_fn(batch) if self.length_fn is not None else 0
        if samples < 1:
            raise TrainingError("batch_size_fn", samples, "1 or more samples in a batch", code="user_code")
        self._sums[stage] = [sums[0] + 1, sums[1] + samples, sums[2] + items]
        self._throughput[stage].update(
            time=time.perf_counter() - self._began[stage],
            batches=self._sums[stage][0],
            samples=self._sums[stage][1],
            lengths=self._sums[stage][2] if self.length_fn is not None else None,
            flops=flops,
        )

    def _log(self, trainer: Trainer, stage: str) -> None:
        found = self._throughput[stage].compute()
        trainer.log_metrics({f"{stage}{self.separator}{name}": value for name, value in found.items()})

    def on_train_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        self._start(trainer, "train")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: TrainModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._update(pl_module, "train", batch)
        if trainer.logs_this_step and trainer.fit_loop is not None and trainer.fit_loop.is_between_groups:
            self._log(trainer, "train")

    def on_validation_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if not trainer.sanity_checking:
            self._start(trainer, "validate")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: TrainModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if not trainer.sanity_checking:
            self._update(pl_module, "validate", batch)

    def on_validation_end(self, trainer: Trainer, pl_module: TrainModule) -> None:
        if trainer.sanity_checking:
            return
        self._log(trainer, "validate")
        if "train" in self._began:
            self._began["train"] += time.perf_counter() - self._began["validate"]

    def on_test_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        self._start(trainer, "test")

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: TrainModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._update(pl_module, "test", batch)

    def on_test_end(self, trainer: Trainer, pl_module: TrainModule) -> None:
        self._log(trainer, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: TrainModule) -> None:
        self._start(trainer, "predict")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: TrainModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._update(pl_module, "predict", batch)

    def on_predict_end(self, trainer: Trainer, pl_module: TrainModule) -> None:
        self._log(trainer, "predict")
