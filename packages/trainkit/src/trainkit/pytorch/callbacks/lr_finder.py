"""By the path that Lightning has for it."""

from trainkit.callbacks import LearningRateFinder

__all__ = ["LearningRateFinder"]
