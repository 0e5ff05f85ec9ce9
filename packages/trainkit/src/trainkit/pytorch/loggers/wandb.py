"""By the path that Lightning has for it."""

from trainkit.loggers import WandbLogger

__all__ = ["WandbLogger"]
