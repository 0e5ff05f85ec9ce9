"""Where a run's batches come from: what a method of the Trainer was given, the data module, or the module itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common_platform.errors import ConfigError
from trainkit.data.combined import CombinedLoader, are_loaders, leaves
from trainkit.data.loaders import for_rank, remembering, unshuffled
from trainkit.data.module import DataModule
from trainkit.hooks import is_written
from trainkit.module import TrainModule
from trainkit.move import to_device
from trainkit.precision import Precision
from trainkit.strategies import Strategy

LOADER_OF = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}
TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class DataSource:
    """The loaders of one call of fit, validate, test or predict, and how their batches reach the device.

    Args:
        given: the loaders of each stage that the method was given.
        splits: whether loaders are split over ranks.
        overfits: whether training reads the same few batches each epoch.
    """

    def __init__(
        self,
        module: TrainModule,
        datamodule: DataModule | None,
        given: dict[str, Any],
        *,
        strategy: Strategy,
        precision: Precision,
        splits: bool,
        overfits: bool,
    ) -> None:
        self._module, self._datamodule, self._given = module, datamodule, given
        self._strategy, self._precision = strategy, precision
        self._splits, self._overfits = splits, overfits
        self._loaders: dict[str, list[Any]] = {}
        self._transfers = self._find_transfers()  # three hooks, or none

    def loaders(self, stage: str) -> list[Any]:
        """The loaders of ``stage``, this rank's part of each; asked for once. Training has one, or none."""
        if stage not in self._loaders:
            found = self._find(stage)
            made = [] if found is None else _in_training(found) if stage == "fit" else _in_evaluation(found, stage)
            self._loaders[stage] = [self._prepared(loader, stage) for loader in made]
        return self._loaders[stage]

    def known(self, stage: str) -> list[Any] | None:
        """The loaders of ``stage``, if they were asked for."""
        return self._loaders.get(stage)

    def forget(self, stage: str) -> None:
        """Let the loaders of ``stage`` be asked for again."""
        self._loaders.pop(stage, None)

    def given_to_fit(self) -> dict[str, Any]:
        """The arguments for another fit over the same data."""
        given = {"train_dataloaders": self._given.get("fit"), "val_dataloaders": self._given.get("validate")}
        return {n: v for n, v in {**given, "datamodule": self._datamodule}.items() if v is not None}

    def _find(self, stage: str) -> Any:
        if self._given.get(stage) is not None:
            return self._given[stage]
        name = f"{LOADER_OF[stage]}_dataloader"
        try:
            if self._datamodule is not None and is_written(self._datamodule, DataModule, name):
                return getattr(self._datamodule, name)()
            if is_written(self._module, TrainModule, name):
                return getattr(self._module, name)()
        except ValueError as error:
            if not str(error).startswith("batch_size should be"):  # torch's own words
                raise
            raise ConfigError("batch_size", str(error).rpartition("=")[2], "a whole number, >= 1") from error
        return None

    def _prepared(self, loader: Any, stage: str) -> Any:
        if isinstance(loader, CombinedLoader):
            loader.flattened = [self._prepared(one, stage) for one in loader.flattened]
            return loader
        if self._overfits and stage == "fit":
            loader = unshuffled(loader)
        if self._splits:
            loader = for_rank(loader, self._strategy, training=stage == "fit")
        return remembering(loader) if stage == "predict" else loader

    def mover(self) -> Callable[[Any, int], Any]:
        """What brings a batch of a loader to the device and into the dtype of forward, by the hooks of the data module
        or the module where there are some.
        """
        device = self._strategy.device
        if self._transfers:
            return self._transfer
        if is_written(self._precision, Precision, "convert_input"):
            return lambda batch, loader: to_device(self._precision.convert_input(batch), device)
        return lambda batch, loader: to_device(batch, device)

    def _transfer(self, batch: Any, loader: int) -> Any:
        before, transfer, after = self._transfers
        batch = before(self._precision.convert_input(batch), loader)
        return after(transfer(batch, self._strategy.device, loader), loader)

    @property
    def has_transfer_hooks(self) -> bool:
        return bool(self._transfers)

    def _find_transfers(self) -> list[Any]:
        """The three hooks; none where nobody wrote one."""
        owners: list[tuple[Any, type]] = [(self._module, TrainModule)]
        if self._datamodule is not None:
            owners.insert(0, (self._datamodule, DataModule))
        found = [
            next((getattr(owner, name) for owner, base in owners if is_written(owner, base, name)), None)
            for name in TRANSFERS
        ]
        if not any(found):
            return []
        return [method or getattr(self._module, name) for method, name in zip(found, TRANSFERS, strict=True)]


def _in_training(found: Any) -> list[Any]:
    """One loader; several are read together until the longest is done."""
    if are_loaders(found):
        return [CombinedLoader(found, "max_size_cycle")]
    if isinstance(found, CombinedLoader):
        return [CombinedLoader(found.iterables, found.mode)]  # the user's own is not changed
    return [found]


def _in_evaluation(found: Any, stage: str) -> list[Any]:
    """Several loaders, one after the other, unless they are combined in another way."""
    if isinstance(found, CombinedLoader):
        if found.mode == "sequential":
            return leaves(found.iterables)
        if stage == "predict":
            raise ConfigError("CombinedLoader.mode", found.mode, "'sequential' for predictions")
        return [CombinedLoader(found.iterables, found.mode)]
    return leaves(found) if are_loaders(found) else [found]


def batches_of(loader: Any) -> Any:
    """An iterable of the batches alone."""
    return (batch for batch, _, _ in loader) if isinstance(loader, CombinedLoader) else loader
