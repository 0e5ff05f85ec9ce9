"""By the path that Lightning has for it."""

from trainkit.callbacks import Checkpoint

__all__ = ["Checkpoint"]
