"""``trainkit.plugins`` by the path that Lightning has for it."""

from trainkit.plugins import AsyncCheckpointIO, CheckpointIO, FP8Precision, Precision

__all__ = ["AsyncCheckpointIO", "CheckpointIO", "FP8Precision", "Precision"]
