"""By the path that Lightning has for it."""

from trainkit.callbacks import BatchSizeFinder

__all__ = ["BatchSizeFinder"]
