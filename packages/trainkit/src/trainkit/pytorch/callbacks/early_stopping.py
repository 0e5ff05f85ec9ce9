"""By the path that Lightning has for it."""

from trainkit.callbacks import EarlyStopping

__all__ = ["EarlyStopping"]
