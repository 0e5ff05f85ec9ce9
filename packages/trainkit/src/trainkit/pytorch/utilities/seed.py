"""By the path that Lightning has for it."""

from trainkit.data.seed import seed_everything

__all__ = ["seed_everything"]
