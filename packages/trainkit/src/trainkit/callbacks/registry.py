"""Callbacks by name: ours, and those that installed packages bring."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import Any

from common_platform.errors import ConfigError
from trainkit.callbacks.base import Callback

GROUP = "trainkit.callbacks"  # entry points: name -> a class
FACTORIES = "trainkit.callbacks_factory"  # entry points: name -> a function that makes callbacks for every Trainer
BUILT_IN = {  # name -> where the class is; imported on first use
    "BackboneFinetuning": "trainkit.callbacks.finetuning:BackboneFinetuning",
    "BaseFinetuning": "trainkit.callbacks.finetuning:BaseFinetuning",
    "BasePredictionWriter": "trainkit.callbacks.prediction_writer:BasePredictionWriter",
    "BatchSizeFinder": "trainkit.tuner.callbacks:BatchSizeFinder",
    "Callback": "trainkit.callbacks.base:Callback",
    "Checkpoint": "trainkit.callbacks.base:Checkpoint",
    "DeviceStatsMonitor": "trainkit.callbacks.device_stats_monitor:DeviceStatsMonitor",
    "EMA": "trainkit.callbacks.weight_averaging:EMA",
    "EarlyStopping": "trainkit.callbacks.early_stopping:EarlyStopping",
    "GradNorm": "trainkit.callbacks.grad_norm:GradNorm",
    "GradientAccumulationScheduler": "trainkit.callbacks.gradient_accumulation_scheduler:GradientAccumulationScheduler",
    "LambdaCallback": "trainkit.callbacks.lambda_function:LambdaCallback",
    "LearningRateFinder": "trainkit.tuner.callbacks:LearningRateFinder",
    "LearningRateMonitor": "trainkit.callbacks.lr_monitor:LearningRateMonitor",
    "ModelCheckpoint": "trainkit.callbacks.model_checkpoint:ModelCheckpoint",
    "ModelSummary": "trainkit.callbacks.model_summary:ModelSummary",
    "OnExceptionCheckpoint": "trainkit.callbacks.on_exception_checkpoint:OnExceptionCheckpoint",
    "ProgressBar": "trainkit.callbacks.progress:ProgressBar",
    "RichModelSummary": "trainkit.callbacks.model_summary:RichModelSummary",
    "RichProgressBar": "trainkit.callbacks.progress:RichProgressBar",
    "SpikeDetection": "trainkit.callbacks.spike:SpikeDetection",
    "StochasticWeightAveraging": "trainkit.callbacks.weight_averaging:StochasticWeightAveraging",
    "TQDMProgressBar": "trainkit.callbacks.tqdm_progress:TQDMProgressBar",
    "ThroughputMonitor": "trainkit.callbacks.throughput_monitor:ThroughputMonitor",
    "Timer": "trainkit.callbacks.timer:Timer",
}


def callback_class(name: str) -> type[Callback]:
    """The class of that name.

    Raises:
        ConfigError: there is none.
    """
    plugins = {point.name: point.value for point in entry_points(group=GROUP)}
    known = plugins | BUILT_IN  # a plugin adds names, it never replaces ours
    if name not in known:
        raise ConfigError("callbacks", name, f"one of {', '.join(sorted(known))}, or a Callback")
    found: type[Callback] = resolve_name(known[name])
    return found


def make_callback(given: Callback | str | Mapping[str, Any]) -> Callback:
    """A callback from its name, or from ``{"name": ..., argument: ...}``; a callback as it is.

    Raises:
        ConfigError: it is none of these, or an argument is wrong.
    """
    if isinstance(given, Callback):
        return given
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, Mapping) or "name" not in given:
        raise ConfigError("callbacks", type(given).__name__, "a trainkit.Callback, a name, or {'name': ..., ...}")
    kind = callback_class(str(given["name"]))
    try:
        return kind(**{key: value for key, value in given.items() if key != "name"})
    except TypeError as error:
        raise ConfigError("callbacks", f"{kind.__name__}: {error}", "arguments that it has") from error


def from_factories() -> list[Callback]:
    """The callbacks that installed packages add to every Trainer.

    Raises:
        ConfigError: what one made is no callback.
    """
    made: list[Callback] = []
    for point in entry_points(group=FACTORIES):
        found = point.load()()
        made += [found] if isinstance(found, Callback) else list(found or [])
    for one in made:
        if not isinstance(one, Callback):
            raise ConfigError(FACTORIES, type(one).__name__, "functions that make callbacks")
    return made
