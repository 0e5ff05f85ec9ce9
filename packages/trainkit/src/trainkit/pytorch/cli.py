"""``trainkit.cli`` by the path that Lightning has for it."""

from trainkit.cli import *  # noqa: F403
