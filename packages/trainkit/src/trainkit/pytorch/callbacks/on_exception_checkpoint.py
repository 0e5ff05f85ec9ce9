"""By the path that Lightning has for it."""

from trainkit.callbacks import OnExceptionCheckpoint

__all__ = ["OnExceptionCheckpoint"]
