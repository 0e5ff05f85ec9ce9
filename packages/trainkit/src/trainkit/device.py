"""Which device to train on."""

from __future__ import annotations

import torch

from common_platform.errors import ConfigError
from common_platform.platforms import detect

NAMES = {"gpu": "cuda", "rocm": "cuda"}
KNOWN = ("auto", "cpu", "cuda", "gpu", "xpu", "mps")


def choose_device(accelerator: str) -> torch.device:
    """The device that ``accelerator`` names; "auto" takes the best one that was detected.

    Raises:
        ConfigError: no such name.
        DeviceError: there is no such device here; the CPU never stands in for it silently.
    """
    if accelerator not in KNOWN:
        raise ConfigError("accelerator", accelerator, f"one of {KNOWN}")
    platform = detect(None if accelerator == "auto" else NAMES.get(accelerator, accelerator))
    return (
        torch.device(platform.device_type, 0)
        if platform.device_type in ("cuda", "xpu")
        else torch.device(platform.device_type)
    )
