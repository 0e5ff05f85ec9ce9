"""The Trainer's arguments, each made into the part that it stands for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from common_platform.errors import ConfigError
from trainkit.callbacks.base import Callback, Checkpoint
from trainkit.callbacks.model_checkpoint import ModelCheckpoint
from trainkit.callbacks.model_summary import ModelSummary
from trainkit.callbacks.progress import ProgressBar
from trainkit.callbacks.registry import from_factories, make_callback
from trainkit.callbacks.timer import Timer
from trainkit.checkpoint import CheckpointIO
from trainkit.config import at_least
from trainkit.durations import seconds_of
from trainkit.limits import Limits
from trainkit.loggers import CSVLogger, Logger
from trainkit.precision import Precision, make_precision


def refuse(arguments: Mapping[str, tuple[Any, Any, str]]) -> None:
    """Arguments that this version knows by name only: (given, default, what to do instead).

    Raises:
        ConfigError: one is not its default.
    """
    for name, (given, default, instead) in arguments.items():
        if given != default:
            raise ConfigError(name, given, f"{default!r} in this version: {instead}")


def limits_from(
    *,
    max_epochs: int | None,
    min_epochs: int | None,
    max_steps: int,
    min_steps: int | None,
    max_time: Any,
    fast_dev_run: bool | int,
    batches: Mapping[str, int | float | None],
    val_check_interval: Any,
    check_val_every_n_epoch: int | None,
) -> Limits:
    """How long and how often, with Lightning's defaults: 1000 epochs where nothing else ends the run."""
    if max_epochs is None and not fast_dev_run:
        max_epochs = 1000 if max_steps == -1 and max_time is None else -1
    limits = {name: 1.0 if value is None else value for name, value in batches.items()}
    limits["overfit_batches"] = batches["overfit_batches"] or 0.0
    if isinstance(val_check_interval, str | timedelta | Mapping):
        val_check_interval = timedelta(seconds=seconds_of("val_check_interval", val_check_interval))
    interval = 1.0 if val_check_interval is None else val_check_interval
    if fast_dev_run:
        number = at_least("fast_dev_run", int(fast_dev_run), 1)
        limits = dict.fromkeys(limits, number) | {"overfit_batches": 0.0}
        max_epochs, max_steps, interval, check_val_every_n_epoch = 1, number, 1.0, 1
        min_epochs = min_steps = None
    return Limits(
        max_epochs=max_epochs,
        min_epochs=min_epochs or 0,
        max_steps=max_steps,
        min_steps=min_steps or 0,
        val_check_interval=interval,
        check_val_every_n_epoch=check_val_every_n_epoch,
        **limits,
    )


def callbacks_from(
    given: Sequence[Callback | str | Mapping[str, Any]] | Callback | None,
    *,
    max_time: Any,
    progress_bar: bool,
    checkpointing: bool,
    summary: bool,
) -> list[Callback]:
    """The callbacks in the order in which they are called; keepers of checkpoints last.

    Raises:
        ConfigError: one is no callback, or two would share a state or a folder.
    """
    callbacks = [make_callback(one) for one in _as_list(given)] + from_factories()
    keepers = [callback for callback in callbacks if isinstance(callback, Checkpoint)]
    if keepers and not checkpointing:
        raise ConfigError("enable_checkpointing", False, f"True, or no {type(keepers[0]).__name__} in callbacks")
    if max_time is not None:
        callbacks.append(Timer(max_time))
    if progress_bar and not any(isinstance(callback, ProgressBar) for callback in callbacks):
        callbacks.append(ProgressBar())
    if checkpointing and not keepers:
        callbacks.append(ModelCheckpoint())
    if summary and not any(isinstance(callback, ModelSummary) for callback in callbacks):
        callbacks.insert(0, ModelSummary())
    return in_order(callbacks)


def with_own(callbacks: list[Callback], own: Any) -> list[Callback]:
    """In their order, with the module's ``own`` in the place of the Trainer's of the same class."""
    added = [make_callback(one) for one in _as_list(own)]
    kinds = {type(callback) for callback in added}
    return in_order([callback for callback in callbacks if type(callback) not in kinds] + added)


def _as_list(given: Any) -> list[Any]:
    return [given] if isinstance(given, Callback | str | Mapping) else list(given or [])


def without_keepers(given: Any) -> list[Callback]:
    """Those of the callbacks that keep no checkpoints."""
    made = [make_callback(one) for one in _as_list(given)]
    return [callback for callback in made if not callback.keeps_checkpoints]


def in_order(callbacks: list[Callback]) -> list[Callback]:
    """``callbacks`` with those that keep checkpoints last.

    Raises:
        ConfigError: two have one state key and a state to lose.
    """
    keys = [callback.state_key for callback in callbacks]
    for key, callback in zip(keys, callbacks, strict=True):
        if keys.count(key) > 1 and callback.state_dict():
            raise ConfigError("callbacks", f"two with the state_key {key}", "a state_key of its own for each")
    folders = [str(c.dirpath) for c in callbacks if isinstance(c, ModelCheckpoint) and c.writes_all_names]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ConfigError("ModelCheckpoint.dirpath", f"{Path(folder).name}, twice", "a folder of its own for each")
    return sorted(callbacks, key=lambda callback: callback.keeps_checkpoints)


def loggers_from(given: bool | Logger | Iterable[Logger] | None, root: Path) -> list[Logger]:
    if given is None or given is True:
        return [CSVLogger(root)]
    if given is False:
        return []
    loggers = [given] if isinstance(given, Logger) else list(given)
    for logger in loggers:
        if not isinstance(logger, Logger):
            raise ConfigError("logger", type(logger).__name__, "trainkit.loggers.Logger or a subclass")
    return loggers


def plugins_from(name: str | int | None, plugins: Any, device: torch.device) -> tuple[Precision, CheckpointIO]:
    """The precision and the way to the disk.

    Raises:
        ConfigError: something in ``plugins`` is neither, or there are two of a kind.
    """
    given = list(plugins) if isinstance(plugins, list | tuple) else [] if plugins is None else [plugins]
    for plugin in given:
        if not isinstance(plugin, Precision | CheckpointIO):
            raise ConfigError("plugins", type(plugin).__name__, "a trainkit.precision.Precision or a CheckpointIO")
    precisions = [plugin for plugin in given if isinstance(plugin, Precision)]
    ways = [plugin for plugin in given if isinstance(plugin, CheckpointIO)]
    if len(precisions) > 1 or len(ways) > 1:
        raise ConfigError("plugins", [type(plugin).__name__ for plugin in given], "one of a kind")
    if precisions and name is not None:
        raise ConfigError("precision", name, "None beside a Precision in plugins")
    return precisions[0] if precisions else make_precision(name, device), ways[0] if ways else CheckpointIO()
