"""The user's model, and how it is trained."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common_platform.errors import TrainingError

if TYPE_CHECKING:
    from trainkit.trainer import Trainer


class TrainModule(nn.Module):
    """A model with its training and validation steps.

    Override ``training_step`` and ``configure_optimizers``; everything else is optional. The hooks of
    ``trainkit.hooks`` are methods that do nothing here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hparams: dict[str, Any] = {}
        self._trainer: Trainer | None = None

    # --- what the user writes ---

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | dict[str, Any] | None:
        """One micro-batch.

        Returns:
            The loss, a scalar tensor with a gradient; or ``{"loss": loss, "weight": w, ...}`` where ``loss`` is a mean
            over ``w`` items (tokens, say), so that accumulated batches are averaged by items; or None to skip it.
        """
        raise TrainingError("training_step", type(self).__name__, "a method of the module", code="user_code")

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        """One validation batch; log what should be averaged."""
        raise TrainingError("validation_step", type(self).__name__, "a method of the module", code="user_code")

    def configure_optimizers(self) -> Any:
        """An optimizer; ``([optimizer], [schedulers])``; or ``{"optimizer": ..., "lr_scheduler": ...}`` where the
        scheduler may be ``{"scheduler": s, "interval": "step" | "epoch", "frequency": 1, "monitor": "val_loss"}``.
        """
        raise TrainingError("configure_optimizers", type(self).__name__, "a method of the module", code="user_code")

    def configure_model(self) -> None:
        """Make layers that are too large to be made twice; called once before they are needed."""

    def optimizer_zero_grad(self, optimizer: Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)

    # --- what the user calls ---

    @property
    def trainer(self) -> Trainer:
        """The Trainer that runs this module.

        Raises:
            TrainingError: none does.
        """
        if self._trainer is None:
            raise TrainingError("trainer", "none", "a call of Trainer.fit or Trainer.validate", code="no_trainer")
        return self._trainer

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
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def log(
        self,
        name: str,
        value: Tensor | float,
        *,
        prog_bar: bool = False,
        logger: bool = True,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        batch_size: int | None = None,
        weight: float | None = None,
    ) -> None:
        """Log a number.

        Args:
            value: a float or a tensor with one element.
            prog_bar: show it in the progress bar.
            logger: send it to the loggers.
            on_step: as it is; the default in training.
            on_epoch: its mean over the epoch or the validation; the default in validation.
            weight: what the mean is weighted by, such as a number of tokens; ``batch_size`` is the same by
                Lightning's name. Default 1.
        """
        given = weight if weight is not None else batch_size
        self.trainer.results.log(
            name,
            value.detach() if isinstance(value, Tensor) else value,
            weight=1.0 if given is None else float(given),
            prog_bar=prog_bar,
            logger=logger,
            on_step=on_step,
            on_epoch=on_epoch,
        )

    def log_dict(self, metrics: dict[str, Tensor | float], **how: Any) -> None:
        for name, value in metrics.items():
            self.log(name, value, **how)

    def save_hyperparameters(self, *names: str) -> None:
        """Keep the arguments of the ``__init__`` that calls this, or those named, in ``hparams`` and in checkpoints."""
        frame = inspect.currentframe()
        caller = frame.f_back if frame else None
        if caller is None:
            raise TrainingError("save_hyperparameters", "no frame", "a call from __init__", code="user_code")
        code = caller.f_code
        arguments = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
        self.hparams.update({name: caller.f_locals[name] for name in names or arguments})

    def lr_schedulers(self) -> list[Any]:
        return [setup.scheduler for setup in self.trainer.schedulers]

    def optimizers(self) -> Optimizer:
        return self.trainer.optimizer

    # --- hooks, see trainkit.hooks ---

    def setup(self, stage: str) -> None: ...
    def teardown(self, stage: str) -> None: ...
    def on_fit_start(self) -> None: ...
    def on_fit_end(self) -> None: ...
    def on_train_start(self) -> None: ...
    def on_train_end(self) -> None: ...
    def on_train_epoch_start(self) -> None: ...
    def on_train_epoch_end(self) -> None: ...
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None: ...
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...
    def on_before_backward(self, loss: Tensor) -> None: ...
    def on_after_backward(self) -> None: ...
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None: ...
    def on_before_zero_grad(self, optimizer: Optimizer) -> None: ...
    def on_validation_start(self) -> None: ...
    def on_validation_end(self) -> None: ...
    def on_validation_epoch_start(self) -> None: ...
    def on_validation_epoch_end(self) -> None: ...
    def on_validation_batch_start(self, batch: Any, batch_idx: int) -> None: ...
    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...
