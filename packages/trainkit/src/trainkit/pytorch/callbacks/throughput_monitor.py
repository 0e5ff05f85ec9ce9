"""By the path that Lightning has for it."""

from trainkit.callbacks import ThroughputMonitor

__all__ = ["ThroughputMonitor"]
