"""Writing an artifact so that it is there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from common_platform.artifact import safe_files
from common_platform.artifact.manifest import BELONGS, FORMAT_VERSION, MANIFEST, FileEntry, Manifest, Probe, digest_of
from common_platform.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

DEBRIS = re.compile(r"\.(?P<name>.+)\.(?:writing|replaced)-(?P<pid>\d+)-[0-9a-f]{8}")


class ArtifactWriter:
    """A folder in the making::

        with ArtifactWriter("tuned") as writer:
            tokenizer.save_pretrained(writer.folder)
            writer.write_tensors("model.safetensors", tensors)
            writer.commit(model={...}, provenance={...}, probes=[...])

    Everything is written into a hidden folder beside ``path``, flushed to disk, and renamed at ``commit``. Leaving
    without it, by an exception or not, removes the folder; what a killed process left is removed by the next writer.

    Args:
        path: where the artifact will stand.
        overwrite: replace what stands there at ``commit``.

    Raises:
        ConfigError: something stands at ``path`` and ``overwrite`` is False.
        ArtifactError: the disk is full or not writable (code ``artifact_write``).
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        self.path = Path(path).absolute()
        self.overwrite = overwrite
        if self.path.exists() and not overwrite:
            raise ConfigError("path", self.path.name, "a path where nothing stands yet", flag="overwrite=True")
        self.folder = self._beside("writing")

    def _beside(self, what: str) -> Path:
        return self.path.parent / f".{self.path.name}.{what}-{os.getpid()}-{secrets.token_hex(4)}"

    def __enter__(self) -> ArtifactWriter:
        with _explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            remove_debris(self.path)
            self.folder.mkdir()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n")

    def write_bytes(self, name: str, data: bytes) -> None:
        with _explained(self.path):
            target = self.folder / safe_files.check_name(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
        """``tensors`` as one safetensors file; each contiguous, none sharing memory with another.

        The file says that it belongs to a manifest, so that the folder is not taken for a plain one without it.

        Args:
            about: more for the file's header.
        """
        from safetensors.torch import save_file

        metadata = {"format": "pt", BELONGS: MANIFEST, **(about or {})}
        with _explained(self.path):
            save_file(dict(tensors), str(self.folder / safe_files.check_name(name)), metadata=metadata)

    def commit(
        self,
        *,
        model: Mapping[str, Any] | None = None,
        tokenizer: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        probes: Sequence[Probe] = (),
    ) -> Manifest:
        """Hash and flush all files, write the manifest, and let the folder appear at ``path``."""
        with _explained(self.path):
            entries = [self._entry(name) for name in safe_files.all_files(self.folder)]
            manifest = Manifest(
                FORMAT_VERSION, entries, dict(model or {}), dict(tokenizer or {}), dict(provenance or {}), list(probes)
            )
            self.write_bytes(MANIFEST, manifest.to_json())
            for name in safe_files.all_files(self.folder):
                _flush(self.folder / name)
            for root, _, _ in os.walk(self.folder):
                _flush(Path(root))
            self._appear()
        return manifest

    def _entry(self, name: str) -> FileEntry:
        with safe_files.opened(self.folder, name) as descriptor:
            return FileEntry(name, os.fstat(descriptor).st_size, digest_of(descriptor))

    def _appear(self) -> None:
        if self.path.exists() and self.overwrite:
            aside = self._beside("replaced")
            self.path.rename(aside)
            self.folder.rename(self.path)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            self.folder.rename(self.path)
        _flush(self.path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_debris(path: Path) -> None:
    """Remove what writers of ``path`` that are no longer alive left beside it; a swap cut off is undone."""
    for found in path.parent.glob(f".{path.name}.*-*-*"):
        match = DEBRIS.fullmatch(found.name)
        if not match or match["name"] != path.name or _is_alive(int(match["pid"])):
            continue
        if ".replaced-" in found.name and not path.exists():
            found.rename(path)
        else:
            shutil.rmtree(found, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """A failing disk as one of our errors, the original kept as its cause."""
    try:
        yield
    except OSError as error:
        raise _write_error(path, error.strerror or str(error), error.errno) from error
    except Exception as error:
        if "SafetensorError" not in type(error).__name__:
            raise
        raise _write_error(path, str(error), None) from error


def _write_error(path: Path, reason: str, number: int | None) -> ArtifactError:
    what = "free space on the disk" if number == errno.ENOSPC else "a folder that can be written to"
    return ArtifactError("path", f"{path.name}: {reason}", what, code="artifact_write")
