"""One tree of loggers for the three packages: readable lines or JSON, with the rank where there are several."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TextIO

from common_platform.errors import ConfigError

TREES = ("common_platform", "trainkit", "servekit")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; by the habit of ``logging``, silent below WARNING until somebody configures it."""
    return logging.getLogger(name)


def configure(
    level: str = "INFO", *, as_json: bool = False, rank: int = 0, world_size: int = 1, stream: TextIO | None = None
) -> None:
    """Send the three trees to ``stream`` (stderr); calling it again changes what was configured.

    Args:
        as_json: one JSON object a line: time, level, logger, message, rank, and fields given by ``extra``.
        rank, world_size: ranks above 0 speak from WARNING on only.

    Raises:
        ConfigError: an unknown level.
    """
    if level.upper() not in LEVELS:
        raise ConfigError("log_level", level, f"one of {LEVELS}", flag="--log-level")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonLines(rank) if as_json else _Lines(rank, world_size))
    for name in TREES:
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            logger.removeHandler(old)
        logger.addHandler(handler)
        logger.setLevel(level.upper() if rank == 0 else max(logging.WARNING, logging.getLevelName(level.upper())))
        logger.propagate = False


class _Lines(logging.Formatter):
    def __init__(self, rank: int, world_size: int) -> None:
        where = f"[rank {rank}] " if world_size > 1 else ""
        super().__init__(f"%(asctime)s %(levelname)-7s {where}%(name)s: %(message)s")


class _JsonLines(logging.Formatter):
    STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime", "taskName"}

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "rank": self._rank,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in self.STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
