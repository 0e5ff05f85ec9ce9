"""Opening a model folder: a hand-off artifact, verified, or an ordinary Hugging Face folder, checked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from common_platform.artifact import manifest as manifests
from common_platform.artifact import model_config, safe_files, strict_json
from common_platform.artifact.manifest import BELONGS, MANIFEST, Manifest
from common_platform.artifact.safetensors_reader import Entry, SafetensorsFile
from common_platform.errors import ArtifactConfigError, ArtifactFormatError, ArtifactMissing, ArtifactRefused

if TYPE_CHECKING:  # whoever reads no tensor loads no torch: a server's own process
    import torch
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
GENERATION = "generation_config.json"
PREPROCESSOR = "preprocessor_config.json"
log = logging.getLogger("common_platform.artifact")


def open_model_folder(path: str | Path, *, verify: bool = True) -> ModelFolder:
    """Open the model in ``path``.

    With a ``manifest.json`` every file is checked against it first, and what is read later is what was checked: weights
    are mapped from the descriptor that was hashed, other files are hashed again when they are read. Without, the folder
    is a plain Hugging Face one: its JSON must be strict and name no code, its safetensors files must be sound.

    Args:
        verify: False leaves the weights unhashed, for who does not use them.

    Raises:
        ArtifactError: one of the family, naming the file and what is wrong with it.
    """
    folder = Path(path)
    if folder.is_file():
        raise ArtifactRefused(
            folder.name, "one file", "a folder: archives and GGUF files are not unpacked; convert them"
        )
    if not folder.is_dir():
        raise ArtifactMissing("model", folder.name, "a folder with config.json and model.safetensors")
    manifest = None
    if (folder / MANIFEST).exists() or (folder / MANIFEST).is_symlink():
        manifest = manifests.read_listed(folder) if verify else manifests.read_manifest(folder)
    return ModelFolder(folder, manifest, verify=verify)


class ModelFolder:
    """A model's config, tokenizer files and tensors. Tensors are mapped, not read: cheap until they are used."""

    def __init__(self, path: Path, manifest: Manifest | None, *, verify: bool = True) -> None:
        self.path = path
        self.manifest = manifest
        self._entries = {entry.name: entry for entry in manifest.files} if manifest else {}
        self._hashes_weights = verify
        self._refuse_code()
        if not self.has("config.json"):
            raise ArtifactMissing("config.json", self._what_is_there(), "a folder in Hugging Face's layout")
        self.config: dict[str, Any] = self.read_json("config.json")
        self.generation_config: dict[str, Any] = {}
        if self.has(GENERATION):
            self.generation_config = self.read_json(GENERATION, constants=True)
            model_config.check_generation(self.generation_config)
        if self.has(PREPROCESSOR):
            model_config.check_preprocessor(self.read_json(PREPROCESSOR))
        self._files = self._open_weights()
        self._file_of = self._locate()
        if verify:
            self._verify_others()

    def _verify_others(self) -> None:
        """Every file that is listed but not weights; those were hashed as they were opened."""
        for name, entry in self._entries.items():
            if name not in self._files:
                with safe_files.opened(self.path, name) as descriptor:
                    manifests.check_file(entry, descriptor)

    def __enter__(self) -> ModelFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files; tensors that somebody still holds keep their mapping alive."""
        self._files, self._file_of = {}, {}

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def read_bytes(self, name: str) -> bytes:
        """All of ``name``: of an artifact, the bytes that its manifest stands for."""
        data = safe_files.read_bytes(self.path, name)
        if name in self._entries:
            manifests.check_bytes(self._entries[name], data)
        return data

    def read_json(self, name: str, *, constants: bool = False) -> dict[str, Any]:
        """The object in the JSON file ``name``."""
        data = self.read_bytes(name)
        try:
            found = strict_json.loads(data, constants=constants)
        except ValueError as error:
            raise ArtifactFormatError(name, str(error), "strict JSON") from error
        if not isinstance(found, dict):
            raise ArtifactFormatError(name, type(found).__name__, "a JSON object")
        return found

    @property
    def tensor_names(self) -> list[str]:
        return list(self._file_of)

    def _entry(self, name: str) -> Entry:
        if name not in self._file_of:
            raise ArtifactMissing(name, "no such tensor", "a tensor of the safetensors files")
        return self._file_of[name].entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file; do not write to it."""
        self._entry(name)
        return self._file_of[name].tensor(name)

    def _refuse_code(self) -> None:
        for file in sorted(self.path.glob("*.json")):
            if file.name in (MANIFEST, INDEX, "tokenizer.json", "vocab.json"):
                continue
            about = self.read_json(file.name, constants=file.name == GENERATION)
            for where, value in model_config.code_keys(about):
                limit = "no keys that name code: it is never run from a model folder"
                raise ArtifactRefused(f"{file.name} {where}", value, limit)

    def _what_is_there(self) -> str:
        names = sorted(p.name for p in self.path.iterdir())
        return ", ".join(names[:4]) or "an empty folder"

    def _open_weights(self) -> dict[str, SafetensorsFile]:
        names = [SINGLE] if self.has(SINGLE) else []
        if self.has(INDEX):
            names = sorted(set(self._weight_map().values()))
        if not names:
            pickles = [p.name for p in self.path.iterdir() if p.suffix in PICKLES]
            if pickles:
                raise ArtifactRefused(pickles[0], "pickled weights", "safetensors: pickles can run code; convert them")
            raise ArtifactMissing(SINGLE, self._what_is_there(), "safetensors weights")
        for pickle in sorted(p.name for p in self.path.iterdir() if p.suffix in PICKLES):
            log.warning("%s is left alone: weights are read from safetensors only", pickle)
        files = {name: SafetensorsFile(self.path, name, self._check_of(name)) for name in names}
        if self.manifest is None and any(file.metadata.get(BELONGS) == MANIFEST for file in files.values()):
            raise ArtifactMissing(MANIFEST, "no such file", "the manifest that these weights were written with")
        return files

    def _check_of(self, name: str) -> Callable[[int], None]:
        """What hashes the weights ``name`` as they are opened, where they are to be hashed."""
        entry = self._entries.get(name)
        if entry is None or not self._hashes_weights:
            return lambda descriptor: None
        return partial(manifests.check_file, entry)

    def _weight_map(self) -> dict[str, str]:
        found = self.read_json(INDEX).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
            raise ArtifactFormatError(INDEX, "weight_map", "tensor names -> file names")
        for name, file in found.items():
            if "/" in file or "\\" in file or not file.endswith(".safetensors"):
                raise ArtifactFormatError(
                    f"{INDEX} weight_map {name}", file, "a safetensors file's name, without a path"
                )
        return found

    def _locate(self) -> dict[str, SafetensorsFile]:
        located: dict[str, SafetensorsFile] = {}
        for file in self._files.values():
            for name in file.entries:
                if name in located:
                    both = f"{located[name].name} and {file.name}"
                    raise ArtifactFormatError(f"tensor {name}", f"in {both}", "each tensor in one file")
                located[name] = file
        if self.has(INDEX):
            for name, file_name in self._weight_map().items():
                if located.get(name) is not self._files[file_name]:
                    raise ArtifactFormatError(INDEX, f"{name} in {file_name}", "the file that holds the tensor")
        return located

    def config_int(self, key: str, *, low: int = 1, high: int = 1 << 31, default: int | None = None) -> int:
        """An integer of config.json within bounds.

        Raises:
            ArtifactConfigError: it is missing or impossible.
        """
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ArtifactConfigError(f"config.json {key}", value, f"an integer {low}..{high}")
        return value
