"""The most likely token of each row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from servekit.kernels.argmax.cpu import NativeArgmax
from servekit.kernels.argmax.reference import argmax
from servekit.kernels.native import native_library

Argmax = Callable[[Tensor], tuple[Tensor, Tensor]]

__all__ = ["Argmax", "argmax_for"]


def argmax_for(device: torch.device) -> Argmax:
    """The fastest one here."""
    library = native_library() if device.type == "cpu" else None
    return argmax if library is None else NativeArgmax(library, torch.get_num_threads())
