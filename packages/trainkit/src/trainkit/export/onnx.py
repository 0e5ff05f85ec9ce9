"""ONNX files that are proven: each is run by onnxruntime and compared with the module before it takes its place."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from common_platform.errors import ConfigError, ExportError, ResourceError
from trainkit.export import onnx_files
from trainkit.export.compare import as_arguments, check_same, tensors_in

ONE_FILE_BYTES = (2 << 30) - (64 << 20)  # a protobuf holds 2 GiB, and there is more in it than weights
NEEDED = ("onnx", "onnxscript", "onnxruntime")


@torch.no_grad()
def export_onnx(module: nn.Module, path: str | Path, sample: Any, **settings: Any) -> None:
    """Write ``module.forward`` to ``path``, one file; above 2 GiB, which is ONNX's limit, with its weights beside it.

    Args:
        sample: an input: a tensor, a tuple of arguments, or a mapping of named ones.
        settings: of ``torch.onnx.export``. ``external_data=True`` puts the weights beside the model at any size:
            ``trainkit.export.onnx_files``.

    Raises:
        ResourceError: a library that is needed is not installed.
        ExportError: it cannot be exported, or gives other numbers; no file is left.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ResourceError("to_onnx", ", ".join(missing), "installed: pip install 'trainkit[onnx]'")
    if not str(path).endswith(".onnx"):
        raise ConfigError("file_path", str(path), "a name that ends in .onnx")
    arguments, named = as_arguments(sample)
    modes = {layer: layer.training for layer in module.modules()}
    module.eval()
    try:
        wanted = tensors_in(module(*arguments, **named))
        settings.setdefault("external_data", _num_bytes(module) >= ONE_FILE_BYTES)
        with TemporaryDirectory(dir=Path(path).parent) as folder:
            made = Path(folder, Path(path).name)
            _export(module, arguments, named, made, settings)
            check_same("onnx", wanted, _run(made, [*arguments, *named.values()]))
            _put(made, Path(path))
    finally:
        for layer, training in modes.items():
            layer.training = training


def _num_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def _put(made: Path, path: Path) -> None:
    """What was made, in its place; the model last, so that it never stands there without its weights."""
    if onnx_files.data_of(made).exists():
        onnx_files.write_digests(made).replace(onnx_files.digests_of(path))
        onnx_files.data_of(made).replace(onnx_files.data_of(path))
    else:
        for old in (onnx_files.digests_of(path), onnx_files.data_of(path)):
            old.unlink(missing_ok=True)
    made.replace(path)


def _export(module: nn.Module, arguments: Any, named: Any, path: Path, settings: dict[str, Any]) -> None:
    chosen = {"dynamo": True, "verbose": False} | settings
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter about itself
            torch.onnx.export(module, arguments, str(path), kwargs=named or None, **chosen)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ExportError(type(module).__name__, reason[0] if reason else type(error).__name__, "a forward that can be "
                          "exported: no branches on values") from error  # fmt: skip


def _run(path: Path, inputs: list[Any]) -> list[Tensor]:
    session = onnx_files.load_onnx(path)
    names = [one.name for one in session.get_inputs()]
    values = [tensor.cpu().numpy() for tensor in tensors_in(inputs)]
    return [torch.as_tensor(value) for value in session.run(None, dict(zip(names, values, strict=False)))]
