"""By the path that Lightning has for it."""

from trainkit.data.seed import seed_everything
from trainkit.trainer import Trainer

__all__ = ["Trainer", "seed_everything"]
