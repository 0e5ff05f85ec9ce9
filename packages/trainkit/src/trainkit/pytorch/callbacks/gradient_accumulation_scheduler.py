"""By the path that Lightning has for it."""

from trainkit.callbacks import GradientAccumulationScheduler

__all__ = ["GradientAccumulationScheduler"]
