"""The next free name of a run."""

from __future__ import annotations

from pathlib import Path


def version_folder(root: Path, version: int | str | None) -> str:
    """``version_N`` for a number, the next free one for None, a text as it is."""
    if isinstance(version, int):
        return f"version_{version}"
    if version is not None:
        return version
    taken = [int(p.name.removeprefix("version_")) for p in root.glob("version_*") if p.name[8:].isdigit()]
    return f"version_{max(taken, default=-1) + 1}"
