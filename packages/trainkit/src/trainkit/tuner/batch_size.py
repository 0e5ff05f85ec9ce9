"""The largest batch that fits into the memory of the device."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from common_platform.errors import ConfigError
from trainkit.data.loaders import is_loader
from trainkit.ranks import rank_zero_info, rank_zero_warn
from trainkit.tuner import attributes
from trainkit.tuner.trial import sibling, without_trace

if TYPE_CHECKING:
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer

MODES = ("power", "binsearch")
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cudnn_status_not_supported", "cublas_status_alloc_failed",
                 "not enough memory")  # fmt: skip
Fits = Callable[[int], bool]


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether ``error``, or one that caused it, says that memory has run out, on a device or on the host."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY):
            return True
        error = error.__cause__
    return False


def largest(fits: Fits, mode: str, init_val: int, max_trials: int, max_val: int) -> int:
    """The largest size that ``fits`` found to fit; doubled until one does not, then, in "binsearch", between the two.

    Raises:
        ConfigError: not even a batch of one fits.
    """
    low, high, size = 0, max_val + 1, min(init_val, max_val)
    for _ in range(max_trials):
        if fits(size):
            low = size
        else:
            high = size
        if high - low <= 1 or (mode == "power" and low and high <= max_val):
            break
        size = _next(mode, low, high, max_val)
        if size == low:
            break
    if not low:
        raise ConfigError("batch_size", high, "one that fits into memory: not even the smallest does")
    return low


def _next(mode: str, low: int, high: int, max_val: int) -> int:
    if high > max_val:  # nothing has failed yet
        return min(2 * low, max_val)
    return (low + high) // 2 if mode == "binsearch" and low else max(high // 2, 1)


def scale_batch_size(
    trainer: Trainer,
    model: TrainModule,
    given: dict[str, Any],
    *,
    method: str,
    mode: str,
    steps_per_trial: int,
    init_val: int,
    max_trials: int,
    batch_arg_name: str,
    margin: float,
    max_val: int,
) -> int | None:
    """See ``Tuner.scale_batch_size``; ``given`` are the data arguments of the Trainer's ``method``."""
    if mode not in MODES:
        raise ConfigError("scale_batch_size.mode", mode, f"one of {MODES}")
    for name, value in (("init_val", init_val), ("max_trials", max_trials), ("steps_per_trial", steps_per_trial)):
        if value < 1:
            raise ConfigError(f"scale_batch_size.{name}", value, "1 or more")
    if not 0 <= margin < 1:
        raise ConfigError("scale_batch_size.margin", margin, "in [0, 1)")
    if any(is_loader(one) for name, one in given.items() if name != "datamodule"):
        raise ConfigError("scale_batch_size", "a loader", "a data module or a module that makes its loaders, so that "
                          f"they can be made with another {batch_arg_name}")  # fmt: skip
    if trainer.fast_dev_run:
        rank_zero_warn("scale_batch_size does nothing with fast_dev_run")
        return None
    owners = attributes.holders(batch_arg_name, model, given.get("datamodule"))
    if not owners:
        attributes.first_of((batch_arg_name,), model, given.get("datamodule"))
    before = [attributes.get(owner, batch_arg_name) for owner in owners]
    trial = _Trial(trainer, model, given, method, steps_per_trial)

    def fits(size: int) -> bool:
        for owner in owners:
            attributes.put(owner, batch_arg_name, size)
        answer = trial.runs()
        rank_zero_info(f"{batch_arg_name} {size}: {'fits' if answer else 'is too large'}")
        return answer

    try:
        found = largest(fits, mode, init_val, max_trials, max_val)
    except BaseException:
        for owner, value in zip(owners, before, strict=True):
            attributes.put(owner, batch_arg_name, value)
        raise
    if mode == "binsearch":
        found = max(int(found * (1 - margin)), 1)
    for owner in owners:
        attributes.put(owner, batch_arg_name, found)
    return found


class _Trial:
    """A few batches of a run, with the size that the model or the data module has now."""

    def __init__(self, trainer: Trainer, model: TrainModule, given: dict[str, Any], method: str, steps: int) -> None:
        self._trainer, self._model, self._given, self._method, self._steps = trainer, model, given, method, steps

    def runs(self) -> bool:
        """Whether memory is enough, on all ranks."""
        with without_trace(self._trainer, self._model):
            enough = self._try()
        _free_memory()
        return bool(self._trainer.strategy.reduce(torch.tensor(float(enough)), "min") > 0)

    def _try(self) -> bool:
        steps, limits = self._steps, {"max_epochs": -1, "min_epochs": 0, "min_steps": 0}
        if self._method == "fit":
            limits |= {"max_steps": steps, "limit_val_batches": steps}
        else:
            name = {"validate": "val", "test": "test", "predict": "predict"}[self._method]
            limits |= {f"limit_{name}_batches": steps}
        run = sibling(self._trainer, [], **limits)
        quiet = {"verbose": False} if self._method in ("validate", "test") else {}
        try:
            getattr(run, self._method)(self._model, **self._given, **quiet)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
