"""By the path that Lightning has for it."""

from trainkit.callbacks import RichModelSummary

__all__ = ["RichModelSummary"]
