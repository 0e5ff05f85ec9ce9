"""Callbacks: what happens beside the training itself."""

from typing import TYPE_CHECKING, Any

from trainkit.callbacks.registry import BUILT_IN, callback_class, make_callback

if TYPE_CHECKING:
    from trainkit.callbacks.base import Callback, Checkpoint
    from trainkit.callbacks.device_stats_monitor import DeviceStatsMonitor
    from trainkit.callbacks.early_stopping import EarlyStopping
    from trainkit.callbacks.finetuning import BackboneFinetuning, BaseFinetuning
    from trainkit.callbacks.grad_norm import GradNorm
    from trainkit.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler
    from trainkit.callbacks.lambda_function import LambdaCallback
    from trainkit.callbacks.lr_monitor import LearningRateMonitor
    from trainkit.callbacks.model_checkpoint import ModelCheckpoint
    from trainkit.callbacks.model_summary import ModelSummary, RichModelSummary
    from trainkit.callbacks.on_exception_checkpoint import OnExceptionCheckpoint
    from trainkit.callbacks.prediction_writer import BasePredictionWriter
    from trainkit.callbacks.progress import ProgressBar, RichProgressBar
    from trainkit.callbacks.spike import SpikeDetection
    from trainkit.callbacks.throughput_monitor import ThroughputMonitor
    from trainkit.callbacks.timer import Timer
    from trainkit.callbacks.tqdm_progress import TQDMProgressBar
    from trainkit.callbacks.weight_averaging import EMA, StochasticWeightAveraging
    from trainkit.tuner.callbacks import BatchSizeFinder, LearningRateFinder

__all__ = [
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "BatchSizeFinder",
    "Callback",
    "Checkpoint",
    "DeviceStatsMonitor",
    "EMA",
    "EarlyStopping",
    "GradNorm",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateFinder",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "ProgressBar",
    "RichModelSummary",
    "RichProgressBar",
    "SpikeDetection",
    "StochasticWeightAveraging",
    "TQDMProgressBar",
    "ThroughputMonitor",
    "Timer",
    "callback_class",
    "make_callback",
]


def __getattr__(name: str) -> Any:
    """Callbacks are imported when they are first used."""
    if name not in BUILT_IN:
        raise AttributeError(f"module 'trainkit.callbacks' has no attribute {name!r}; there are {', '.join(__all__)}")
    return callback_class(name)
