"""What users, callbacks and loops look at in a run: read only, and asked of the part that knows it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from common_platform.errors import ConfigError
from trainkit.callbacks.base import Callback
from trainkit.callbacks.early_stopping import EarlyStopping
from trainkit.callbacks.model_checkpoint import ModelCheckpoint
from trainkit.callbacks.progress import ProgressBar
from trainkit.data.combined import CombinedLoader
from trainkit.data.loaders import num_batches_of
from trainkit.data_source import DataSource
from trainkit.hooks import is_written
from trainkit.limits import Limits
from trainkit.loggers import Logger
from trainkit.loop.fit import Progress
from trainkit.loop.results import Results
from trainkit.module import TrainModule
from trainkit.optimizers import SchedulerSetup
from trainkit.precision import Precision
from trainkit.stage import TrainerState
from trainkit.strategies.rank_facts import RankFacts


class RunFacts(RankFacts):
    """The Trainer's face. The names are Lightning's."""

    limits: Limits
    precision_plugin: Precision
    progress: Progress
    results: Results
    callbacks: list[Callback]
    loggers: list[Logger]
    optimizers: list[Optimizer]
    schedulers: list[SchedulerSetup]
    default_root_dir: Path
    accumulate_grad_batches: int
    num_sanity_val_steps: int
    sanity_checking: bool
    state: TrainerState
    _module: TrainModule | None
    _data: DataSource | None
    _stage: str | None  # the method that runs: fit, validate, test, predict
    _doing: str | None  # what happens now: in fit, training or validation

    @property
    def module(self) -> TrainModule:
        if self._module is None:
            raise ConfigError("trainer.module", None, "a call of fit or validate")
        return self._module

    lightning_module = model = module

    @property
    def data(self) -> DataSource:
        if self._data is None:
            raise ConfigError("trainer.data", None, "a call of fit or validate")
        return self._data

    @property
    def optimizer(self) -> Optimizer:
        """The first optimizer."""
        if not self.optimizers:
            raise ConfigError("trainer.optimizer", None, "a call of fit")
        return self.optimizers[0]

    @property
    def lr_scheduler_configs(self) -> list[SchedulerSetup]:
        return self.schedulers

    @property
    def precision(self) -> str:
        return self.precision_plugin.name

    @property
    def scaler(self) -> Any:
        """That of 16-mixed precision; None elsewhere."""
        return getattr(self.precision_plugin, "scaler", None)

    @property
    def global_step(self) -> int:
        """Optimizer steps so far, of all optimizers."""
        return self.progress.global_step

    @property
    def current_epoch(self) -> int:
        return self.progress.epoch

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """The newest value of each metric."""
        return self.results.callback_metrics

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """The newest value of each metric that goes to loggers."""
        return self.results.logged_metrics

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        return self.results.progress_bar_metrics

    @property
    def logger(self) -> Logger | None:
        return self.loggers[0] if self.loggers else None

    @property
    def log_dir(self) -> str | None:
        return getattr(self.logger, "log_dir", None) if self.logger else str(self.default_root_dir)

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def is_fitting(self) -> bool:
        return self._stage == "fit"

    @property
    def interrupted(self) -> bool:
        """Whether the last stage was left by an exception."""
        return self.state.status == "interrupted"

    @property
    def training(self) -> bool:
        return self._doing == "train"

    @property
    def validating(self) -> bool:
        return self._doing == "validate" and not self.sanity_checking

    @property
    def testing(self) -> bool:
        return self._doing == "test"

    @property
    def predicting(self) -> bool:
        return self._doing == "predict"

    @property
    def evaluating(self) -> bool:
        return self.validating or self.testing

    @property
    def node_rank(self) -> int:
        return self.strategy.node_rank

    @property
    def num_nodes(self) -> int:
        return self.strategy.num_nodes

    @property
    def device_ids(self) -> list[int]:
        """The numbers of this machine's devices that are trained on; on a CPU those of the processes."""
        index = self.strategy.device.index
        return [index] if index is not None and self.world_size == 1 else list(range(self.num_devices))

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int] | None:
        """What a sampler of one's own needs; None on one rank."""
        return {"num_replicas": self.world_size, "rank": self.global_rank} if self.world_size > 1 else None

    @property
    def num_devices(self) -> int:
        return max(self.world_size // self.num_nodes, 1)

    @property
    def max_epochs(self) -> int | None:
        return self.limits.max_epochs

    @property
    def min_epochs(self) -> int:
        return self.limits.min_epochs

    @property
    def max_steps(self) -> int:
        return self.limits.max_steps

    @property
    def min_steps(self) -> int:
        return self.limits.min_steps

    @property
    def limit_train_batches(self) -> int | float:
        return self.limits.limit_train_batches

    @property
    def limit_val_batches(self) -> int | float:
        return self.limits.limit_val_batches

    @property
    def limit_test_batches(self) -> int | float:
        return self.limits.limit_test_batches

    @property
    def limit_predict_batches(self) -> int | float:
        return self.limits.limit_predict_batches

    @property
    def overfit_batches(self) -> int | float:
        return self.limits.overfit_batches

    @property
    def val_check_interval(self) -> int | float | timedelta:
        return self.limits.val_check_interval

    @property
    def check_val_every_n_epoch(self) -> int | None:
        return self.limits.check_val_every_n_epoch

    @property
    def enable_validation(self) -> bool:
        """Whether fit validates."""
        return is_written(self.module, TrainModule, "validation_step") and self.limits.limit_val_batches > 0

    @property
    def num_training_batches(self) -> float:
        """Of an epoch; infinite where the loader does not tell."""
        loaders = self.data.loaders("fit")
        return self.limits.of("fit", num_batches_of(loaders[0])) if loaders else 0

    @property
    def num_val_batches(self) -> list[float]:
        return self.num_batches_of("validate")

    @property
    def num_sanity_val_batches(self) -> list[float]:
        """Of each loader of validation, in the sanity check."""
        most = float("inf") if self.num_sanity_val_steps == -1 else self.num_sanity_val_steps
        return [min(count, most) for count in self.num_val_batches]

    @property
    def num_test_batches(self) -> list[float]:
        return self.num_batches_of("test")

    @property
    def num_predict_batches(self) -> list[float]:
        return self.num_batches_of("predict")

    def num_batches_of(self, stage: str) -> list[float]:
        """Of each loader of ``stage``; infinite where one does not tell."""
        return [self.limits.of(stage, num_batches_of(one)) for one in self.data.loaders(stage)]

    @property
    def is_last_batch(self) -> bool:
        """Whether the batch that is trained on is the last of its epoch."""
        return self.progress.batch + 1 >= self.num_training_batches

    @property
    def estimated_stepping_batches(self) -> float:
        """Optimizer steps of the whole run, for schedules."""
        of_epochs = float("inf")
        epochs = self.limits.max_epochs
        if epochs not in (None, -1):
            of_epochs = -(-self.num_training_batches // self.accumulate_grad_batches) * float(epochs)  # type: ignore[arg-type]
        steps = min(of_epochs, float("inf") if self.max_steps == -1 else self.max_steps)
        return steps if steps == float("inf") else int(steps)

    @property
    def train_dataloader(self) -> Any:
        loaders = self._data.known("fit") if self._data is not None else None
        if not loaders:
            return None
        return loaders[0].iterables if isinstance(loaders[0], CombinedLoader) else loaders[0]

    @property
    def val_dataloaders(self) -> Any:
        return self._known_loaders("validate")

    @property
    def test_dataloaders(self) -> Any:
        return self._known_loaders("test")

    @property
    def predict_dataloaders(self) -> Any:
        return self._known_loaders("predict")

    def _known_loaders(self, stage: str) -> Any:
        loaders = self._data.known(stage) if self._data is not None else None
        return loaders[0] if loaders and len(loaders) == 1 else loaders

    @property
    def checkpoint_callbacks(self) -> list[ModelCheckpoint]:
        return [callback for callback in self.callbacks if isinstance(callback, ModelCheckpoint)]

    @property
    def checkpoint_callback(self) -> ModelCheckpoint | None:
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> list[EarlyStopping]:
        return [callback for callback in self.callbacks if isinstance(callback, EarlyStopping)]

    @property
    def early_stopping_callback(self) -> EarlyStopping | None:
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def progress_bar_callback(self) -> ProgressBar | None:
        return next((callback for callback in self.callbacks if isinstance(callback, ProgressBar)), None)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the first rank only."""
        if self.is_global_zero:
            print(*args, **kwargs)
