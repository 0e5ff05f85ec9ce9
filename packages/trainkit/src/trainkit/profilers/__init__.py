"""Profilers: where a run's time goes. ``Trainer(profiler="simple")``, ``"advanced"`` or ``"pytorch"``."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from common_platform.errors import ConfigError
from trainkit.profilers.base import PassThroughProfiler, Profiler

if TYPE_CHECKING:
    from trainkit.profilers.advanced import AdvancedProfiler
    from trainkit.profilers.pytorch import PyTorchProfiler
    from trainkit.profilers.simple import SimpleProfiler

NAMES = {"simple": "SimpleProfiler", "advanced": "AdvancedProfiler", "pytorch": "PyTorchProfiler"}
BUILT_IN = {  # name -> where the class is; imported on first use
    name: f"trainkit.profilers.{module}:{name}" for module, name in NAMES.items()
}
__all__ = ["AdvancedProfiler", "PassThroughProfiler", "Profiler", "PyTorchProfiler", "SimpleProfiler", "make_profiler"]


def __getattr__(name: str) -> Any:
    """Profilers are imported when they are first used: most runs have none."""
    if name not in BUILT_IN:
        raise AttributeError(f"module 'trainkit.profilers' has no attribute {name!r}; there are {', '.join(__all__)}")
    return resolve_name(BUILT_IN[name])


def make_profiler(given: Profiler | str | None) -> Profiler:
    """The profiler that ``Trainer(profiler=...)`` means.

    Raises:
        ConfigError: an unknown name, or no profiler.
    """
    if given is None:
        return PassThroughProfiler()
    if isinstance(given, str) and given in NAMES:
        made: Profiler = __getattr__(NAMES[given])()
        return made
    if not isinstance(given, Profiler):
        raise ConfigError("profiler", given, f"None, a Profiler, or one of {tuple(NAMES)}")
    return given
