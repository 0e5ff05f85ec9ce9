"""By the path that Lightning has for it."""

from trainkit.callbacks import ModelCheckpoint

__all__ = ["ModelCheckpoint"]
