"""A checkpoint is a folder: weights, the rest of the state, and a manifest with the digest of each file.

It appears whole or not at all, and nothing is loaded from one whose files are not what the manifest says.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from common_platform.artifact import ArtifactWriter, Manifest, read_manifest, verify
from common_platform.artifact.manifest import FORMAT_VERSION
from common_platform.artifact.safe_files import read_bytes
from common_platform.artifact.safetensors_reader import SafetensorsFile
from common_platform.artifact.strict_json import loads
from common_platform.artifact.writer import remove_debris
from common_platform.errors import (
    ArtifactError,
    ArtifactMissing,
    ArtifactRefused,
    ArtifactVersionError,
    CheckpointCorrupt,
    CheckpointError,
    CheckpointIncomplete,
    CheckpointVersionError,
    CheckpointWriteError,
)
from trainkit.checkpoint.foreign import load_ckpt
from trainkit.checkpoint.tree import join, split, without_shared

MODEL, STATE_TENSORS, STATE, MANIFEST = "model.safetensors", "state.safetensors", "state.json", "manifest.json"
VERSION = 2
RANK = re.compile(r"rank-(\d{5})\.safetensors")  # what differs from rank to rank, where there are several
STEP = "global_step"  # in each file's header: of which checkpoint it is


class Prepared(NamedTuple):
    """A checkpoint that is ready to be written: nothing in it changes any more, if it was copied."""

    weights: dict[str, Tensor]
    aliases: dict[str, str]
    tensors: dict[str, Tensor]
    ranks: list[dict[str, Tensor]]  # of each rank, where there are several
    plain: Any
    global_step: int

    @property
    def num_bytes(self) -> int:
        parts = (self.weights, self.tensors, *self.ranks)
        return sum(tensor.numel() * tensor.element_size() for part in parts for tensor in part.values())


def prepare(model: dict[str, Tensor], state: dict[str, Any], *, copy: bool = False) -> Prepared:
    """Tensors and plain values of a checkpoint.

    Args:
        model: the module's ``state_dict``.
        state: everything else; see ``tree.split`` for what it may hold.
        copy: whether the weights are copied too, and may change before they are written.

    Raises:
        CheckpointError: ``state`` holds something that cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    own = state.get("ranks", [])
    ranks: list[dict[str, Tensor]] = [{} for _ in own] if len(own) > 1 else []
    if ranks:
        state = state | {"ranks": None}
    plain = split(state, tensors)
    if ranks:
        plain["ranks"] = [split(one, found, "rank") for one, found in zip(own, ranks, strict=True)]
    weights, aliases = without_shared(model)
    if copy:
        owned = {name: model[name] for name in weights}
        weights = {n: t.clone() if t.data_ptr() == owned[n].data_ptr() else t for n, t in weights.items()}
    return Prepared(weights, aliases, tensors, ranks, plain, int(state.get(STEP, 0)))


def write(path: str | Path, prepared: Prepared) -> None:
    """Write a checkpoint at ``path``, in place of one that stands there.

    Raises:
        CheckpointWriteError: the disk is full or not writable; what stood at ``path`` is whole.
    """
    about = {"version": VERSION, "aliases": prepared.aliases, "state": prepared.plain}
    try:
        with ArtifactWriter(path, overwrite=True) as writer:
            of_step = {STEP: str(prepared.global_step)}
            writer.write_tensors(MODEL, prepared.weights, of_step)
            writer.write_tensors(STATE_TENSORS, prepared.tensors, of_step)
            for number, tensors in enumerate(prepared.ranks):
                writer.write_tensors(_of_rank(number), tensors, of_step)
            writer.write_json(STATE, about)
            writer.commit(provenance=_provenance(prepared.global_step))
    except ArtifactError as error:
        raise _write_error(error, prepared) from error


def _write_error(error: ArtifactError, prepared: Prepared) -> CheckpointWriteError:
    cause: BaseException | None = error.__cause__
    text = f"{cause or ''}"
    full = (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)) or any(
        word in text for word in ("No space left", "File too large", "quota")
    )
    what = f"{prepared.num_bytes} bytes of free space on the disk" if full else "a folder that can be written to"
    return CheckpointWriteError("checkpoint", f"step {prepared.global_step}: {error.value}", what, flag="dirpath")


def save(path: str | Path, model: dict[str, Tensor], state: dict[str, Any]) -> None:
    """``prepare`` and ``write``."""
    write(path, prepare(model, state))


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The module's ``state_dict`` and the rest of the state, verified.

    Raises:
        CheckpointIncomplete: there is no checkpoint at ``path``, or a rank's part of it is missing.
        CheckpointCorrupt: a file is not what the manifest says; it is named.
        CheckpointVersionError: a newer version wrote it.
    """
    folder = Path(path)
    manifest = manifest_of(folder)
    try:
        verify(folder)
        about = loads(read_bytes(folder, STATE, 1 << 30), max_bytes=1 << 30, max_depth=256)
        if about.get("version") != VERSION:
            raise CheckpointVersionError(f"{STATE} version", about.get("version"), f"{VERSION}; update this library")
        _check_manifest(folder, manifest, about)
        weights, tensors = load_file(folder / MODEL), load_file(folder / STATE_TENSORS)
        ranks = [load_file(folder / file.name) for file in manifest.files if RANK.fullmatch(file.name)]
    except ArtifactError as error:
        raise _damage(folder, manifest, error) from error
    weights |= {name: weights[owner] for name, owner in about["aliases"].items()}
    state = about["state"]
    of_ranks = [join(own, found) for own, found in zip(state.pop("ranks"), ranks, strict=True)] if ranks else None
    found = join(state, tensors)
    return weights, found if of_ranks is None else found | {"ranks": of_ranks}


def _of_rank(number: int) -> str:
    return f"rank-{number:05}.safetensors"


def _damage(folder: Path, manifest: Manifest, error: ArtifactError) -> CheckpointError:
    """What is wrong with the checkpoint in ``folder``, from what is wrong with one of its files."""
    name = str(error.param).split()[0]
    rank = RANK.fullmatch(name)
    if isinstance(error, ArtifactMissing) and rank:
        return CheckpointIncomplete(f"rank {int(rank[1])}", f"no {name}", f"the parts of all ranks in {folder.name}")
    step = _step_in(folder, name)
    wanted = str(manifest.provenance.get(STEP))
    if step not in (None, wanted):
        return CheckpointCorrupt(name, f"a file of step {step}", f"one of step {wanted}, as in {MANIFEST}: two "
                                 "checkpoints are mixed")  # fmt: skip
    return CheckpointCorrupt(error.param, error.value, error.limit)


def _step_in(folder: Path, name: str) -> str | None:
    """The step that a safetensors file says it is of; None where it cannot be read."""
    try:
        return SafetensorsFile(folder, name).metadata.get(STEP) if name.endswith(".safetensors") else None
    except ArtifactError:
        return None


def _check_manifest(folder: Path, manifest: Manifest, about: dict[str, Any]) -> None:
    """The manifest has no digest of its own, so it must be, to the byte, what was written for these files."""
    state = about["state"]
    step = state.get(STEP, 0) if isinstance(state, dict) else 0
    if manifest.provenance != _provenance(step) or manifest.to_json() != read_bytes(folder, MANIFEST):
        raise CheckpointCorrupt(MANIFEST, "changed since it was written", "the manifest of these files")


def _provenance(global_step: int) -> dict[str, Any]:
    return {"kind": "trainkit checkpoint", STEP: global_step}


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
        CheckpointIncomplete, CheckpointCorrupt, CheckpointVersionError, ArtifactRefused.
    """
    if not path.is_dir():
        raise CheckpointIncomplete("ckpt_path", path.name, "a checkpoint folder")
    _refuse_pickles(path)
    try:
        return read_manifest(path)
    except ArtifactVersionError as error:
        raise CheckpointVersionError(error.param, error.value, error.limit) from error
    except ArtifactMissing as error:
        raise CheckpointIncomplete(
            f"{path.name}/{MANIFEST}", "no such file", "that of a complete checkpoint"
        ) from error
    except ArtifactError as error:
        where = str(error.param) if MANIFEST in str(error.param) else f"{MANIFEST} {error.param}"
        if where.endswith("format_version") and isinstance(error.value, int):
            raise CheckpointVersionError(where, error.value, f"{FORMAT_VERSION}, what this library reads") from error
        raise CheckpointCorrupt(where, error.value, error.limit) from error


def _refuse_pickles(path: Path) -> None:
    """Raises:
    ArtifactRefused: a folder of torch.distributed.checkpoint, whose metadata is a pickle; nothing of it is opened.
    """
    for found in path.iterdir():
        if found.name == ".metadata" or found.suffix in (".distcp", ".pkl", ".pickle", ".pt", ".pth"):
            raise ArtifactRefused(f"{path.name}/{found.name}", "a pickle", "safetensors and JSON, as save_checkpoint "
                                  "writes them")  # fmt: skip


def undo_killed_saves(folder: Path) -> None:
    """Undo what a killed save left in ``folder``."""
    for hidden in folder.glob(".*.replaced-*"):
        remove_debris(folder / hidden.name[1:].rpartition(".replaced-")[0])


def find_last(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``; what a killed save left is cleared away first."""
    if not folder.is_dir():
        return None
    undo_killed_saves(folder)
    found = [(_step_of(path), path.stat().st_mtime_ns, path) for path in folder.iterdir() if _is_checkpoint(path)]
    return max(found)[2] if found else None


def newest_first(folder: Path) -> list[Path]:
    """All checkpoints in ``folder`` by the time of their writing, whatever is in them: also damaged ones."""
    undo_killed_saves(folder)
    found = [path for path in folder.iterdir() if _is_checkpoint(path)] if folder.is_dir() else []
    return sorted(found, key=lambda path: (path / MANIFEST).stat().st_mtime_ns, reverse=True)


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".") and (path / MANIFEST).is_file()


def _step_of(path: Path) -> int:
    return int(manifest_of(path).provenance.get(STEP, 0))
