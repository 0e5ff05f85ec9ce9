"""The Trainer: what a run consists of, wired together. The work is in the loops, the strategy and the precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from common_platform.errors import ConfigError
from trainkit import checkpoint, resuming, run_state
from trainkit.arguments import (
    at_least,
    callbacks_from,
    in_order,
    limits_from,
    loggers_from,
    plugins_from,
    refuse,
    without_keepers,
)
from trainkit.callbacks.base import Callback
from trainkit.callbacks.early_stopping import EarlyStopping
from trainkit.callbacks.model_checkpoint import ModelCheckpoint
from trainkit.callbacks.model_summary import ModelSummary
from trainkit.callbacks.prediction_writer import BasePredictionWriter
from trainkit.callbacks.progress import ProgressBar
from trainkit.data.combined import CombinedLoader, resumable
from trainkit.data.loaders import check_not_empty, num_batches_of
from trainkit.data.module import DataModule
from trainkit.data.resumable import Resumable
from trainkit.data.seed import rng_state, set_rng_state
from trainkit.data_source import LOADER_OF, DataSource
from trainkit.durations import Duration
from trainkit.hooks import HookCaller, Method, is_written
from trainkit.interruption import Interruption
from trainkit.loggers import Logger
from trainkit.loop.evaluate import PREDICTION, TEST, VALIDATION, Evaluation, evaluate, inference
from trainkit.loop.fit import FitLoop, Progress
from trainkit.loop.optimization import parameters_of
from trainkit.loop.results import Results
from trainkit.module import TrainModule
from trainkit.optimizers import ManagedOptimizer, SchedulerSetup, understand
from trainkit.profilers import Profiler, make_profiler
from trainkit.profilers.attach import attach_to_loop, profiled, profiled_hook
from trainkit.signals import heeding
from trainkit.stage import Stage
from trainkit.strategies import Strategy, make_strategy
from trainkit.table import print_metrics


class Trainer:
    """Trains a ``TrainModule``. The arguments are Lightning's.

    Args:
        accelerator: "auto", "cpu", "cuda" (or "gpu"), "xpu", "mps".
        strategy: "auto", "single", "ddp", or a ``Strategy``.
        devices: how many, which ones, or "auto".
        precision: one of ``trainkit.precision.PRECISIONS``; default "32-true".
        logger: True or None for CSV, False for none, a ``Logger`` or several.
        callbacks: in the order in which they are called; those that keep checkpoints come last. A name stands for a
            callback with its defaults, ``{"name": ..., argument: ...}`` for one with arguments.
        fast_dev_run: this many batches of everything, without loggers and checkpoints, to see whether it runs.
        max_epochs: default 1000, or no limit where ``max_steps`` or ``max_time`` is given. -1: no limit.
        max_steps: optimizer steps. -1: no limit.
        min_epochs, min_steps: a wish to stop is not heard before.
        max_time: a ``timedelta``, "DD:HH:MM:SS", "HH:MM:SS" or keyword arguments of ``timedelta``.
        limit_train_batches, limit_val_batches, limit_test_batches, limit_predict_batches: a number, or a share.
        overfit_batches: train on the same few batches, a number or a share.
        val_check_interval: a number of batches, a share of an epoch, or a time, written as ``max_time`` is.
        check_val_every_n_epoch: epochs between validations; None: only ``val_check_interval`` counts.
        num_sanity_val_steps: validation batches before training, to find errors early; -1: all.
        log_every_n_steps: optimizer steps between rows of the log.
        accumulate_grad_batches: micro-batches to one optimizer step, averaged exactly.
        gradient_clip_val, gradient_clip_algorithm: by "norm" or by "value".
        deterministic: True, or "warn": only deterministic algorithms.
        benchmark: let cuDNN look for the fastest algorithms.
        inference_mode: evaluate in torch's inference mode; False: without gradients only.
        use_distributed_sampler: split the loaders' samples over ranks.
        profiler: "simple", "advanced", "pytorch", or a ``Profiler``: where the time goes.
        detect_anomaly: find the operation that made a gradient NaN; slow.
        barebones: nothing beside the loop: no loggers, checkpoints, progress, sanity check.
        sync_batchnorm: batch norms count the batches of all ranks; on one rank there is nothing to do.
        reload_dataloaders_every_n_epochs: ask for the loaders anew every so many epochs; 0: once.
        plugins: a ``Precision``, in place of ``precision``; a ``CheckpointIO``, such as ``AsyncCheckpointIO``.
        default_root_dir: where checkpoints and logs go; default: ``runs`` here.
        enable_autolog_hparams: whether loggers are told of the module's hyperparameters.
        max_skipped: batches in a row that may be skipped, or lost to overflowing gradients, before it is an error.
        prefetch_to_device: read one batch ahead and move it while the one before it is computed with; default: where
            worker processes read and the device can do both at once.

    Raises:
        ConfigError: an argument is out of its range, or not supported; it is named.
        DeviceError: a device that was asked for is not there.
    """

    def __init__(
        self,
        *,
        accelerator: str = "auto",
        strategy: str | Strategy = "auto",
        devices: list[int] | str | int = "auto",
        num_nodes: int = 1,
        precision: str | int | None = None,
        logger: bool | Logger | Iterable[Logger] | None = None,
        callbacks: Sequence[Callback | str | Mapping[str, Any]] | Callback | None = None,
        fast_dev_run: bool | int = False,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: Duration | None = None,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: int | float | Duration | None = None,
        check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int | None = None,
        log_every_n_steps: int | None = None,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = None,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
        deterministic: bool | str | None = None,
        benchmark: bool | None = None,
        inference_mode: bool = True,
        use_distributed_sampler: bool = True,
        profiler: Profiler | str | None = None,
        detect_anomaly: bool = False,
        barebones: bool = False,
        plugins: Any = None,
        sync_batchnorm: bool = False,
        reload_dataloaders_every_n_epochs: int = 0,
        default_root_dir: str | Path | None = None,
        enable_autolog_hparams: bool = True,
        model_registry: str | None = None,
        max_skipped: int = 100,
        prefetch_to_device: bool | None = None,
    ) -> None:
        refuse(
            {
                "model_registry": (model_registry, None, "there is none"),
                "num_nodes": (num_nodes, 1, "start the nodes with torchrun"),
            }
        )
        quiet = barebones or bool(fast_dev_run)
        self.limits = limits_from(
            max_epochs=max_epochs,
            min_epochs=min_epochs,
            max_steps=max_steps,
            min_steps=min_steps,
            max_time=max_time,
            fast_dev_run=fast_dev_run,
            batches={
                "limit_train_batches": limit_train_batches,
                "limit_val_batches": limit_val_batches,
                "limit_test_batches": limit_test_batches,
                "limit_predict_batches": limit_predict_batches,
                "overfit_batches": overfit_batches,
            },
            val_check_interval=val_check_interval,
            check_val_every_n_epoch=check_val_every_n_epoch,
        )
        self.default_root_dir = Path(default_root_dir or Path.cwd() / "runs")
        self.accumulate_grad_batches = at_least("accumulate_grad_batches", accumulate_grad_batches, 1)
        self.log_every_n_steps = at_least(
            "log_every_n_steps", 50 if log_every_n_steps is None else log_every_n_steps, 0
        )
        sanity = 2 if num_sanity_val_steps is None else at_least("num_sanity_val_steps", num_sanity_val_steps, -1)
        self.num_sanity_val_steps = 0 if quiet else sanity
        self.max_skipped = at_least("max_skipped", max_skipped, 1)
        self.prefetch_to_device = prefetch_to_device
        self.reload_dataloaders_every_n_epochs = at_least(
            "reload_dataloaders_every_n_epochs", reload_dataloaders_every_n_epochs, 0
        )
        self.gradient_clip_val, self.gradient_clip_algorithm = _clipping(gradient_clip_val, gradient_clip_algorithm)
        self.strategy = make_strategy(strategy, accelerator, devices)
        self.strategy.syncs_batchnorm |= sync_batchnorm
        self.precision_plugin, self.checkpoint_io = plugins_from(precision, plugins, self.strategy.device)
        self.callbacks = callbacks_from(
            without_keepers(callbacks) if quiet else callbacks,
            max_time=max_time,
            progress_bar=enable_progress_bar is not False and not barebones,
            checkpointing=enable_checkpointing is not False and not quiet,
        )
        if enable_model_summary and not any(isinstance(one, ModelSummary) for one in self.callbacks):
            self.callbacks.insert(0, ModelSummary())
        self.loggers = [] if quiet else loggers_from(logger, self.default_root_dir)
        self.fast_dev_run = fast_dev_run
        self.barebones = barebones
        self.results = Results(self.strategy)
        self.progress = Progress()
        self.should_stop = False
        self.sanity_checking = False
        self.received_sigterm = False
        self.interruption: Interruption | None = None
        self.last_loss: Tensor | None = None
        self.optimizers: list[Optimizer] = []
        self.managed_optimizers: list[ManagedOptimizer] = []
        self.schedulers: list[SchedulerSetup] = []
        self.datamodule: DataModule | None = None
        self.ckpt_path: str | Path | None = None
        self.evaluation_metrics: dict[str, float] = {}
        self.predictions: list[list[Any]] = []
        self.fit_loop: FitLoop | None = None
        self._deterministic, self._benchmark, self._detect_anomaly = deterministic, benchmark, detect_anomaly
        self._inference_mode, self._use_distributed_sampler = inference_mode, use_distributed_sampler
        self._log_hparams = enable_autolog_hparams
        self._stage: str | None = None
        self._module: TrainModule | None = None
        self._hooks: HookCaller | None = None
        self._data: DataSource | None = None
        self._modes: dict[Any, bool] = {}
        self._resumed: dict[str, Any] = {}
        self._overflows = 0  # steps in a row that were skipped
        self.own_callbacks = self.callbacks  # without those of a module
        self.is_nested = False  # a short run in the middle of another Trainer's
        self.profiler = make_profiler(profiler)

    # --- what runs ---

    def fit(
        self,
        model: TrainModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train ``model``.

        Args:
            train_dataloaders, val_dataloaders: iterables of batches; else those of ``datamodule``, else the module's.
            ckpt_path: a checkpoint to go on from; "last": the newest in the checkpoint folder, if there is one;
                "last-valid": the newest that is not damaged.

        Raises:
            NonFiniteLoss: the loss became NaN or infinite.
            CheckpointError: the checkpoint to go on from cannot be used.
            UserCodeError: a hook, a step or a loader raised; its exception is the cause.
        """
        given = {"fit": train_dataloaders, "validate": val_dataloaders}
        with Stage(self, model, "fit", given, datamodule):
            state = self._load(ckpt_path)
            self._configure(model, state)
            self.call("on_fit_start")
            self.call_last("on_fit_start")
            if state is not None:
                run_state.load_after_setup(self, state)
            self._sanity_check()
            self.fit_loop = self._fit_loop()
            self.interruption = Interruption(self)
            with (
                torch.autograd.set_detect_anomaly(self._detect_anomaly),
                self.stage("train"),
                heeding(self.interruption.hear),
            ):
                self.fit_loop.run()
            self.call("on_fit_end")
            self.call_last("on_fit_end")

    def validate(
        self,
        model: TrainModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Run validation once.

        Args:
            model: default: the one that was trained last.
            ckpt_path: weights to use instead of the model's: a path, "best" or "last".
            verbose: print the metrics.

        Returns:
            The metrics of each loader.
        """
        return self._evaluate(VALIDATION, model, dataloaders, ckpt_path, verbose, datamodule)

    def test(
        self,
        model: TrainModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Run ``test_step`` over the test batches once; the arguments are those of ``validate``."""
        return self._evaluate(TEST, model, dataloaders, ckpt_path, verbose, datamodule)

    def predict(
        self,
        model: TrainModule | None = None,
        dataloaders: Any = None,
        datamodule: DataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> list[Any] | None:
        """Run ``predict_step`` over the batches once.

        Args:
            return_predictions: default True; False where a callback writes them.

        Returns:
            What the steps returned; a list a loader where there are several.
        """
        keep = return_predictions is not False
        with self._evaluation(PREDICTION, model, dataloaders, ckpt_path, datamodule) as loaders:
            writers = [one for one in self.callbacks if isinstance(one, BasePredictionWriter)]
            kept = keep or any(writer.on_epoch for writer in writers)
            found = evaluate(self, PREDICTION, loaders, keep_outputs=kept)
        return None if not keep else found[0] if len(found) == 1 else found

    def _evaluate(
        self, kind: Evaluation, model: Any, dataloaders: Any, ckpt_path: Any, verbose: bool, datamodule: Any
    ) -> list[dict[str, float]]:
        with self._evaluation(kind, model, dataloaders, ckpt_path, datamodule) as loaders:
            evaluate(self, kind, loaders)
        found = _by_loader(self.evaluation_metrics, self.results.loader_of, len(loaders))
        if verbose and self.is_global_zero:
            print_metrics(kind.stage, found)
        return found

    @contextlib.contextmanager
    def _evaluation(
        self, kind: Evaluation, model: Any, dataloaders: Any, ckpt_path: Any, datamodule: Any
    ) -> Iterator[list[Any]]:
        model = self._module if model is None else model
        if model is None:
            raise ConfigError("model", None, f"a module, or a call of fit before {kind.stage}")
        if not is_written(model, TrainModule, kind.step) and kind.logs:
            raise ConfigError("model", f"{type(model).__name__} without {kind.step}", f"one with a {kind.step} method")
        with Stage(self, model, kind.stage, {kind.stage: dataloaders}, datamodule):
            state = self._load(ckpt_path)
            if state is not None:
                self.load_weights(state["state_dict"])
            self.strategy.setup(self.precision_plugin.convert(model), trains=False)
            loaders = self.loaders(kind.stage)
            if not loaders:
                raise ConfigError("dataloaders", None, f"batches, or a {LOADER_OF[kind.stage]}_dataloader method")
            yield loaders

    def _configure(self, model: TrainModule, state: dict[str, Any] | None) -> None:
        if self._deterministic:
            torch.use_deterministic_algorithms(True, warn_only=self._deterministic == "warn")
        if self._benchmark is not None:
            torch.backends.cudnn.benchmark = self._benchmark
        if not is_written(model, TrainModule, "training_step"):
            raise ConfigError("model", f"{type(model).__name__} without training_step", "one with such a method")
        self.should_stop = False
        if state is not None:
            run_state.load_before_setup(self, state)
        self.strategy.setup(self.precision_plugin.convert(model), trains=True)
        self._configure_optimizers(model)
        if self._log_hparams:
            for logger in self.loggers:
                logger.log_hyperparams(model.hparams)

    def _configure_optimizers(self, model: TrainModule) -> None:
        try:
            configured = model.configure_optimizers()
        except ValueError as error:
            raise _of_optimizer(error) from error
        self.optimizers, self.schedulers = understand(configured)
        make_step = self.profiled(self.make_step, "optimizer_step")
        self.managed_optimizers = [ManagedOptimizer(one, make_step, model) for one in self.optimizers]
        trained = [p for one in self.optimizers for p in parameters_of(one)]
        if not any(p.requires_grad for p in trained):
            raise ConfigError("optimizer", f"no trainable parameters of {len(trained)}", "requires_grad on some")

    def _sanity_check(self) -> None:
        if not self.num_sanity_val_steps or not self._validates() or self.progress.batch:
            return
        before = rng_state()
        self.sanity_checking = True
        self.call("on_sanity_check_start")
        loaders = self.loaders("validate")
        if loaders:
            at_most = None if self.num_sanity_val_steps == -1 else self.num_sanity_val_steps
            metrics = dict(self.results.callback_metrics)
            evaluate(self, VALIDATION, loaders, at_most=at_most)
            self.results.clear()
            self.results.callback_metrics.update(metrics)
        self.call("on_sanity_check_end")
        self.sanity_checking = False
        set_rng_state(before)

    def _fit_loop(self) -> FitLoop:
        loop = FitLoop(self, self.train_batches(), self.validation_loaders())
        attach_to_loop(loop, self.profiler)
        loop.feed.load_state_dict(self._resumed.pop("loader", {}))
        if "fit" in self._resumed:
            loop.load_state_dict(self._resumed.pop("fit"))
        return loop

    def train_batches(self) -> Resumable:
        """The training batches.

        Raises:
            ConfigError: there are none.
        """
        loaders = self.loaders("fit")
        if len(loaders) != 1:
            raise ConfigError(
                "train_dataloaders", f"{len(loaders)} loaders", "one: batches, or a train_dataloader method"
            )
        check_not_empty(loaders[0], "train")
        return resumable(loaders[0])

    def validation_loaders(self) -> list[Any]:
        """Those of validation inside fit; none where it does not validate."""
        return self.loaders("validate") if self._validates() else []

    def _validates(self) -> bool:
        return is_written(self.module, TrainModule, "validation_step") and self.limits.limit_val_batches > 0

    # --- loaders and batches ---

    def loaders(self, stage: str) -> list[Any]:
        """The loaders of ``stage``, this rank's part of each; asked for once a run."""
        return self.data.loaders(stage)

    def batch_indices(self, loader: int) -> list[list[int]] | None:
        """The places in the dataset of the samples of each batch that was predicted, where they are known."""
        return getattr(getattr(self.loaders("predict")[loader], "batch_sampler", None), "seen", None)

    def move(self, batch: Any, loader: int) -> Any:
        """``batch`` on the device and in the dtype of forward."""
        return self.profiled(self.data.mover(), "batch_to_device")(batch, loader)

    # --- what the loops ask for ---

    def call(self, hook: str, *args: Any, **named: Any) -> Any:
        """Call a hook on the callbacks in their order, then on the module; what the module's returned."""
        call = self.hook(hook)
        return None if call is None else call(*args, **named)

    def call_last(self, hook: str, *args: Any, **named: Any) -> None:
        """Call a hook on the callbacks that keep checkpoints, when everything else is done."""
        call = self.hook_last(hook)
        if call is not None:
            call(*args, **named)

    def hook(self, name: str) -> Method | None:
        """What ``call`` calls, for those who call it often; None where nobody wrote the hook."""
        return profiled_hook(self.profiler, self.hooks.bound(name), name)

    def hook_last(self, name: str) -> Method | None:
        """What ``call_last`` calls; None where no callback that keeps checkpoints wrote the hook."""
        return profiled_hook(self.profiler, self.hooks.bound_last(name), f"checkpoints.{name}")

    def profiled(self, function: Method, action: str) -> Method:
        """``function`` itself, or in a run with a profiler what times it."""
        return profiled(self.profiler, function, action)

    def call_each(self, hook: str, *args: Any, **named: Any) -> list[Exception]:
        """Call a hook on all, whoever raises; what was raised."""
        return self.hooks.call_each(hook, *args, **named)

    @property
    def hooks(self) -> HookCaller:
        """The hooks that somebody wrote, looked up once a stage."""
        if self._hooks is None:
            bases = (Callback, TrainModule)
            step = lambda: self.progress.global_step  # noqa: E731
            self._hooks = HookCaller(self, self.module, self.callbacks, bases=bases, step=step)
        return self._hooks

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients of ``loss`` in manual optimization, with the hooks around it."""
        self.profiled(self._backward, "backward")(loss, *args, **kwargs)

    def _backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.fit_loop is not None:
            self.fit_loop.optimization.watch(loss.detach())
        loss = self.precision_plugin.scaled(loss)
        self.call("on_before_backward", loss)
        self.module.backward(loss, *args, **kwargs)
        self.strategy.after_manual_backward()
        self.call("on_after_backward")

    def make_step(self, optimizer: Optimizer, closure: Any, **kwargs: Any) -> None:
        """One step of ``optimizer``, as precision makes it; ``closure`` computes gradients that are not there yet."""
        stepped = self.precision_plugin.step(optimizer, closure or _nothing, self._before_step, **kwargs)
        self.progress.global_step += 1
        self._overflows = 0 if stepped else self._overflows + 1
        if self._overflows >= self.max_skipped:
            self.precision_plugin.refuse_overflow(self._overflows, self.global_step)

    def _before_step(self, optimizer: Optimizer) -> None:
        if self.fit_loop is not None:
            self.fit_loop.optimization.before_step(optimizer)
        else:  # a step before training, in a hook of the user's
            self.call("on_before_optimizer_step", optimizer)

    def clip_gradients(self, optimizer: Optimizer, value: float | None, algorithm: str | None) -> None:
        value = self.gradient_clip_val if value is None else value
        algorithm = algorithm or self.gradient_clip_algorithm or "norm"
        if algorithm not in ("norm", "value"):
            raise ConfigError("gradient_clip_algorithm", algorithm, "'norm' or 'value'")
        if value:
            by_norm = algorithm == "norm"
            self.strategy.clip_gradients(
                parameters_of(optimizer), max_norm=value if by_norm else None, max_value=None if by_norm else value
            )

    def step_schedulers(self, interval: str, count: int, *, plateau: bool = False) -> None:
        """Let the schedulers of ``interval`` ("step" or "epoch") make their step, but not those of manual optimization.

        Args:
            count: batches of the epoch, or epochs, that are done.
            plateau: those that are given a metric, or the others.
        """
        if not self.schedulers or not self.module.automatic_optimization:
            return
        for setup in self.schedulers:
            is_due = setup.interval == interval and setup.reduce_on_plateau == plateau and count % setup.frequency == 0
            if is_due and not (self._overflows and interval == "step"):
                self._step_scheduler(setup)

    def _step_scheduler(self, setup: SchedulerSetup) -> None:
        metric = None
        if setup.reduce_on_plateau:
            metric = self.callback_metrics.get(str(setup.monitor))
            if metric is None and setup.strict:
                known = sorted(self.callback_metrics)
                raise ConfigError("lr_scheduler.monitor", setup.monitor, f"a logged metric: {known}")
            if metric is None:
                return
        self.module.lr_scheduler_step(setup.scheduler, metric)

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Give the loggers a row, on the first rank only."""
        if metrics and self.is_global_zero:
            row = {"epoch": self.current_epoch, **metrics}
            for logger in self.loggers:
                logger.log_metrics(row, self.log_step)

    @property
    def log_step(self) -> int:
        """What rows of the log are numbered by: optimizer steps from 0 on."""
        return self.progress.log_step if self._stage == "fit" else self.progress.steps_logged

    @property
    def logs_this_step(self) -> bool:
        every = self.log_every_n_steps
        return bool(every) and (self.progress.log_step + 1) % every == 0

    def agree_to_stop(self) -> None:
        """All ranks stop where one wants to."""
        if self.world_size > 1:
            wish = torch.tensor(float(self.should_stop))
            self.should_stop = bool(self.strategy.reduce(wish, "max") > 0)

    def without_gradients(self) -> Any:
        return inference(self._inference_mode and self.precision_plugin.allows_inference_mode)

    def keep_modes(self) -> None:
        """Remember which layers are in train mode."""
        self._modes = {layer: layer.training for layer in self.module.modules()}

    def restore_modes(self) -> None:
        """Put every layer back in the mode it had before the evaluation."""
        for layer, training in self._modes.items():
            layer.training = training

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What the Trainer is doing, for ``training``, ``validating`` and the like."""
        before, self._doing = self._doing, name
        try:
            yield
        finally:
            self._doing = before

    _doing: str | None = None

    # --- what users look at ---

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
    def world_size(self) -> int:
        return self.strategy.world_size

    @property
    def global_rank(self) -> int:
        return self.strategy.rank

    @property
    def local_rank(self) -> int:
        return self.strategy.local_rank

    @property
    def node_rank(self) -> int:
        return self.strategy.node_rank

    @property
    def num_nodes(self) -> int:
        return self.strategy.num_nodes

    @property
    def num_devices(self) -> int:
        return max(self.world_size // self.num_nodes, 1)

    @property
    def is_global_zero(self) -> bool:
        return self.strategy.is_first

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
    def num_training_batches(self) -> float:
        """Of an epoch; infinite where the loader does not tell."""
        loaders = self.loaders("fit")
        return self.limits.of("fit", num_batches_of(loaders[0])) if loaders else 0

    @property
    def num_val_batches(self) -> list[float]:
        return self.num_batches_of("validate")

    def num_batches_of(self, stage: str) -> list[float]:
        """Of each loader of ``stage``; infinite where one does not tell."""
        return [self.limits.of(stage, num_batches_of(one)) for one in self.loaders(stage)]

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
        loaders = self._data.known("validate") if self._data is not None else None
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

    # --- checkpoints ---

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any = None
    ) -> None:
        """Write everything that a resumed run needs to ``filepath``, a folder that appears whole or not at all.

        Every rank must call it.

        Args:
            weights_only: only what ``load_from_checkpoint`` needs.

        Raises:
            CheckpointWriteError: it could not be written; what stood there is whole.
        """
        refuse({"storage_options": (storage_options, None, "checkpoints are folders on a file system")})
        self.profiled(self._save, "save_checkpoint")(filepath, bool(weights_only))

    def _save(self, filepath: str | Path, weights_only: bool) -> None:
        if self.fit_loop is not None:
            self.fit_loop.optimization.look()
        state = run_state.dump(self, weights_only=weights_only)
        problem: Exception | None = None
        if self.is_global_zero:
            try:
                self.checkpoint_io.save(filepath, state.pop("state_dict"), state)
            except Exception as error:  # noqa: BLE001 - raised again below, once the other ranks know
                problem = error
        if self.world_size > 1 and not self.strategy.broadcast_plain(problem is None) and problem is None:
            raise ConfigError("checkpoint", "not written by the first rank", "see its error")
        if problem is not None:
            raise problem

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a checkpoint, when those that were saved after it are whole; the first rank does."""
        if self.is_global_zero:
            self.checkpoint_io.remove(filepath)

    def _load(self, ckpt_path: str | Path | None) -> dict[str, Any] | None:
        """What is in the checkpoint that ``ckpt_path`` means, if there is one."""
        self.ckpt_path, state = resuming.find(self, ckpt_path)
        return state

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        checkpoint.load_weights(self.module, state, strict=self.module.strict_loading)

    @property
    def checkpoint_dir(self) -> Path:
        """Where the first ModelCheckpoint writes."""
        keeper = self.checkpoint_callback
        return keeper.folder(self) if keeper is not None else self.default_root_dir / "checkpoints"

    def fit_state(self) -> dict[str, Any]:
        return self.fit_loop.state_dict() if self.fit_loop is not None else {}

    def loader_state(self) -> dict[str, Any]:
        if self.fit_loop is None:
            return {}
        return self.fit_loop.feed.state_dict()

    def resume_from(self, **state: Any) -> None:
        """What is put back when the loop begins: the generators, the loader's position, a group's gradients."""
        self._resumed = state

    def take_rng_state(self) -> dict[str, Any] | None:
        """The generators' state of the checkpoint that was resumed from, once."""
        return self._resumed.pop("rng", None)

    # --- called by Stage ---

    def enter_stage(self, model: TrainModule, stage: str, given: dict[str, Any], datamodule: DataModule | None) -> None:
        first = next(iter(given))
        if isinstance(given[first], DataModule):
            datamodule, given = given[first], {}
        if not isinstance(model, TrainModule):
            raise ConfigError("model", type(model).__name__, "a TrainModule (LightningModule)")
        if datamodule is not None and not isinstance(datamodule, DataModule):
            raise ConfigError("datamodule", type(datamodule).__name__, "a DataModule (LightningDataModule)")
        if datamodule is not None and any(value is not None for value in given.values()):
            raise ConfigError("datamodule", "beside dataloaders", "either a data module or loaders")
        self._module, self.datamodule = model, datamodule
        model.trainer = self
        if datamodule is not None:
            datamodule.trainer = self
        self.results.clear()
        self._stage = stage
        self._doing = None if stage == "fit" else stage
        self._hooks = None
        own = [] if self.is_nested else model.configure_callbacks()
        self.callbacks = in_order(_with_module_callbacks(self.own_callbacks, own))
        self._data = DataSource(
            model,
            datamodule,
            given,
            strategy=self.strategy,
            precision=self.precision_plugin,
            splits=self._use_distributed_sampler,
            overfits=bool(self.limits.overfit_batches),
        )
        self.profiler.setup(stage, self.local_rank, self.log_dir)

    def leave_stage(self) -> None:
        self.profiler.teardown(self._stage)
        self.profiler.describe()
        if not self.is_nested:
            self.strategy.teardown()
        self._stage = self._doing = None
        self.sanity_checking = False


def _nothing() -> None:
    return None


def _of_optimizer(error: ValueError) -> ValueError:
    """What torch's optimizers complain of, in our words."""
    if "empty parameter list" in str(error):
        return ConfigError("optimizer", "0 parameters", "some to train: model.parameters()")
    if str(error).startswith("Invalid learning rate"):
        return ConfigError("lr", str(error).rpartition(" ")[2], "a finite number, 0 or more")
    return error


def _clipping(value: float | None, algorithm: str | None) -> tuple[float | None, str | None]:
    if algorithm not in (None, "norm", "value"):
        raise ConfigError("gradient_clip_algorithm", algorithm, "'norm' or 'value'")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
        raise ConfigError("gradient_clip_val", value, "a number, 0 or more, or None")
    return value, algorithm


def _with_module_callbacks(callbacks: list[Callback], own: Any) -> list[Callback]:
    """The module's callbacks take the place of the Trainer's of the same class."""
    added = [own] if isinstance(own, Callback) else list(own or [])
    kinds = {type(callback) for callback in added}
    return [callback for callback in callbacks if type(callback) not in kinds] + added


def _by_loader(metrics: dict[str, float], loader_of: dict[str, int], count: int) -> list[dict[str, float]]:
    """The metrics of each loader, and in each those that belong to none."""
    return [{n: v for n, v in metrics.items() if loader_of.get(n, number) == number} for number in range(count)]
