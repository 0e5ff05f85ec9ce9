"""The Trainer: what a run consists of, wired together. The work is in the loop, the strategy and the precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from common_platform.errors import CheckpointIncomplete, ConfigError
from trainkit import checkpoint
from trainkit.callbacks.base import Callback
from trainkit.callbacks.model_checkpoint import ModelCheckpoint
from trainkit.callbacks.progress import ProgressBar
from trainkit.callbacks.timer import Timer
from trainkit.data import TrainLoader, rng_state
from trainkit.device import choose_device
from trainkit.hooks import HOOK_NAMES, ON_MODULE
from trainkit.limits import Limits
from trainkit.loggers import CSVLogger, Logger
from trainkit.loop.evaluate import validate
from trainkit.loop.fit import FitLoop, Progress
from trainkit.loop.results import Results
from trainkit.module import TrainModule
from trainkit.optimizers import SchedulerSetup, understand
from trainkit.precision import Precision, make_precision
from trainkit.strategies import SingleDevice, Strategy


class Trainer:
    """Trains a ``TrainModule``.

    Args:
        max_epochs: default 1000, or no limit where ``max_steps`` is given. -1: no limit.
        max_steps: optimizer steps. -1: no limit.
        max_time: a ``timedelta``, "DD:HH:MM:SS" or keyword arguments of ``timedelta``.
        accelerator: "auto", "cpu", "cuda" (or "gpu"), "xpu", "mps".
        strategy: "auto", or a ``Strategy``.
        precision: one of ``trainkit.precision.PRECISIONS``.
        accumulate_grad_batches: micro-batches to one optimizer step.
        gradient_clip_val, gradient_clip_algorithm: by "norm" or by "value".
        val_check_interval: an integer number of batches, or a share of an epoch.
        limit_train_batches, limit_val_batches: an integer number, or a share.
        num_sanity_val_steps: validation batches before training, to find errors early.
        log_every_n_steps: optimizer steps between rows of the log.
        callbacks: in the order in which they are called; checkpoints come last.
        logger: True for CSV, False for none, a ``Logger`` or several.
        default_root_dir: where checkpoints and logs go.
        seed: of the order of samples; default: that of ``seed_everything``.

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        max_epochs: int | None = None,
        max_steps: int = -1,
        max_time: timedelta | str | Mapping[str, float] | None = None,
        accelerator: str = "auto",
        devices: str | int = "auto",
        strategy: str | Strategy = "auto",
        precision: str | int = "32-true",
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str = "norm",
        val_check_interval: int | float = 1.0,
        check_val_every_n_epoch: int = 1,
        limit_train_batches: int | float = 1.0,
        limit_val_batches: int | float = 1.0,
        num_sanity_val_steps: int = 2,
        log_every_n_steps: int = 50,
        callbacks: Sequence[Callback] | Callback | None = None,
        logger: bool | Logger | Sequence[Logger] = True,
        default_root_dir: str | Path | None = None,
        enable_progress_bar: bool = True,
        enable_checkpointing: bool = True,
        deterministic: bool = False,
        seed: int | None = None,
    ) -> None:
        self.limits = Limits(
            max_epochs=max_epochs,
            max_steps=max_steps,
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            val_check_interval=val_check_interval,
            check_val_every_n_epoch=check_val_every_n_epoch,
        )
        self.default_root_dir = Path(default_root_dir or Path.cwd() / "runs")
        self.accumulate_grad_batches = _at_least("accumulate_grad_batches", accumulate_grad_batches, 1)
        self.log_every_n_steps = _at_least("log_every_n_steps", log_every_n_steps, 1)
        self.num_sanity_val_steps = _at_least("num_sanity_val_steps", num_sanity_val_steps, 0)
        if gradient_clip_algorithm not in ("norm", "value"):
            raise ConfigError("gradient_clip_algorithm", gradient_clip_algorithm, "'norm' or 'value'")
        if gradient_clip_val is not None and gradient_clip_val <= 0:
            raise ConfigError("gradient_clip_val", gradient_clip_val, "a number above 0, or None")
        self._clip = (gradient_clip_algorithm, gradient_clip_val)
        self.strategy = _strategy(strategy, accelerator, devices)
        self.precision: Precision = make_precision(precision, self.strategy.device)
        self.callbacks = _callbacks(callbacks, max_time, enable_progress_bar, enable_checkpointing)
        self.loggers = _loggers(logger, self.default_root_dir)
        self.results = Results()
        self.progress = Progress()
        self.should_stop = False
        self.sanity_checking = False
        self.is_fitting = False
        self.last_loss: Tensor | None = None
        self.schedulers: list[SchedulerSetup] = []
        self._deterministic = deterministic
        self._seed = seed
        self._module: TrainModule | None = None
        self._optimizer: Optimizer | None = None
        self._resumed_rng: dict[str, Any] | None = None

    # --- what runs ---

    def fit(
        self,
        model: TrainModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: str | Path | None = None,
    ) -> None:
        """Train ``model``.

        Args:
            train_dataloaders, val_dataloaders: iterables of batches, or in ``datamodule`` as Lightning names them.
            ckpt_path: a checkpoint to go on from; "last": the newest in the checkpoint folder, if there is one.

        Raises:
            NonFiniteLoss: the loss became NaN or infinite.
            CheckpointError: the checkpoint to go on from cannot be used.
        """
        train, val = _loaders(train_dataloaders, val_dataloaders, datamodule)
        with self._stage(model, "fit"):
            self._know_length(val)
            self._configure(model)
            self._resume(ckpt_path)
            self.call("on_fit_start")
            self._sanity_check(val)
            FitLoop(self, TrainLoader(train, self._order_seed()), val).run()
            self.call("on_fit_end")

    def validate(
        self, model: TrainModule, dataloaders: Any = None, datamodule: Any = None, ckpt_path: str | Path | None = None
    ) -> list[dict[str, float]]:
        """Run validation once; the metrics, in a list as Lightning returns them."""
        _, val = _loaders(None, dataloaders, datamodule, needs_train=False)
        with self._stage(model, "validate"):
            self._know_length(val)
            self.strategy.setup(self.precision.convert(model))
            if ckpt_path is not None:
                self.strategy.load_state_dict(checkpoint.load(ckpt_path)[0])
            return [validate(self, val, limit=self.limits.validation_batches, log=False)]

    def _stage(self, model: TrainModule, stage: str) -> _Stage:
        return _Stage(self, model, stage)

    def _configure(self, model: TrainModule) -> None:
        if self._deterministic:
            torch.use_deterministic_algorithms(True)
        self.should_stop = False
        model.configure_model()
        self.strategy.setup(self.precision.convert(model))
        self._optimizer, self.schedulers = understand(model.configure_optimizers())
        for logger in self.loggers:
            logger.log_hyperparams(model.hparams)

    def _sanity_check(self, val: Any) -> None:
        if val is None or not self.num_sanity_val_steps or self.progress.total_batches:
            return
        self.sanity_checking = True
        self.call("on_sanity_check_start")
        validate(self, val, limit=self.num_sanity_val_steps, log=False)
        self.results.callback_metrics.clear()
        self.call("on_sanity_check_end")
        self.sanity_checking = False

    def _know_length(self, val: Any) -> None:
        number = float(len(val)) if hasattr(val, "__len__") else float("inf")
        values = {name: getattr(self.limits, name) for name in self.limits.__dataclass_fields__}
        self.limits = Limits(**(values | {"num_val_batches": number}))

    def _order_seed(self) -> int:
        if self._seed is None:
            self._seed = torch.initial_seed() % 2**32
        return self._seed

    # --- what the loop asks for ---

    @property
    def module(self) -> TrainModule:
        if self._module is None:
            raise ConfigError("trainer.module", None, "a call of fit or validate")
        return self._module

    lightning_module = module

    @property
    def optimizer(self) -> Optimizer:
        if self._optimizer is None:
            raise ConfigError("trainer.optimizer", None, "a call of fit")
        return self._optimizer

    @property
    def global_step(self) -> int:
        """Optimizer steps so far."""
        return self.progress.global_step

    @property
    def current_epoch(self) -> int:
        return self.progress.epoch

    @property
    def callback_metrics(self) -> dict[str, float]:
        """The newest value of each metric."""
        return self.results.callback_metrics

    @property
    def logger(self) -> Logger | None:
        return self.loggers[0] if self.loggers else None

    @property
    def logs_this_step(self) -> bool:
        return self.global_step % self.log_every_n_steps == 0

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def call(self, hook: str, *args: Any) -> None:
        """Call a hook on the callbacks in their order, then on the module."""
        if hook not in HOOK_NAMES:
            raise ConfigError("hook", hook, "one of trainkit.hooks.HOOKS")
        for callback in self.callbacks:
            getattr(callback, hook)(self, self.module, *args)
        if hook in ON_MODULE:
            getattr(self.module, hook)(*args)

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        if metrics:
            for logger in self.loggers:
                logger.log_metrics(metrics, self.global_step)

    def clip_gradients(self) -> None:
        algorithm, limit = self._clip
        if limit is not None:
            by_norm = algorithm == "norm"
            self.strategy.clip_gradients(max_norm=limit if by_norm else None, max_value=None if by_norm else limit)

    def step_schedulers(self, event: str, count: int) -> None:
        """Let the schedulers of ``event`` (step, epoch, validation) make their step."""
        for setup in self.schedulers:
            if setup.waits_for_metric:
                if event == "validation" and setup.monitor in self.callback_metrics:
                    setup.scheduler.step(self.callback_metrics[setup.monitor])
            elif setup.interval == event and count % setup.frequency == 0:
                setup.scheduler.step()

    # --- checkpoints ---

    def save_checkpoint(self, filepath: str | Path) -> None:
        """Write everything that a resumed run needs to ``filepath``, a folder that appears whole or not at all.

        Raises:
            CheckpointWriteError: it could not be written; what stood there is whole.
        """
        state: dict[str, Any] = {
            "global_step": self.global_step,
            "progress": self.progress.to_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedulers": [_plain(setup.scheduler.state_dict()) for setup in self.schedulers],
            "precision": self.precision.state_dict(),
            "callbacks": {callback.state_key: callback.state_dict() for callback in self.callbacks},
            "loggers": [logger.state_dict() for logger in self.loggers],
            "results": self.results.state_dict(),
            "hparams": _plain(self.module.hparams),
            "order_seed": self._order_seed(),
            "rng": rng_state(),
        }
        self.call("on_save_checkpoint", state)
        checkpoint.save(filepath, self.strategy.state_dict(), state)

    def _resume(self, ckpt_path: str | Path | None) -> None:
        if ckpt_path is None:
            return
        path: Path | None = Path(ckpt_path)
        if str(ckpt_path) == "last":
            path = checkpoint.find_last(self.checkpoint_dir)
        if path is None:
            return
        weights, state = checkpoint.load(path)
        self.strategy.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer._opt_called = bool(state["global_step"])  # type: ignore[attr-defined] # what schedulers look at
        if len(state["schedulers"]) != len(self.schedulers):
            raise CheckpointIncomplete("schedulers", len(state["schedulers"]), f"{len(self.schedulers)}, as configured")
        for setup, saved in zip(self.schedulers, state["schedulers"], strict=True):
            setup.scheduler.load_state_dict(saved)
        self.precision.load_state_dict(state["precision"])
        for callback in self.callbacks:
            if callback.state_key in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][callback.state_key])
        for logger, saved in zip(self.loggers, state["loggers"], strict=False):
            logger.resume(saved)
        self.results.load_state_dict(state["results"])
        self.progress = Progress.resumed(state["progress"])
        self._seed = state["order_seed"]
        self._resumed_rng = state["rng"]
        self.call("on_load_checkpoint", state)

    @property
    def checkpoint_dir(self) -> Path:
        """Where the first ModelCheckpoint writes."""
        for callback in self.callbacks:
            if isinstance(callback, ModelCheckpoint):
                return callback.folder(self)
        return self.default_root_dir / "checkpoints"

    def take_rng_state(self) -> dict[str, Any] | None:
        """The generators' state of the checkpoint that was resumed from, once."""
        state, self._resumed_rng = self._resumed_rng, None
        return state


class _Stage:
    """The frame of fit and validate: setup before, teardown after, and a clean end when something is raised."""

    def __init__(self, trainer: Trainer, model: TrainModule, stage: str) -> None:
        self._trainer, self._model, self._stage = trainer, model, stage

    def __enter__(self) -> None:
        self._trainer._module = self._model
        self._model.trainer = self._trainer
        self._trainer.is_fitting = self._stage == "fit"
        self._trainer.call("setup", self._stage)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: Any) -> None:
        try:
            if error is not None:
                self._trainer.call("on_exception", error)
        finally:
            for logger in self._trainer.loggers:
                logger.flush()
            self._trainer.call("teardown", self._stage)
            self._trainer.is_fitting = False


def _at_least(name: str, value: int, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(name, value, f"{low} or more")
    return value


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """What of a state can be written: functions, which the user's code makes again, are left out."""
    kinds = (bool, int, float, str, list, tuple, dict, Tensor, type(None))
    return {key: value for key, value in state.items() if isinstance(value, kinds)}


def _strategy(strategy: str | Strategy, accelerator: str, devices: str | int) -> Strategy:
    if isinstance(strategy, Strategy):
        return strategy
    if strategy not in ("auto", "single", "single_device"):
        raise ConfigError("strategy", strategy, "auto, single, or a Strategy")
    if devices not in ("auto", 1, "1"):
        raise ConfigError("devices", devices, "1 or auto: one device in this version")
    return SingleDevice(choose_device(accelerator))


def _callbacks(
    given: Sequence[Callback] | Callback | None, max_time: Any, progress_bar: bool, checkpointing: bool
) -> list[Callback]:
    callbacks = [given] if isinstance(given, Callback) else list(given or [])
    if max_time is not None:
        callbacks.append(Timer(max_time))
    if progress_bar and not any(isinstance(callback, ProgressBar) for callback in callbacks):
        callbacks.append(ProgressBar())
    if checkpointing and not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        callbacks.append(ModelCheckpoint())
    keys = [callback.state_key for callback in callbacks]
    for key in keys:
        if keys.count(key) > 1 and not isinstance(callbacks[keys.index(key)], ProgressBar):
            raise ConfigError("callbacks", f"two with the state_key {key}", "a state_key of its own for each")
    return sorted(callbacks, key=lambda callback: isinstance(callback, ModelCheckpoint))


def _loggers(given: bool | Logger | Sequence[Logger], root: Path) -> list[Logger]:
    if isinstance(given, bool):
        return [CSVLogger(root)] if given else []
    return [given] if isinstance(given, Logger) else list(given)


def _loaders(train: Any, val: Any, datamodule: Any, *, needs_train: bool = True) -> tuple[Any, Any]:
    if datamodule is not None:
        for name in ("prepare_data", "setup"):
            method = getattr(datamodule, name, None)
            if method is not None:
                method(*(("fit",) if name == "setup" else ()))
        train = datamodule.train_dataloader() if needs_train else None
        val = datamodule.val_dataloader() if hasattr(datamodule, "val_dataloader") else None
    if (train if needs_train else val) is None:
        raise ConfigError("train_dataloaders" if needs_train else "dataloaders", None, "batches, or a datamodule")
    return train, val
