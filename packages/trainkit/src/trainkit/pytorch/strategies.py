"""``trainkit.strategies`` by the path that Lightning has for it."""

from trainkit.strategies import *  # noqa: F403
