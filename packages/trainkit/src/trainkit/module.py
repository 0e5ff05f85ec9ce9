"""The user's model, and how it is trained."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common_platform.errors import TrainingError
from trainkit import checkpoint
from trainkit.data.hooks import DataHooks
from trainkit.hparams import HyperParameters
from trainkit.move import to_device

if TYPE_CHECKING:
    from trainkit.optimizers import ManagedOptimizer
    from trainkit.trainer import Trainer


class TrainModule(HyperParameters, DataHooks, nn.Module):
    """A model with its training, validation, test and prediction steps.

    Override ``training_step`` and ``configure_optimizers``; everything else is optional. The hooks of
    ``trainkit.hooks`` are methods that do nothing here, or what is usual.
    """

    __jit_unused_properties__ = (  # TorchScript compiles every other property
        "trainer", "current_epoch", "global_step", "global_rank", "local_rank", "device", "dtype", "logger", "loggers",
        "example_input", "hparams", "hparams_initial",
    )  # fmt: skip

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = True
        self.strict_loading = True
        if not hasattr(type(self), "example_input_array"):
            self.example_input_array: Any = None  # what exporters trace with: a tensor, tuple or dict
        self._trainer: Trainer | None = None
        self._is_exported = False  # exporters look at every property

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_trainer": None}  # a copy belongs to no Trainer

    # --- what the user writes ---

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor | Mapping[str, Any] | None:
        """One micro-batch: ``training_step(self, batch, batch_idx)``.

        Returns:
            The loss, a scalar tensor with a gradient; or ``{"loss": loss, "weight": w, ...}`` where ``loss`` is a mean
            over ``w`` items (tokens, say), so that accumulated batches are averaged by items; or None to skip it.
        """
        raise self._unwritten("training_step")

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """One validation batch, ``validation_step(self, batch, batch_idx, dataloader_idx=0)``; log what it finds."""
        raise self._unwritten("validation_step")

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """One batch of ``Trainer.test``, with the arguments of ``validation_step``."""
        raise self._unwritten("test_step")

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """One batch of ``Trainer.predict``; the default calls the module on it."""
        return self(kwargs.get("batch", args[0] if args else None))

    def configure_optimizers(self) -> Any:
        """An optimizer; several; ``([optimizers], [schedulers])``; or ``{"optimizer": ..., "lr_scheduler": ...}`` where
        the scheduler may be ``{"scheduler": s, "interval": "step" | "epoch", "frequency": 1, "monitor": "val_loss"}``.
        """
        raise self._unwritten("configure_optimizers")

    def configure_model(self) -> None:
        """Make layers that are too large to be made twice; called before they are needed, maybe more than once."""

    def configure_callbacks(self) -> Any:
        """Callbacks of the module's own: they take the place of the Trainer's of the same class."""
        return []

    # --- hooks that do something unless they are overridden ---

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients; ``loss`` is already scaled for accumulation and precision."""
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Make a step. ``optimizer_closure`` runs the forward and the backward pass; pass it on to the optimizer."""
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        optimizer.zero_grad()

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def on_validation_model_zero_grad(self) -> None:
        self.zero_grad()

    def on_validation_model_eval(self) -> None:
        self.eval()

    def on_validation_model_train(self) -> None:
        self.trainer.restore_modes()

    def on_test_model_eval(self) -> None:
        self.eval()

    def on_test_model_train(self) -> None:
        self.trainer.restore_modes()

    def on_predict_model_eval(self) -> None:
        self.eval()

    def on_predict_model_train(self) -> None:
        self.trainer.restore_modes()

    # --- what the user calls ---

    @property
    def trainer(self) -> Trainer:
        """The Trainer that runs this module.

        Raises:
            TrainingError: none does.
        """
        if self._trainer is None and not self._is_exported:
            raise TrainingError("trainer", "none", "a call of Trainer.fit or Trainer.validate", code="no_trainer")
        return self._trainer  # type: ignore[return-value]

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        self._trainer = trainer

    @property
    def current_epoch(self) -> int:
        return self._trainer.current_epoch if self._trainer else 0

    @property
    def global_step(self) -> int:
        """Optimizer steps so far."""
        return self._trainer.global_step if self._trainer else 0

    @property
    def global_rank(self) -> int:
        return self._trainer.global_rank if self._trainer else 0

    @property
    def local_rank(self) -> int:
        return self._trainer.local_rank if self._trainer else 0

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.parameters()), torch.get_default_dtype())

    @property
    def logger(self) -> Any:
        return self._trainer.logger if self._trainer else None

    @property
    def loggers(self) -> list[Any]:
        return self._trainer.loggers if self._trainer else []

    @property
    def example_input(self) -> Any:
        """The same as ``example_input_array``."""
        return self.example_input_array

    @example_input.setter
    def example_input(self, value: Any) -> None:
        self.example_input_array = value

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the first rank only."""
        if self.global_rank == 0:
            print(*args, **kwargs)

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any | None = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
        *,
        weight: float | None = None,
    ) -> None:
        """Log a number.

        Args:
            value: a float, a tensor with one element, or a metric of torchmetrics.
            prog_bar: show it in the progress bar.
            logger: send it to the loggers; the default.
            on_step: as it is; the default inside a training batch.
            on_epoch: its mean over the epoch or the evaluation; the default everywhere else.
            reduce_fx: "mean", "sum", "min" or "max": how an epoch's values become one.
            sync_dist: also reduce the values of single steps over ranks. Those of epochs always are.
            add_dataloader_idx: tell several loaders apart in the name.
            batch_size: what a mean is weighted by; the default is found in the batch.
            rank_zero_only: only the first rank logs it, so it is not reduced over ranks.
            weight: as ``batch_size``, of any unit, such as a number of tokens.
        """
        if enable_graph or sync_dist_group is not None:
            raise TrainingError(f"log({name!r})", "enable_graph or sync_dist_group", "neither: not supported here")
        if self._trainer is None:
            warnings.warn(f"log({name!r}) outside of a Trainer does nothing", stacklevel=2)
            return
        given = weight if weight is not None else batch_size
        self._trainer.results.log(
            name, value, given, prog_bar, logger is not False, on_step, on_epoch, reduce_fx, sync_dist,
            add_dataloader_idx, rank_zero_only,
        )  # fmt: skip

    def log_dict(
        self,
        dictionary: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any | None = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        rank_zero_only: bool = False,
        *,
        weight: float | None = None,
    ) -> None:
        """Log each of ``dictionary``, a mapping or a collection of metrics, as ``log`` does."""
        for name, value in dictionary.items():
            self.log(
                name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist, sync_dist_group,
                add_dataloader_idx, batch_size, rank_zero_only=rank_zero_only, weight=weight,
            )  # fmt: skip

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The optimizer, or a list where there are several; ``use_pl_optimizer=False`` gives torch's own objects."""
        managed = self.trainer.managed_optimizers
        found: Sequence[Any] = managed if use_pl_optimizer else [one.optimizer for one in managed]
        return found[0] if len(found) == 1 else list(found)

    def lr_schedulers(self) -> Any:
        """The scheduler, a list where there are several, None where there is none."""
        found = [setup.scheduler for setup in self.trainer.schedulers]
        return None if not found else found[0] if len(found) == 1 else found

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients in manual optimization, scaled and averaged over ranks as precision and strategy need.

        Raises:
            TrainingError: ``automatic_optimization`` is on.
        """
        if self.automatic_optimization:
            raise TrainingError("manual_backward", "automatic optimization", "self.automatic_optimization = False")
        self.trainer.stepping.backward(loss, *args, **kwargs)

    def clip_gradients(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients of ``optimizer`` by "norm" (the default) or by "value"; without a value, nothing."""
        self.trainer.stepping.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def toggle_optimizer(self, optimizer: Optimizer | ManagedOptimizer) -> None:
        """Only the parameters of ``optimizer`` need gradients, until ``untoggle_optimizer``."""
        self._needed_gradients: dict[Tensor, bool] = {}
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for other in self.optimizers(use_pl_optimizer=False) if len(self.trainer.optimizers) > 1 else []:
            for parameter in (p for group in other.param_groups for p in group["params"]):
                if id(parameter) not in mine and parameter not in self._needed_gradients:
                    self._needed_gradients[parameter] = parameter.requires_grad
                    parameter.requires_grad = False

    def untoggle_optimizer(self, optimizer: Optimizer | ManagedOptimizer) -> None:
        """Undo ``toggle_optimizer``."""
        for parameter, needed in getattr(self, "_needed_gradients", {}).items():
            parameter.requires_grad = needed
        self._needed_gradients = {}

    @contextmanager
    def toggled_optimizer(self, optimizer: Optimizer | ManagedOptimizer) -> Iterator[None]:
        """``toggle_optimizer`` for a ``with`` block."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def all_gather(self, data: Any, group: Any | None = None, sync_grads: bool = False) -> Any:
        """Tensors of all ranks: each ``[...]`` becomes ``[ranks, ...]`` where there are several."""
        if group is not None or sync_grads:
            raise TrainingError("all_gather", "group or sync_grads", "neither: not supported here")
        return self.trainer.strategy.all_gather(data)

    def freeze(self) -> Self:
        """No parameter needs a gradient; eval mode."""
        for parameter in self.parameters():
            parameter.requires_grad = False
        return self.eval()

    def unfreeze(self) -> Self:
        """Every parameter needs a gradient; train mode."""
        for parameter in self.parameters():
            parameter.requires_grad = True
        return self.train()

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """A module made with the arguments in the checkpoint, changed by ``kwargs``, and with its weights.

        Args:
            checkpoint_path: a checkpoint of this library, or a ``.ckpt`` file of Lightning, which is read without
                running any code in it.

        Raises:
            CheckpointError: it cannot be used.
            ArtifactRefused: a ``.ckpt`` file that holds more than tensors and plain values.
        """
        if hparams_file is not None or weights_only is False:
            raise TrainingError("load_from_checkpoint", "hparams_file or weights_only=False", "neither: keyword "
                                "arguments for what the checkpoint lacks")  # fmt: skip
        state = checkpoint.load_any(checkpoint_path)
        known = inspect.signature(cls.__init__).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
        saved = {n: v for n, v in state.get("hyper_parameters", {}).items() if takes_all or n in known}
        module = cls(**(saved | kwargs))
        module.hparams.update(state.get("hyper_parameters", {}) | {n: v for n, v in kwargs.items() if n in saved})
        module.configure_model()
        module.on_load_checkpoint(state)
        checkpoint.load_weights(module, state["state_dict"], strict=module.strict_loading if strict is None else strict)
        return module if map_location is None else module.to(map_location)

    @torch.no_grad()
    def to_onnx(self, file_path: str | Path, input_sample: Any | None = None, **kwargs: Any) -> None:
        """Write ``forward`` as an ONNX file; it is run by onnxruntime and compared with the module before it counts.

        Raises:
            ExportError: it cannot be exported, or gives other numbers.
            ResourceError: onnx or onnxruntime is not installed.
        """
        from trainkit.export.onnx import export_onnx  # an optional library stands behind it

        export_onnx(self, file_path, self._sample(input_sample), **kwargs)

    @torch.no_grad()
    def to_torchscript(
        self,
        file_path: str | Path | None = None,
        method: str | None = "script",
        example_inputs: Any | None = None,
        **kwargs: Any,
    ) -> Any:
        """``forward`` as TorchScript, by "script" or "trace"; a file is read back and compared with the module.

        Raises:
            ExportError: it cannot be exported, or gives other numbers.
        """
        from trainkit.export.torchscript import export_torchscript  # only needed here

        sample = self.example_input_array if example_inputs is None else example_inputs
        return export_torchscript(self, file_path, method or "script", sample, **kwargs)

    def _sample(self, given: Any | None) -> Any:
        sample = self.example_input_array if given is None else given
        if sample is None:
            raise TrainingError("input_sample", None, "an input of forward, here or as self.example_input_array")
        return to_device(sample, self.device)

    # --- hooks that do nothing, see trainkit.hooks ---

    def setup(self, stage: str) -> None: ...
    def teardown(self, stage: str) -> None: ...
    def on_fit_start(self) -> None: ...
    def on_fit_end(self) -> None: ...
    def on_train_start(self) -> None: ...
    def on_train_end(self) -> None: ...
    def on_train_epoch_start(self) -> None: ...
    def on_train_epoch_end(self) -> None: ...
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None: ...
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...
    def on_before_backward(self, loss: Tensor) -> None: ...
    def on_after_backward(self) -> None: ...
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None: ...
    def on_before_zero_grad(self, optimizer: Optimizer) -> None: ...
    def on_validation_start(self) -> None: ...
    def on_validation_end(self) -> None: ...
    def on_validation_epoch_start(self) -> None: ...
    def on_validation_epoch_end(self) -> None: ...
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_test_start(self) -> None: ...
    def on_test_end(self) -> None: ...
    def on_test_epoch_start(self) -> None: ...
    def on_test_epoch_end(self) -> None: ...
    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_predict_start(self) -> None: ...
    def on_predict_end(self) -> None: ...
    def on_predict_epoch_start(self) -> None: ...
    def on_predict_epoch_end(self) -> None: ...
    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...
