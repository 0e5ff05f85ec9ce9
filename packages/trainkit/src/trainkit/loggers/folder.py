"""Loggers that write below ``save_dir/name/version``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trainkit.loggers.base import Logger


class FolderLogger(Logger):
    """Where a run's files go, and what its metrics are called.

    Args:
        save_dir: the folder above.
        name: of the experiment.
        version: of the run; None takes the next free ``version_N``, "" none.
        prefix: in front of each metric's name, with a "-" between.
    """

    def __init__(self, save_dir: str | Path, name: str | None, version: int | str | None, prefix: str) -> None:
        root = Path(save_dir, name or "")
        self._save_dir, self._name, self._prefix = str(save_dir), name, prefix
        self._folder = root / _version_folder(root, version)

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def log_dir(self) -> str:
        return str(self._folder)

    @property
    def root_dir(self) -> str:
        return str(self._folder.parent)

    @property
    def name(self) -> str | None:
        return self._name

    @property
    def version(self) -> int | str | None:
        number = self._folder.name.removeprefix("version_")
        return int(number) if number.isdigit() else self._folder.name

    def _named(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        return {f"{self._prefix}-{name}": value for name, value in metrics.items()} if self._prefix else metrics


def _version_folder(root: Path, version: int | str | None) -> str:
    """``version_N`` for a number, the next free one for None, a text as it is."""
    if isinstance(version, int):
        return f"version_{version}"
    if version is not None:
        return version
    taken = [int(p.name.removeprefix("version_")) for p in root.glob("version_*") if p.name[8:].isdigit()]
    return f"version_{max(taken, default=-1) + 1}"
