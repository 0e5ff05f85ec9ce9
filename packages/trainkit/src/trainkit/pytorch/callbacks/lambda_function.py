"""By the path that Lightning has for it."""

from trainkit.callbacks import LambdaCallback

__all__ = ["LambdaCallback"]
