"""TorchScript that is proven: read back from its file and compared with the module."""

from __future__ import annotations

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from common_platform.errors import ConfigError, ExportError
from trainkit.export.compare import as_arguments, check_same, tensors_in


@torch.no_grad()
def export_torchscript(module: nn.Module, path: str | Path | None, method: str, sample: Any, **settings: Any) -> Any:
    """``module.forward`` as TorchScript, and at ``path`` if there is one.

    Args:
        method: "script" or "trace"; only "trace" needs ``sample``, but a file is compared only with one.
        settings: of ``torch.jit.script`` or ``torch.jit.trace``.

    Raises:
        ExportError: it cannot be exported, or gives other numbers; no file is left.
    """
    if method not in ("script", "trace"):
        raise ConfigError("method", method, "'script' or 'trace'")
    if method == "trace" and sample is None:
        raise ConfigError("example_inputs", None, "an input of forward, here or as example_input_array")
    modes = {layer: layer.training for layer in module.modules()}
    trainer = module.__dict__.get("_trainer")
    module.__dict__ |= {"_trainer": None, "_is_exported": True}
    module.eval()
    try:
        script = _make(module, method, sample, settings)
        if path is not None:
            _write(module, script, Path(path), sample)
    finally:
        module.__dict__ |= {"_trainer": trainer, "_is_exported": False}
        for layer, training in modes.items():
            layer.training = training
    return script


def _make(module: nn.Module, method: str, sample: Any, settings: dict[str, Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is in maintenance and says so each time
            if method == "script":
                return torch.jit.script(module, **settings)
            return torch.jit.trace(module, as_arguments(sample)[0], **settings)  # type: ignore[no-untyped-call]
    except Exception as error:
        reason = [line for line in str(error).strip().splitlines() if line]
        raise ExportError(type(module).__name__, reason[0] if reason else type(error).__name__, "a forward that "
                          f"TorchScript can {method}") from error  # fmt: skip


def _write(module: nn.Module, script: Any, path: Path, sample: Any) -> None:
    with TemporaryDirectory(dir=path.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Path(folder, path.name)
        torch.jit.save(script, str(made))
        if sample is not None:
            arguments, named = as_arguments(sample)
            again = torch.jit.load(str(made))  # type: ignore[no-untyped-call]
            check_same("torchscript", tensors_in(module(*arguments, **named)), tensors_in(again(*arguments, **named)))
        made.replace(path)
