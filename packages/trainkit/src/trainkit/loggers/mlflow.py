"""Metrics for MLflow, by default into a local store."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common_platform.errors import ResourceError
from trainkit.loggers.base import Logger
from trainkit.loggers.flat import flattened, prefixed

MAX_CHARS = 250  # of a parameter's value


class MLFlowLogger(Logger):
    """One run of an MLflow experiment.

    Args:
        experiment_name: made where there is none.
        run_name: shown in MLflow's pages.
        tracking_uri: a server or a store; default: ``MLFLOW_TRACKING_URI``, else ``save_dir``.
        tags: of the run.
        save_dir: the folder of a local store.
        prefix: in front of each metric's name, with a "-" between.
        artifact_location: of a new experiment.
        run_id: of a run to go on with.

    Raises:
        ResourceError: mlflow is not installed.
    """

    def __init__(
        self,
        experiment_name: str = "trainkit",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: Mapping[str, Any] | None = None,
        save_dir: str | Path = "mlruns",
        prefix: str = "",
        artifact_location: str | None = None,
        run_id: str | None = None,
    ) -> None:
        if find_spec("mlflow") is None:
            raise ResourceError("MLFlowLogger", "mlflow", "installed: pip install 'trainkit[mlflow]'")
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or Path(save_dir).absolute().as_uri()
        self._uri, self._experiment_name, self._run_name = uri, experiment_name, run_name
        self._tags, self._prefix, self._artifacts = dict(tags or {}), prefix, artifact_location
        self._run_id = run_id
        self._client: Any = None

    @property
    def experiment(self) -> Any:
        """The ``MlflowClient``; the run is made when it is first needed."""
        if self._client is None:
            if self._uri.startswith("file:"):  # mlflow 3 asks whether a plain folder is meant
                os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            self._client = import_module("mlflow.tracking").MlflowClient(tracking_uri=self._uri)
            if self._run_id is None:
                self._run_id = self._new_run()
        return self._client

    def _new_run(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment_name)
        number = (
            found.experiment_id
            if found is not None
            else self._client.create_experiment(self._experiment_name, artifact_location=self._artifacts)
        )
        run = self._client.create_run(number, run_name=self._run_name, tags=self._tags)
        return str(run.info.run_id)

    @property
    def run_id(self) -> str:
        """Of the run, which is made if there is none."""
        _ = self.experiment
        return str(self._run_id)

    @property
    def name(self) -> str | None:
        return self._experiment_name

    @property
    def version(self) -> int | str | None:
        return self._run_id

    def state_dict(self) -> dict[str, Any]:
        return {"run_id": self._run_id}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on in the same run; a step that is logged again has both values there, the newer one shown."""
        self._run_id = state.get("run_id") or self._run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        entity = import_module("mlflow.entities").Metric
        now = int(time.time() * 1000)
        found = [entity(key=n, value=float(v), timestamp=now, step=step) for n, v in prefixed(metrics, self._prefix)]
        client, run = self.experiment, self.run_id
        client.log_batch(run_id=run, metrics=found)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        entity = import_module("mlflow.entities").Param
        found = [entity(key=name, value=str(value)[:MAX_CHARS]) for name, value in flattened(params).items()]
        known = self.experiment.get_run(self.run_id).data.params
        new = [one for one in found if one.key not in known]  # parameters of a run never change
        self.experiment.log_batch(run_id=self.run_id, params=new)

    def finalize(self, status: str) -> None:
        if self._client is not None:
            self._client.set_terminated(self.run_id, "FINISHED" if status == "success" else "FAILED")
