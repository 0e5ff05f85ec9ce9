"""``trainkit.loggers`` by the path that Lightning has for it."""

from trainkit.loggers import *  # noqa: F403
