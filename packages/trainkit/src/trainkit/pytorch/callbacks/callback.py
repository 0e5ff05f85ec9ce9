"""By the path that Lightning has for it."""

from trainkit.callbacks import Callback

__all__ = ["Callback"]
