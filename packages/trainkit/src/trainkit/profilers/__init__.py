"""Profilers: where a run's time goes. ``Trainer(profiler="simple")``, ``"advanced"`` or ``"pytorch"``."""

from __future__ import annotations

from common_platform.errors import ConfigError
from trainkit.profilers.advanced import AdvancedProfiler
from trainkit.profilers.base import PassThroughProfiler, Profiler
from trainkit.profilers.pytorch import PyTorchProfiler
from trainkit.profilers.simple import SimpleProfiler

NAMES: dict[str, type[Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}
__all__ = ["AdvancedProfiler", "PassThroughProfiler", "Profiler", "PyTorchProfiler", "SimpleProfiler", "make_profiler"]


def make_profiler(given: Profiler | str | None) -> Profiler:
    """The profiler that ``Trainer(profiler=...)`` means.

    Raises:
        ConfigError: an unknown name, or no profiler.
    """
    if given is None:
        return PassThroughProfiler()
    if isinstance(given, str) and given in NAMES:
        return NAMES[given]()
    if not isinstance(given, Profiler):
        raise ConfigError("profiler", given, f"None, a Profiler, or one of {tuple(NAMES)}")
    return given
