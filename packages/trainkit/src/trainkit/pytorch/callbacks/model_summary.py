"""By the path that Lightning has for it."""

from trainkit.callbacks import ModelSummary

__all__ = ["ModelSummary"]
