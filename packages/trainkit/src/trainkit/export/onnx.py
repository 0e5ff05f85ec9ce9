"""ONNX files that are proven: each is run by onnxruntime and compared with the module before it takes its place."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from common_platform.errors import ConfigError, ExportError, ResourceError
from trainkit.export.compare import as_arguments, check_same, tensors_in

NEEDED = ("onnx", "onnxscript", "onnxruntime")


@torch.no_grad()
def export_onnx(module: nn.Module, path: str | Path, sample: Any, **settings: Any) -> None:
    """Write ``module.forward`` to ``path``, one file.

    Args:
        sample: an input: a tensor, a tuple of arguments, or a mapping of named ones.
        settings: of ``torch.onnx.export``.

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
        with TemporaryDirectory(dir=Path(path).parent) as folder:
            made = Path(folder, Path(path).name)
            _export(module, arguments, named, made, settings)
            check_same("onnx", wanted, _run(made, [*arguments, *named.values()]))
            made.replace(path)
    finally:
        for layer, training in modes.items():
            layer.training = training


def _export(module: nn.Module, arguments: Any, named: Any, path: Path, settings: dict[str, Any]) -> None:
    chosen = {"dynamo": True, "external_data": False, "verbose": False} | settings
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter about itself
            torch.onnx.export(module, arguments, str(path), kwargs=named or None, **chosen)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ExportError(type(module).__name__, reason[0] if reason else type(error).__name__, "a forward that can be "
                          "exported: no branches on values") from error  # fmt: skip


def _run(path: Path, inputs: list[Any]) -> list[Tensor]:
    session = import_module("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    values = [tensor.cpu().numpy() for tensor in tensors_in(inputs)]
    return [torch.as_tensor(value) for value in session.run(None, dict(zip(names, values, strict=False)))]
