"""Loggers: where metrics go."""

from trainkit.loggers.base import Logger
from trainkit.loggers.csv import CSVLogger

__all__ = ["CSVLogger", "Logger"]
