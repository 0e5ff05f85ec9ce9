"""What the Trainer asks of a profiler."""

from __future__ import annotations

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from common_platform.errors import ConfigError


class Profiler(ABC):
    """Is told when actions start and stop, and says at the end of a stage what it found.

    Args:
        dirpath: where the report is written; default: the logger's folder, once ``filename`` is given.
        filename: of the report, without its ending; None: the report goes to stderr.
    """

    def __init__(self, dirpath: str | Path | None = None, filename: str | None = None) -> None:
        if filename is not None and Path(filename).name != filename:
            raise ConfigError("profiler.filename", filename, "a name without folders: they go into dirpath")
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.filename = filename

    @abstractmethod
    def start(self, action_name: str) -> None:
        """``action_name`` begins."""

    @abstractmethod
    def stop(self, action_name: str) -> None:
        """``action_name`` is over."""

    def summary(self) -> str:
        """The report."""
        return ""

    @contextlib.contextmanager
    def profile(self, action_name: str) -> Iterator[str]:
        """``start`` and ``stop`` for a ``with`` block, as in a module's ``self.trainer.profiler.profile(name)``."""
        self.start(action_name)
        try:
            yield action_name
        finally:
            self.stop(action_name)

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """``stage`` begins; ``log_dir`` is where reports go by default."""
        if self.dirpath is None and log_dir is not None:
            self.dirpath = Path(log_dir)
        self._stage, self._rank = stage, local_rank or 0

    def step(self) -> None:
        """A training batch is over."""

    def teardown(self, stage: str | None = None) -> None:
        """The stage is over, whole or not."""

    def describe(self) -> None:
        """Write the report."""
        text = self.summary()
        if not text:
            return
        path = self.path_of("txt")
        if path is None:
            print(text, file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")

    def path_of(self, ending: str) -> Path | None:
        """Where a file of this stage and rank goes, if files were asked for."""
        if self.filename is None:
            return None
        folder = self.dirpath or Path.cwd()
        return folder / f"{self._stage}-{self.filename}-{self._rank}.{ending}"

    _stage, _rank = "fit", 0


class PassThroughProfiler(Profiler):
    """Does nothing, and is not asked to."""

    def start(self, action_name: str) -> None: ...
    def stop(self, action_name: str) -> None: ...
