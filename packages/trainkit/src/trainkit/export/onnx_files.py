"""ONNX files of several parts: weights beside the model, digests of both, and nothing read from anywhere else.

A model above 2 GiB cannot be one file: its weights lie in ``<name>.onnx.data`` beside it, by that name and no path, and
``<name>.onnx.json`` has the sizes and digests of the two.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common_platform.artifact import safe_files
from common_platform.artifact.manifest import FileEntry, check_file, digest_of
from common_platform.artifact.strict_json import loads
from common_platform.errors import ArtifactFormatError, ArtifactMissing, ArtifactRefused, ResourceError

KIND = "trainkit onnx"


def data_of(model: Path) -> Path:
    return model.with_name(f"{model.name}.data")


def digests_of(model: Path) -> Path:
    return model.with_name(f"{model.name}.json")


def write_digests(model: Path) -> Path:
    """Write down sizes and digests of ``model`` and its weights, which lie in one folder."""
    files = [_entry(part) for part in (model, data_of(model))]
    path = digests_of(model)
    about = {"kind": KIND, "files": [{"name": f.name, "size": f.size, "sha256": f.sha256} for f in files]}
    path.write_text(json.dumps(about, indent=2) + "\n")
    return path


def _entry(path: Path) -> FileEntry:
    with safe_files.opened(path.parent, path.name) as descriptor:
        return FileEntry(path.name, os.fstat(descriptor).st_size, digest_of(descriptor))


def load_onnx(path: str | Path) -> Any:
    """A session of onnxruntime for the model at ``path``, once it is known to read no file but those beside it.

    Where there is a ``<name>.onnx.json``, the files must be those that it has the digests of.

    Raises:
        ArtifactRefused: a tensor's data lies outside of the folder, or behind a link.
        ArtifactMissing: there is no such file, or not the one with the weights.
        ArtifactFormatError, ArtifactDigestMismatch: it is no ONNX file, or not the one that was written.
        ResourceError: onnx or onnxruntime is not installed.
    """
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ResourceError("load_onnx", ", ".join(missing), "installed: pip install 'trainkit[onnx]'")
    model = Path(path)
    content = safe_files.read_bytes(model.parent, model.name, 2 << 30)
    locations = sorted(set(_locations(_parsed(model, content))))
    for location in locations:
        _check_location(model.parent, location)
    if digests_of(model).exists():
        _check_digests(model)
    runtime = import_module("onnxruntime")
    return runtime.InferenceSession(str(model), providers=["CPUExecutionProvider"])


def _parsed(model: Path, content: bytes) -> Any:
    onnx = import_module("onnx")
    try:
        return onnx.load_model_from_string(content)
    except Exception as error:
        raise ArtifactFormatError(model.name, type(error).__name__, "an ONNX model") from error


def _check_location(folder: Path, location: str) -> None:
    try:
        name = safe_files.check_name(location)
        if "/" in name:
            raise ArtifactRefused("file name", name, "a name without folders")
        with safe_files.opened(folder, name):
            pass
    except ArtifactRefused as error:
        raise ArtifactRefused(f"external_data.location {location}", error.value, "the name of a regular file beside "
                              "the model") from error  # fmt: skip
    except ArtifactMissing as error:
        raise ArtifactMissing(f"external_data.location {location}", "no such file", "one beside the model") from error


def _check_digests(model: Path) -> None:
    name = digests_of(model).name
    try:
        about = loads(safe_files.read_bytes(model.parent, name, 1 << 20))
        files = [FileEntry(str(one["name"]), int(one["size"]), str(one["sha256"])) for one in about["files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactFormatError(name, str(error), "names, sizes and digests") from error
    for file in files:
        with safe_files.opened(model.parent, file.name) as descriptor:
            check_file(file, descriptor)


def _locations(model: Any) -> Iterator[str]:
    """Where the data of each tensor lies that is not in the model itself."""
    for tensor in _tensors(model):
        if tensor.data_location == tensor.EXTERNAL or tensor.external_data:
            found = {entry.key: entry.value for entry in tensor.external_data}
            yield found.get("location", "")


def _tensors(message: Any) -> Iterator[Any]:
    """Every TensorProto in a message, wherever it stands: initializers, attributes, graphs in graphs, functions."""
    if type(message).__name__ == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in [value] if hasattr(value, "ListFields") else value:
                if hasattr(inner, "ListFields"):
                    yield from _tensors(inner)
