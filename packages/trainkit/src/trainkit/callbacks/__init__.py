"""Callbacks: what happens beside the training itself."""

from trainkit.callbacks.base import Callback, Checkpoint
from trainkit.callbacks.early_stopping import EarlyStopping
from trainkit.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler
from trainkit.callbacks.lambda_function import LambdaCallback
from trainkit.callbacks.lr_monitor import LearningRateMonitor
from trainkit.callbacks.model_checkpoint import ModelCheckpoint
from trainkit.callbacks.model_summary import ModelSummary, RichModelSummary
from trainkit.callbacks.on_exception_checkpoint import OnExceptionCheckpoint
from trainkit.callbacks.prediction_writer import BasePredictionWriter
from trainkit.callbacks.progress import ProgressBar, RichProgressBar, TQDMProgressBar
from trainkit.callbacks.timer import Timer
from trainkit.callbacks.weight_averaging import EMA, StochasticWeightAveraging

__all__ = [
    "BasePredictionWriter",
    "Callback",
    "Checkpoint",
    "EMA",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "ProgressBar",
    "RichModelSummary",
    "RichProgressBar",
    "StochasticWeightAveraging",
    "TQDMProgressBar",
    "Timer",
]
