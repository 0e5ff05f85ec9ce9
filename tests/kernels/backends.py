"""Which implementations of an operation run in this process, on what device and in which dtypes."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from common_platform.kernels import is_interpreted, runs_triton

DEVICE = torch.device(os.environ.get("KERNEL_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))
TRITON = "triton_backend"
INTERPRETED = (torch.float32, torch.float16)  # bfloat16's tl.dot is wrong there
ON_DEVICE = (torch.float32, torch.float16, torch.bfloat16)


def backends(operation: str, function: str, of: Sequence[str] = ("reference",)) -> dict[str, Callable[..., Any]]:
    """Name of a module in ``operation`` (``servekit.kernels.rms_norm``) -> its ``function``, where it has one.

    Args:
        of: modules beside ``triton_backend``, which is there where triton runs.
    """
    folder = importlib.import_module(operation)
    there = {found.name for found in pkgutil.iter_modules(folder.__path__)}
    names = [name for name in of if name in there]
    if TRITON in there and runs_triton(DEVICE) is None:
        names.append(TRITON)
    modules = {name: importlib.import_module(f"{operation}.{name}") for name in names}
    return {
        name.removesuffix("_backend"): getattr(module, function)
        for name, module in modules.items()
        if hasattr(module, function)
    }


def cases(found: dict[str, Callable[..., Any]]) -> list[Any]:
    """``(backend, dtype)`` for all that are exact here, as parameters with readable names."""
    pairs = []
    for name in found:
        dtypes = INTERPRETED if name == "triton" and is_interpreted() else ON_DEVICE
        pairs += [pytest.param(name, dtype, id=f"{name}-{str(dtype)[6:]}") for dtype in dtypes]
    return pairs


def multiplies_float8() -> bool:
    """Whether the device at hand computes with float8; the interpreter does."""
    nvidia = DEVICE.type == "cuda" and not torch.version.hip
    return not nvidia or torch.cuda.get_device_capability(DEVICE) >= (8, 9)
