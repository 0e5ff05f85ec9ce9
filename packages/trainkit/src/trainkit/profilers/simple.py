"""Wall time of each action."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from common_platform.errors import TrainingError
from trainkit.profilers.base import Profiler


class SimpleProfiler(Profiler):
    """Adds up the wall time of each action.

    Args:
        dirpath, filename: as ``Profiler``'s.
        extended: also the number of calls and the mean.
    """

    def __init__(self, dirpath: str | Path | None = None, filename: str | None = None, extended: bool = True) -> None:
        super().__init__(dirpath, filename)
        self.extended = extended
        self.current_actions: dict[str, float] = {}
        self.recorded_durations: dict[str, list[float]] = {}  # seconds
        self._since = time.monotonic()

    def start(self, action_name: str) -> None:
        if action_name in self.current_actions:
            raise TrainingError("profiler.start", action_name, "an action that is not under way")
        self.current_actions[action_name] = time.monotonic()

    def stop(self, action_name: str) -> None:
        began = self.current_actions.pop(action_name, None)
        if began is None:
            raise TrainingError("profiler.stop", action_name, "an action that was started")
        self.recorded_durations.setdefault(action_name, []).append(time.monotonic() - began)

    def summary(self) -> str:
        whole = time.monotonic() - self._since
        lines = ["action | calls | mean s | total s | share" if self.extended else "action | total s | share"]
        for name, taken in sorted(self.recorded_durations.items(), key=lambda one: -sum(one[1])):
            calls = f"{len(taken)} | {statistics.fmean(taken):.6f} | " if self.extended else ""
            lines.append(f"{name} | {calls}{sum(taken):.6f} | {sum(taken) / whole:.1%}")
        return "\n".join([*lines, f"whole | {whole:.6f} s"])

    def teardown(self, stage: str | None = None) -> None:
        self.current_actions.clear()  # what an exception left open
