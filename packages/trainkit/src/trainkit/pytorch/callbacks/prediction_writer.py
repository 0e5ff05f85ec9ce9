"""By the path that Lightning has for it."""

from trainkit.callbacks import BasePredictionWriter

__all__ = ["BasePredictionWriter"]
