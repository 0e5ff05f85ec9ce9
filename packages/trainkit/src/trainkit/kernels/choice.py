"""Which implementation a tensor's device gets."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from common_platform.kernels import runs_triton

TRITON, TORCH = "triton_backend", "reference"


def backend_of(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Triton's where it runs on ``device``, else torch's; float64 is torch's, for Triton's arithmetic is float32."""
    return TRITON if runs_triton(device) is None and dtype != torch.float64 else TORCH


def module_of(operation: str, device: torch.device, dtype: torch.dtype = torch.float32) -> ModuleType:
    """The module that ``backend_of`` names, imported when it is first asked for."""
    return importlib.import_module(f"trainkit.kernels.{operation}.{backend_of(device, dtype)}")
