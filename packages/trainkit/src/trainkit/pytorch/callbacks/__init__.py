"""``trainkit.callbacks`` by the path that Lightning has for it."""

from trainkit.callbacks import *  # noqa: F403
