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
