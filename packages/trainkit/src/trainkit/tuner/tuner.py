"""The Tuner: short runs that find settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common_platform.errors import ConfigError
from trainkit.data.module import DataModule
from trainkit.data.workers import measured_num_workers
from trainkit.ranks import rank_zero_info
from trainkit.tuner import attributes
from trainkit.tuner.batch_size import scale_batch_size
from trainkit.tuner.lr_finder import LRFinder, lr_find

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer


class Tuner:
    """Finds settings of ``trainer``'s model by short runs, and puts them into the model or the data module.

    The runs leave no trace: weights, optimizers, random generators, loggers and checkpoints are as before.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def lr_find(
        self,
        model: TrainModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        dataloaders: Any = None,
        datamodule: DataModule | None = None,
        method: str = "fit",
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> LRFinder | None:
        """Train with a rate that rises from ``min_lr`` to ``max_lr`` and keep the loss at each.

        Args:
            num_training: steps.
            mode: "exponential" or "linear".
            early_stop_threshold: end when the loss is this many times the smallest; None: do not.
            update_attr: set the suggestion as ``attr_name``; default: as ``lr`` or ``learning_rate`` of the model, the
                data module or their ``hparams``.

        Returns:
            The curve; None with ``fast_dev_run``.
        """
        if method != "fit" or dataloaders is not None:
            raise ConfigError("lr_find.method", method, "'fit', and train_dataloaders")
        return lr_find(
            self._trainer,
            model,
            _given(train_dataloaders=train_dataloaders, datamodule=datamodule),
            min_lr=min_lr,
            max_lr=max_lr,
            num_training=num_training,
            mode=mode,
            early_stop_threshold=early_stop_threshold,
            update_attr=update_attr,
            attr_name=attr_name,
        )

    def scale_batch_size(
        self,
        model: TrainModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        dataloaders: Any = None,
        datamodule: DataModule | None = None,
        method: str = "fit",
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> int | None:
        """Find the largest batch that does not exhaust memory, and set it as ``batch_arg_name``.

        Args:
            method: "fit", "validate", "test" or "predict": what is tried.
            mode: "power": double until it does not fit; "binsearch": then look between the last two.
            steps_per_trial: batches of each run.
            init_val, max_val: the first size, and the largest that is tried.
            max_trials: runs.
            margin: share that is taken off what "binsearch" found.

        Returns:
            The size; None with ``fast_dev_run``.

        Raises:
            ConfigError: loaders are given, whose size cannot be changed, or nothing has ``batch_arg_name``.
        """
        if method not in ("fit", "validate", "test", "predict"):
            raise ConfigError("scale_batch_size.method", method, "'fit', 'validate', 'test' or 'predict'")
        given = _given(dataloaders=dataloaders, datamodule=datamodule)
        if method == "fit":
            loaders = {"train_dataloaders": train_dataloaders, "val_dataloaders": val_dataloaders}
            given = _given(**loaders, datamodule=datamodule)
        return scale_batch_size(
            self._trainer,
            model,
            given,
            method=method,
            mode=mode,
            steps_per_trial=steps_per_trial,
            init_val=init_val,
            max_trials=max_trials,
            batch_arg_name=batch_arg_name,
            margin=margin,
            max_val=max_val,
        )

    def scale_num_workers(
        self,
        model: TrainModule,
        datamodule: DataModule | None = None,
        candidates: list[int] | None = None,
        attr_name: str = "num_workers",
        seconds: float = 5.0,
    ) -> int:
        """Measure how many loader workers give training batches fastest, and set it as ``attr_name``.

        Args:
            candidates: default 0, 1, 2, 4 and so on up to the cores.
            seconds: of each measurement, at most.
        """
        source = datamodule if datamodule is not None else model
        owners = attributes.holders(attr_name, model, datamodule)
        if not owners:
            attributes.first_of((attr_name,), model, datamodule)
        source.prepare_data()
        if isinstance(source, DataModule):
            source.setup("fit")
        found, rates = measured_num_workers(source.train_dataloader(), candidates, seconds=seconds)
        for owner in owners:
            attributes.put(owner, attr_name, found)
        shown = ", ".join(f"{count}: {rate:.0f}/s" for count, rate in rates.items())
        rank_zero_info(f"{attr_name} is {found} now; batches by number of workers: {shown}")
        return found


def _given(**arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}
