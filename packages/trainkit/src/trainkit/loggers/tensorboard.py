"""Metrics for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common_platform.errors import ResourceError
from trainkit.loggers.folder import FolderLogger


class TensorBoardLogger(FolderLogger):
    """Event files in ``save_dir/name/version``, written by torch's ``SummaryWriter``.

    Args:
        save_dir, name, version: as ``CSVLogger``'s.
        prefix: in front of each metric's name, with a "-" between.
        settings: of ``SummaryWriter``.

    Raises:
        ResourceError: tensorboard is not installed.
    """

    def __init__(
        self,
        save_dir: str | Path,
        name: str | None = "logs",
        version: int | str | None = None,
        prefix: str = "",
        **settings: Any,
    ) -> None:
        if find_spec("tensorboard") is None:
            raise ResourceError("TensorBoardLogger", "tensorboard", "installed: pip install 'trainkit[tensorboard]'")
        super().__init__(save_dir, name, version, prefix)
        self._settings = settings
        self._writer: Any = None

    @property
    def experiment(self) -> Any:
        """The ``SummaryWriter``, made when it is first needed."""
        if self._writer is None:
            writer = import_module("torch.utils.tensorboard").SummaryWriter
            self._writer = writer(log_dir=str(self._folder), **self._settings)
        return self._writer

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in self._named(metrics).items():
            self.experiment.add_scalar(name, value, step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        if params:
            lines = "\n".join(f"- {name}: {value}" for name, value in params.items())
            self.experiment.add_text("hyperparameters", lines)

    def save(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def finalize(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
