"""Names for the annotations of steps and hooks, by the path that Lightning has for them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

STEP_OUTPUT = Tensor | Mapping[str, Any] | None
TRAIN_DATALOADERS = Any  # a loader, or several in lists, tuples and dictionaries
EVAL_DATALOADERS = Any
LRSchedulerTypeUnion = Any
OptimizerLRScheduler = Any  # what configure_optimizers may return
OptimizerLRSchedulerConfig = dict[str, Any]
LRSchedulerConfigType = dict[str, Any]

__all__ = [
    "EVAL_DATALOADERS",
    "STEP_OUTPUT",
    "TRAIN_DATALOADERS",
    "LRSchedulerConfigType",
    "LRSchedulerTypeUnion",
    "OptimizerLRScheduler",
    "OptimizerLRSchedulerConfig",
]
