"""Metrics for Weights & Biases; offline, nothing leaves the machine."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common_platform.errors import ResourceError
from trainkit.loggers.base import Logger
from trainkit.loggers.flat import prefixed


class WandbLogger(Logger):
    """One run of Weights & Biases.

    Args:
        name: of the run, as it is shown.
        save_dir: where its files are kept.
        version, id: of a run to go on with.
        offline: keep everything here; ``wandb sync`` sends it later.
        dir: the same as ``save_dir``.
        project: that the run belongs to.
        prefix: in front of each metric's name, with a "-" between.
        experiment: a run that was made already.
        settings: of ``wandb.init``.

    Raises:
        ResourceError: wandb is not installed.
    """

    def __init__(
        self,
        name: str | None = None,
        save_dir: str | Path = ".",
        version: str | None = None,
        offline: bool = False,
        dir: str | Path | None = None,
        id: str | None = None,
        project: str = "trainkit",
        prefix: str = "",
        experiment: Any = None,
        **settings: Any,
    ) -> None:
        if experiment is None and find_spec("wandb") is None:
            raise ResourceError("WandbLogger", "wandb", "installed: pip install 'trainkit[wandb]'")
        self._folder = Path(dir or save_dir)
        self._project, self._prefix, self._id = project, prefix, version or id
        self._settings: dict[str, Any] = {
            "name": name,
            "mode": "offline" if offline else None,
            "resume": "allow",
            **settings,
        }
        self._run = experiment

    @property
    def experiment(self) -> Any:
        """The run, made when it is first needed."""
        if self._run is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            wandb = import_module("wandb")
            self._run = wandb.init(project=self._project, dir=str(self._folder), id=self._id, **self._settings)
            self._run.define_metric("*", step_metric="trainer/global_step")
            self._id = self._run.id
        return self._run

    @property
    def name(self) -> str | None:
        return self._project

    @property
    def version(self) -> int | str | None:
        return self._id

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._id}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on in the same run; W&B itself keeps the newer of two values of a step."""
        self._id = state.get("id") or self._id

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.experiment.log(dict(prefixed(metrics, self._prefix)) | {"trainer/global_step": step})

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        self.experiment.config.update(dict(params), allow_val_change=True)

    def finalize(self, status: str) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if status == "success" else 1)
            self._run = None
