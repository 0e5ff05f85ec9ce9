"""torch's profiler: operators on all devices, and a trace that Chrome and Perfetto show."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function, schedule

from common_platform.errors import ConfigError, TrainingError
from trainkit.profilers.base import Profiler


class PyTorchProfiler(Profiler):
    """Records operators of the steps that ``schedule`` chooses, and writes their trace.

    Args:
        dirpath: where the report and the trace go; default: the logger's folder.
        filename: as ``Profiler``'s; the trace is written in any case.
        group_by_input_shapes: tell operators apart by the shapes of their inputs.
        export_to_chrome: write ``{stage}-trace-{rank}.json``.
        row_limit: operators in the report.
        sort_by_key: what they are sorted by, as ``torch.profiler``'s table has it.
        schedule: step number -> ``ProfilerAction``; default: the first is left out, the next warms up, three are kept.
        profiler_kwargs: further arguments of ``torch.profiler.profile``.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        group_by_input_shapes: bool = False,
        export_to_chrome: bool = True,
        row_limit: int = 20,
        sort_by_key: str | None = None,
        schedule: Callable[[int], ProfilerAction] | None = None,
        **profiler_kwargs: Any,
    ) -> None:
        super().__init__(dirpath, filename)
        if row_limit < 1:
            raise ConfigError("profiler.row_limit", row_limit, "1 or more")
        self.group_by_input_shapes, self.export_to_chrome = group_by_input_shapes, export_to_chrome
        self.row_limit, self.sort_by_key = row_limit, sort_by_key
        self._schedule = schedule
        self._settings = profiler_kwargs
        self.profiler: Any = None
        self.trace_path: Path | None = None
        self._table = ""
        self._open: dict[str, AbstractContextManager[Any]] = {}

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        super().setup(stage, local_rank, log_dir)
        chosen = self._schedule
        if chosen is None and stage == "fit":
            chosen = schedule(wait=1, warmup=1, active=3, repeat=1)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        settings: dict[str, Any] = {
            "activities": activities,
            "record_shapes": self.group_by_input_shapes,
        } | self._settings
        self._table = ""
        self.profiler = profile(schedule=chosen, on_trace_ready=self._keep, **settings)
        self.profiler.__enter__()

    def start(self, action_name: str) -> None:
        if self.profiler is not None:
            self._open[action_name] = record_function(action_name)
            self._open[action_name].__enter__()

    def stop(self, action_name: str) -> None:
        if self.profiler is None:
            return
        if action_name not in self._open:
            raise TrainingError("profiler.stop", action_name, "an action that was started")
        self._open.pop(action_name).__exit__(None, None, None)

    def step(self) -> None:
        if self.profiler is not None:
            self.profiler.step()

    def _keep(self, found: Any) -> None:
        if self.export_to_chrome:
            folder = self.dirpath or Path.cwd()
            folder.mkdir(parents=True, exist_ok=True)
            self.trace_path = folder / f"{self._stage}-trace-{self._rank}.json"
            found.export_chrome_trace(str(self.trace_path))
        averages = found.key_averages(group_by_input_shape=self.group_by_input_shapes)
        key = self.sort_by_key or f"{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total"
        self._table = averages.table(sort_by=key, row_limit=self.row_limit)

    def summary(self) -> str:
        return self._table

    def teardown(self, stage: str | None = None) -> None:
        if self.profiler is not None:
            for action in reversed(self._open.values()):
                action.__exit__(None, None, None)
            self._open.clear()
            self.profiler.__exit__(None, None, None)
            self.profiler = None
