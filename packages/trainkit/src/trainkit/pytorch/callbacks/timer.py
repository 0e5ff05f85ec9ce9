"""By the path that Lightning has for it."""

from trainkit.callbacks import Timer

__all__ = ["Timer"]
