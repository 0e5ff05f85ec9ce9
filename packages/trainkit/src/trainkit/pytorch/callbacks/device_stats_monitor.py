"""By the path that Lightning has for it."""

from trainkit.callbacks import DeviceStatsMonitor

__all__ = ["DeviceStatsMonitor"]
