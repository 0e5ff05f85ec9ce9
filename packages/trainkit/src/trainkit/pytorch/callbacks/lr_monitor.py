"""By the path that Lightning has for it."""

from trainkit.callbacks import LearningRateMonitor

__all__ = ["LearningRateMonitor"]
