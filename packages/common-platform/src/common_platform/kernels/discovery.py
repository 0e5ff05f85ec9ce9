"""Which kernels there are: every ``kernels/OPERATION/triton_backend.py`` of a package."""

from __future__ import annotations

import importlib.util
import pkgutil
from types import ModuleType

from common_platform.kernels.specialization import Specialization, Work

MODULE = "triton_backend"


def specializations_of(package: str) -> list[tuple[str, Specialization]]:
    """``(operation, specialization)`` for all in the ``SPECIALIZATIONS`` of its backends; imports triton."""
    return [(name, one) for name, module in _backends(package) for one in module.SPECIALIZATIONS]


def works_of(package: str) -> list[Work]:
    """All in the ``WORKS`` of its backends."""
    return [work for _, module in _backends(package) for work in getattr(module, "WORKS", ())]


def _backends(package: str) -> list[tuple[str, ModuleType]]:
    if importlib.util.find_spec(f"{package}.kernels") is None:
        return []
    kernels = importlib.import_module(f"{package}.kernels")
    names = [found.name for found in pkgutil.iter_modules(kernels.__path__) if found.ispkg]
    folders = [(name, importlib.import_module(f"{package}.kernels.{name}")) for name in names]
    return [
        (name, importlib.import_module(f"{folder.__name__}.{MODULE}"))
        for name, folder in folders
        if any(found.name == MODULE for found in pkgutil.iter_modules(folder.__path__))
    ]
