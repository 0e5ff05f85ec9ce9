"""Which device a thread's kernels go to.

Triton launches on the thread's current device, wherever its tensors are, and so are events and streams made there; a
new thread begins with the first device. So each thread that launches is told, and ``cuda`` is one device, not any.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

WITH_CURRENT = ("cuda", "xpu")  # kinds of which a thread has a current one


def numbered(device: torch.device) -> torch.device:
    """``device`` with its number: the one that is current in this thread where none was named."""
    if device.type not in WITH_CURRENT or device.index is not None:
        return device
    return torch.device(device.type, getattr(torch, device.type).current_device())


def make_current(device: torch.device) -> None:
    """For the rest of this thread."""
    if device.type in WITH_CURRENT:
        getattr(torch, device.type).set_device(device)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """``device`` is this thread's current one within it."""
    if device.type not in WITH_CURRENT:
        return nullcontext()
    within: AbstractContextManager[Any] = getattr(torch, device.type).device(device)
    return within
