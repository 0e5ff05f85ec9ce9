"""Where the data comes from, in one place."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from common_platform.errors import ConfigError
from trainkit import checkpoint
from trainkit.data.hooks import DataHooks
from trainkit.data.workers import suggested_num_workers
from trainkit.hparams import HyperParameters

if TYPE_CHECKING:
    from trainkit.trainer import Trainer


class DataModule(HyperParameters, DataHooks):
    """The loaders of a run and what must be done before they exist. Override what is needed."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None

    def setup(self, stage: str) -> None:
        """Called on every rank, before the loaders are asked for; ``stage`` is fit, validate, test or predict."""

    def teardown(self, stage: str) -> None:
        """Called when the stage is over."""

    def on_exception(self, exception: BaseException) -> None:
        """A stage was left by ``exception``."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    @classmethod
    def from_datasets(
        cls,
        train_dataset: Any = None,
        val_dataset: Any = None,
        test_dataset: Any = None,
        predict_dataset: Any = None,
        batch_size: int = 1,
        num_workers: int | str = 0,
        **settings: Any,
    ) -> Self:
        """A data module over datasets that are there already; ``settings`` are those of ``DataLoader``.

        Args:
            num_workers: worker processes of each loader; "auto": what ``suggested_num_workers`` says.

        Raises:
            ConfigError: ``batch_size`` is below 1.
        """
        if batch_size < 1:
            raise ConfigError("batch_size", batch_size, "1 or more")
        workers = suggested_num_workers() if num_workers == "auto" else num_workers
        module = cls()
        given = {"train": train_dataset, "val": val_dataset, "test": test_dataset, "predict": predict_dataset}
        for stage, dataset in given.items():
            if dataset is not None:
                makes = _LoaderOf(dataset, stage == "train", batch_size, int(workers), settings)
                setattr(module, f"{stage}_dataloader", makes)
        return module

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, map_location: Any = None, **kwargs: Any) -> Self:
        """A data module made with the arguments in the checkpoint, changed by ``kwargs``, in the state it had."""
        state = checkpoint.load_any(checkpoint_path)
        known = inspect.signature(cls.__init__).parameters
        saved = {n: v for n, v in state.get("datamodule_hyper_parameters", {}).items() if n in known}
        module = cls(**(saved | kwargs))
        if cls.__qualname__ in state:
            module.load_state_dict(state[cls.__qualname__])
        return module


class _LoaderOf:
    def __init__(
        self, dataset: Any, shuffle: bool, batch_size: int, num_workers: int, settings: dict[str, Any]
    ) -> None:
        is_endless = isinstance(dataset, torch.utils.data.IterableDataset)
        self._settings = settings | {"batch_size": batch_size, "num_workers": num_workers}
        self._dataset, self._shuffle = dataset, shuffle and not is_endless

    def __call__(self) -> Any:
        return torch.utils.data.DataLoader(self._dataset, shuffle=self._shuffle, **self._settings)
