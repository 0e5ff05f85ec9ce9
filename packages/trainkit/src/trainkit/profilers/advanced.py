"""Python's own profiler on each action: which functions the time is spent in."""

from __future__ import annotations

import cProfile
import io
import pstats
from pathlib import Path

from common_platform.errors import TrainingError
from trainkit.profilers.base import Profiler


class AdvancedProfiler(Profiler):
    """``cProfile`` on each action. Actions within others are counted to the outer one: one profiler runs at a time.

    Args:
        dirpath, filename: as ``Profiler``'s.
        line_count_restriction: lines of each action's report, a number or a share.
        dump_stats: also a ``.prof`` file of each action, where ``filename`` is given.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        line_count_restriction: float = 1.0,
        dump_stats: bool = False,
    ) -> None:
        super().__init__(dirpath, filename)
        self.line_count_restriction = line_count_restriction
        self.dump_stats = dump_stats
        self.profiled_actions: dict[str, cProfile.Profile] = {}
        self._open: list[str] = []

    def start(self, action_name: str) -> None:
        self._open.append(action_name)
        if len(self._open) == 1:
            self.profiled_actions.setdefault(action_name, cProfile.Profile()).enable()

    def stop(self, action_name: str) -> None:
        if action_name not in self._open:
            raise TrainingError("profiler.stop", action_name, "an action that was started")
        self._open.remove(action_name)
        if not self._open:
            self._disable()

    def _disable(self) -> None:
        for profile in self.profiled_actions.values():
            profile.disable()

    def summary(self) -> str:
        parts = []
        for name, profile in self.profiled_actions.items():
            text = io.StringIO()
            pstats.Stats(profile, stream=text).sort_stats("cumulative").print_stats(self.line_count_restriction)
            parts.append(f"{name}\n{text.getvalue().strip()}")
        return "\n\n".join(parts)

    def describe(self) -> None:
        super().describe()
        for number, (name, profile) in enumerate(self.profiled_actions.items()):
            path = self.path_of(f"{number}.prof") if self.dump_stats else None
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                profile.dump_stats(path)
                path.with_suffix(".name").write_text(name + "\n")

    def teardown(self, stage: str | None = None) -> None:
        self._open.clear()
        self._disable()
