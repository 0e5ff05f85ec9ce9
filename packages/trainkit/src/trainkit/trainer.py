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
    callbacks_from,
    limits_from,
    loggers_from,
    plugins_from,
    refuse,
    with_own,
    without_keepers,
)
from trainkit.callbacks.base import Callback
from trainkit.callbacks.prediction_writer import BasePredictionWriter
from trainkit.config import LoopConfig, TorchConfig
from trainkit.data.combined import resumable
from trainkit.data.loaders import check_not_empty
from trainkit.data.module import DataModule
from trainkit.data.resumable import Resumable
from trainkit.data.seed import rng_state, set_rng_state
from trainkit.data_source import LOADER_OF, DataSource
from trainkit.durations import Duration
from trainkit.hooks import HookCaller, Method, is_written
from trainkit.interruption import Interruption
from trainkit.loggers import Logger
from trainkit.loop.evaluate import PREDICTION, TEST, VALIDATION, Evaluation, by_loader, evaluate, inference
from trainkit.loop.fit import FitLoop, IteratorFitLoop, Progress
from trainkit.loop.iterator import takes_iterator
from trainkit.loop.optimization import parameters_of
from trainkit.loop.results import Results
from trainkit.loop.stepping import Stepping
from trainkit.module import TrainModule
from trainkit.optimizers import ManagedOptimizer, SchedulerSetup, in_our_words, understand
from trainkit.profilers import Profiler, make_profiler
from trainkit.profilers.attach import attach_to_loop, profiled, profiled_hook
from trainkit.run_facts import RunFacts
from trainkit.signals import heeding
from trainkit.stage import Stage, TrainerState
from trainkit.strategies import Strategy, make_strategy
from trainkit.table import print_metrics


class Trainer(RunFacts):
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
        loop = LoopConfig(
            accumulate_grad_batches=accumulate_grad_batches,
            log_every_n_steps=50 if log_every_n_steps is None else log_every_n_steps,
            num_sanity_val_steps=2 if num_sanity_val_steps is None else num_sanity_val_steps,
            reload_dataloaders_every_n_epochs=reload_dataloaders_every_n_epochs,
            max_skipped=max_skipped,
            gradient_clip_val=gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm,
        )
        self._follow(loop, sanity=not quiet)
        self._torch = TorchConfig(
            deterministic=deterministic,
            benchmark=benchmark,
            detect_anomaly=detect_anomaly,
            inference_mode=inference_mode,
        )
        self.default_root_dir = Path(default_root_dir or Path.cwd() / "runs")
        self.fast_dev_run, self.barebones = fast_dev_run, barebones
        self.prefetch_to_device = prefetch_to_device
        self._use_distributed_sampler, self.enable_autolog_hparams = use_distributed_sampler, enable_autolog_hparams
        self.strategy = make_strategy(strategy, accelerator, devices)
        self.strategy.syncs_batchnorm |= sync_batchnorm
        self.precision_plugin, self.checkpoint_io = plugins_from(precision, plugins, self.strategy.device)
        self.profiler = make_profiler(profiler)
        self.loggers = [] if quiet else loggers_from(logger, self.default_root_dir)
        self.callbacks = callbacks_from(
            without_keepers(callbacks) if quiet else callbacks,
            max_time=max_time,
            progress_bar=enable_progress_bar is not False and not barebones,
            checkpointing=enable_checkpointing is not False and not quiet,
            summary=bool(enable_model_summary),
        )
        self.own_callbacks = self.callbacks  # without those of a module
        self._begin_empty()

    def _follow(self, loop: LoopConfig, *, sanity: bool) -> None:
        """Take over ``loop`` as attributes, which callbacks and users may change."""
        self.accumulate_grad_batches = loop.accumulate_grad_batches
        self.log_every_n_steps = loop.log_every_n_steps
        self.num_sanity_val_steps = loop.num_sanity_val_steps if sanity else 0
        self.reload_dataloaders_every_n_epochs = loop.reload_dataloaders_every_n_epochs
        self.max_skipped = loop.max_skipped
        self.gradient_clip_val = loop.gradient_clip_val
        self.gradient_clip_algorithm = loop.gradient_clip_algorithm

    def _begin_empty(self) -> None:
        """What a run fills in."""
        self.state = TrainerState()
        self.results = Results(self.strategy)
        self.progress = Progress()
        self.stepping = Stepping(self)
        self.fit_loop: FitLoop | None = None
        self.interruption: Interruption | None = None
        self.datamodule: DataModule | None = None
        self.ckpt_path: str | Path | None = None
        self.optimizers: list[Optimizer] = []
        self.managed_optimizers: list[ManagedOptimizer] = []
        self.schedulers: list[SchedulerSetup] = []
        self.last_loss: Tensor | None = None
        self.evaluation_metrics: dict[str, float] = {}
        self.predictions: list[list[Any]] = []
        self.should_stop = self.sanity_checking = self.received_sigterm = False
        self.is_nested = False  # a short run in the middle of another Trainer's
        self._stage: str | None = None
        self._doing: str | None = None
        self._module: TrainModule | None = None
        self._hooks: HookCaller | None = None
        self._data: DataSource | None = None
        self._modes: dict[Any, bool] = {}
        self._resumed: dict[str, Any] = {}

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
                torch.autograd.set_detect_anomaly(self._torch.detect_anomaly),
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
        found = by_loader(self.evaluation_metrics, self.results.loader_of, len(loaders))
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
        self._torch.apply()
        if not is_written(model, TrainModule, "training_step"):
            raise ConfigError("model", f"{type(model).__name__} without training_step", "one with such a method")
        self.should_stop = False
        if state is not None:
            run_state.load_before_setup(self, state)
        self.strategy.setup(self.precision_plugin.convert(model), trains=True)
        self._configure_optimizers(model)
        if self.enable_autolog_hparams:
            for logger in self.loggers:
                logger.log_hyperparams(model.hparams)

    def _configure_optimizers(self, model: TrainModule) -> None:
        try:
            configured = model.configure_optimizers()
        except ValueError as error:
            raise in_our_words(error) from error
        self.optimizers, self.schedulers = understand(configured)
        make_step = self.profiled(self.stepping.make_step, "optimizer_step")
        self.managed_optimizers = [ManagedOptimizer(one, make_step, model) for one in self.optimizers]
        trained = [p for one in self.optimizers for p in parameters_of(one)]
        if not any(p.requires_grad for p in trained):
            raise ConfigError("optimizer", f"no trainable parameters of {len(trained)}", "requires_grad on some")

    def _sanity_check(self) -> None:
        if not self.num_sanity_val_steps or not self.enable_validation or self.progress.batch:
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
        kind = IteratorFitLoop if takes_iterator(self.module.training_step) else FitLoop
        loop = kind(self, self.train_batches(), self.validation_loaders())
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
        return self.loaders("validate") if self.enable_validation else []

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
        return inference(self._torch.inference_mode and self.precision_plugin.allows_inference_mode)

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
        self.profiled(run_state.save, "save_checkpoint")(self, filepath, weights_only=bool(weights_only))

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a checkpoint, when those that were saved after it are whole; the first rank does."""
        if self.is_global_zero:
            self.checkpoint_io.remove(filepath)

    def _load(self, ckpt_path: str | Path | None) -> dict[str, Any] | None:
        """What is in the checkpoint that ``ckpt_path`` means, if there is one."""
        self.ckpt_path, state = resuming.find(self, ckpt_path)
        if state is not None:
            run_state.check_layout(self, state)
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
        return self.fit_loop.feed.state_dict() if self.fit_loop is not None else {}

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
        self.callbacks = with_own(self.own_callbacks, own)
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
