"""Metrics as a CSV file that any tool reads."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainkit.loggers.folder import FolderLogger


class CSVLogger(FolderLogger):
    """``metrics.csv`` in ``save_dir/name/version``: a row a call, a column a metric, ``step`` first.

    Args:
        save_dir: the folder above.
        name: of the experiment.
        version: of the run; None takes the next free ``version_N``, "" none.
        prefix: in front of each metric's name, with a "-" between.
        flush_logs_every_n_steps: rows kept in memory at the most.
    """

    def __init__(
        self,
        save_dir: str | Path,
        name: str | None = "logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 20,
    ) -> None:
        super().__init__(save_dir, name, version, prefix)
        self._flush_every = flush_logs_every_n_steps
        self._columns: list[str] = ["step"]
        self._rows: list[dict[str, Any]] = []
        self._written = False
        self._count = 0

    @property
    def _path(self) -> Path:
        return self._folder / "metrics.csv"

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "hparams.json").write_text(json.dumps(dict(params), indent=2, default=str) + "\n")

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._rows.append({"step": step, **self._named(metrics)})
        if len(self._rows) >= self._flush_every:
            self.save()

    def state_dict(self) -> dict[str, Any]:
        self.save()
        return {"rows": self._count}

    def resume(self, state: Mapping[str, Any]) -> None:
        self._rows = self._read()[: state["rows"]]
        self._count, self._written = 0, False
        self.save()

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open(newline="") as file:
            rows = [{k: v for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(file)]
        return [row for row in rows if str(row.get("step", "")).isdigit()]  # a row cut off by a kill has none

    def save(self) -> None:
        """Append, or write the file anew where a column has come."""
        if not self._rows:
            return
        new = [name for row in self._rows for name in row if name not in self._columns]
        if new or not self._written:
            self._columns += dict.fromkeys(new)
            self._rewrite([*(self._read() if self._written else []), *self._rows])
        else:
            with self._path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerows(self._rows)
        self._count += len(self._rows)
        self._rows = []
        self._written = True

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".csv.new")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self._path)
