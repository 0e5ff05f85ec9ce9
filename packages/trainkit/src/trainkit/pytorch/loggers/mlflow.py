"""By the path that Lightning has for it."""

from trainkit.loggers import MLFlowLogger

__all__ = ["MLFlowLogger"]
