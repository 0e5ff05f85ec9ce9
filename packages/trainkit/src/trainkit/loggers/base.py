"""What the Trainer asks of a logger."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any


class Logger(ABC):
    """Receives metrics as they are logged."""

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_hyperparams(self, params: Mapping[str, Any]) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """Where the log stands, for checkpoints."""
        return {}

    def resume(self, state: Mapping[str, Any]) -> None:
        """The run goes on from ``state``: what was logged beyond it will be logged again."""

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Show the model's graph, where the service can."""

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """A ``ModelCheckpoint`` has saved: its paths and scores are up to date."""

    @property
    def experiment(self) -> Any:
        """What the metrics go to: the service's own object; here the logger itself."""
        return self

    @property
    def save_dir(self) -> str | None:
        """The folder above those of all runs."""
        return None

    @property
    def root_dir(self) -> str | None:
        """The folder of the experiment."""
        return self.save_dir

    @property
    def log_dir(self) -> str | None:
        """The folder of the run."""
        return self.save_dir

    @property
    def group_separator(self) -> str:
        """Between the parts of a metric's name."""
        return "/"

    @property
    def name(self) -> str | None:
        """Of the experiment."""
        return None

    @property
    def version(self) -> int | str | None:
        """Of the run."""
        return None

    def save(self) -> None:
        """Make what was logged safe."""

    def finalize(self, status: str) -> None:
        """A stage is over: "success" or "failed"."""
        self.save()
