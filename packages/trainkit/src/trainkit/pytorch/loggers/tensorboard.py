"""By the path that Lightning has for it."""

from trainkit.loggers import TensorBoardLogger

__all__ = ["TensorBoardLogger"]
