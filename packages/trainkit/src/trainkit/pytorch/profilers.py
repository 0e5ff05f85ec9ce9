"""``trainkit.profilers`` by the path that Lightning has for it."""

from trainkit.profilers import *  # noqa: F403
