"""Ways of checkpoints to the disk, by the path that Lightning has for them."""

from trainkit.plugins import AsyncCheckpointIO, CheckpointIO

__all__ = ["AsyncCheckpointIO", "CheckpointIO"]
