"""Callbacks: what happens beside the training itself."""

from trainkit.callbacks.base import Callback, Checkpoint
from trainkit.callbacks.early_stopping import EarlyStopping
from trainkit.callbacks.lr_monitor import LearningRateMonitor
from trainkit.callbacks.model_checkpoint import ModelCheckpoint
from trainkit.callbacks.progress import ProgressBar
from trainkit.callbacks.timer import Timer

__all__ = [
    "Callback",
    "Checkpoint",
    "EarlyStopping",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ProgressBar",
    "Timer",
]
