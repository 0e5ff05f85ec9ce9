"""A checkpoint is a folder: weights, the rest of the state, and a manifest with the digest of each file.

It appears whole or not at all, and nothing is loaded from one whose files are not what the manifest says.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from common_platform.artifact import ArtifactWriter, Manifest, read_manifest, verify
from common_platform.artifact.safe_files import read_bytes
from common_platform.artifact.strict_json import loads
from common_platform.artifact.writer import remove_debris
from common_platform.errors import (
    ArtifactError,
    ArtifactVersionError,
    CheckpointCorrupt,
    CheckpointIncomplete,
    CheckpointVersionError,
    CheckpointWriteError,
)
from trainkit.checkpoint.foreign import load_ckpt
from trainkit.checkpoint.tree import join, split, without_shared

MODEL, STATE_TENSORS, STATE = "model.safetensors", "state.safetensors", "state.json"
VERSION = 2


def save(path: str | Path, model: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint at ``path``, in place of one that stands there.

    Args:
        model: the module's ``state_dict``.
        state: everything else; see ``tree.split`` for what it may hold.

    Raises:
        CheckpointWriteError: the disk is full or not writable; what stood at ``path`` is whole.
        CheckpointError: ``state`` holds something that cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    plain = split(state, tensors)
    weights, aliases = without_shared(model)
    try:
        with ArtifactWriter(path, overwrite=True) as writer:
            writer.write_tensors(MODEL, weights)
            writer.write_tensors(STATE_TENSORS, tensors)
            writer.write_json(STATE, {"version": VERSION, "aliases": aliases, "state": plain})
            writer.commit(provenance={"kind": "trainkit checkpoint", "global_step": state.get("global_step", 0)})
    except ArtifactError as error:
        cause = error.__cause__
        full = isinstance(cause, OSError) and cause.errno == errno.ENOSPC
        what = "free space on the disk" if full else "a folder that can be written to"
        raise CheckpointWriteError("checkpoint", error.value, what) from error


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The module's ``state_dict`` and the rest of the state, verified.

    Raises:
        CheckpointIncomplete: there is no checkpoint at ``path``.
        CheckpointCorrupt: a file is not what the manifest says; it is named.
        CheckpointVersionError: a newer version wrote it.
    """
    folder = Path(path)
    manifest_of(folder)
    try:
        verify(folder)
        about = loads(read_bytes(folder, STATE, 1 << 30), max_bytes=1 << 30, max_depth=256)
        if about.get("version") != VERSION:
            raise CheckpointVersionError(f"{STATE} version", about.get("version"), f"{VERSION}; update this library")
        weights, tensors = load_file(folder / MODEL), load_file(folder / STATE_TENSORS)
    except ArtifactError as error:
        raise CheckpointCorrupt(error.param, error.value, error.limit) from error
    weights |= {name: weights[owner] for name, owner in about["aliases"].items()}
    return weights, join(about["state"], tensors)


def load_any(path: str | Path) -> dict[str, Any]:
    """A checkpoint as one dictionary with "state_dict" in it; of ours, or a ``.ckpt`` file of Lightning.

    Raises:
        CheckpointError: it cannot be used.
        ArtifactRefused: a file that holds more than tensors and plain values.
    """
    if Path(path).is_file():
        return load_ckpt(Path(path))
    weights, state = load(path)
    return {"state_dict": weights, **state}


def manifest_of(path: Path) -> Manifest:
    """The manifest of the checkpoint at ``path``.

    Raises:
        CheckpointIncomplete, CheckpointCorrupt, CheckpointVersionError.
    """
    if not path.is_dir():
        raise CheckpointIncomplete("ckpt_path", path.name, "a checkpoint folder")
    try:
        return read_manifest(path)
    except ArtifactVersionError as error:
        raise CheckpointVersionError(error.param, error.value, error.limit) from error
    except ArtifactError as error:
        raise CheckpointCorrupt(error.param, error.value, error.limit) from error


def find_last(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``; what a killed save left is cleared away first."""
    if not folder.is_dir():
        return None
    for hidden in folder.glob(".*.replaced-*"):
        remove_debris(folder / hidden.name[1:].rpartition(".replaced-")[0])
    found = [(_step_of(path), path.stat().st_mtime_ns, path) for path in folder.iterdir() if _is_checkpoint(path)]
    return max(found)[2] if found else None


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".") and (path / "manifest.json").is_file()


def _step_of(path: Path) -> int:
    return int(manifest_of(path).provenance.get("global_step", 0))
