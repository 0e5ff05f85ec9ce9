"""By the path that Lightning has for it."""

from trainkit.loggers import CSVLogger

__all__ = ["CSVLogger"]
