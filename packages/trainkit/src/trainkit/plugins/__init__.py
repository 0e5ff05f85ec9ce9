"""What ``Trainer(plugins=...)`` takes."""

from trainkit.checkpoint.io import AsyncCheckpointIO, CheckpointIO
from trainkit.precision import FP8Precision, Precision

__all__ = ["AsyncCheckpointIO", "CheckpointIO", "FP8Precision", "Precision"]
