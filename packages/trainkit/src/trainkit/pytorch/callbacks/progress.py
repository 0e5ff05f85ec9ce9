"""By the path that Lightning has for it."""

from trainkit.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

__all__ = ["ProgressBar", "RichProgressBar", "TQDMProgressBar"]
