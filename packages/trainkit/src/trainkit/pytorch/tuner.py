"""``trainkit.tuner`` by the path that Lightning has for it."""

from trainkit.tuner import Tuner

__all__ = ["Tuner"]
