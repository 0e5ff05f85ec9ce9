"""By the path that Lightning has for it."""

from trainkit.loggers import Logger

__all__ = ["Logger"]
