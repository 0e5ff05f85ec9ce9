"""Metrics as a table that grows on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TextIO

from trainkit.loggers.base import Logger

WIDTH = 12
HEADER_EVERY = 20  # rows


class ConsoleLogger(Logger):
    """A line a row on stderr, a column a metric; the header comes again where columns change, and now and then.

    Args:
        columns: the metrics to show, in this order; None: all, as they come.
        stream: where to; default: stderr.
    """

    def __init__(self, columns: list[str] | None = None, stream: TextIO | None = None) -> None:
        self._chosen, self._stream = columns, stream
        self._shown: list[str] = []
        self._since_header = 0

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        names = [name for name in self._chosen or metrics if name in metrics]
        if not names:
            return
        new = [name for name in names if name not in self._shown]
        if new or self._since_header >= HEADER_EVERY:
            self._shown = self._chosen or [*self._shown, *new]
            self._line("step", self._shown)
            self._since_header = 0
        self._line(str(step), [f"{metrics[name]:.5g}" if name in metrics else "" for name in self._shown])
        self._since_header += 1

    def _line(self, first: str, cells: list[str]) -> None:
        widths = [max(WIDTH, len(name)) for name in self._shown]
        row = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        print(f"{first:>8}  {row}", file=self._stream or sys.stderr)
