"""By the path that Lightning has for it."""

from trainkit.data.combined import CombinedLoader

__all__ = ["CombinedLoader"]
