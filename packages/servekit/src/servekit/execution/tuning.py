"""`servekit tune`: the shapes of a model's kernels, measured on the GPU at hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from common_platform.artifact import open_model_folder
from common_platform.errors import DeviceError
from servekit.execution.executor import platform_of
from servekit.kernels.choice import GPU
from servekit.kernels.tune import SPACES, Space, Timer, device_seconds, entries, tune
from servekit.kernels.tuning import device_name, write


def tune_model(
    model: Path, out: Path, dtype: str, timer: Timer | None = None, spaces: tuple[Space, ...] = SPACES
) -> Iterator[str]:
    """Lines that tell what was found; the last one names the file.

    Args:
        timer: seconds of a call; None times on the GPU, which must be here.
        spaces: what is tried.

    Raises:
        DeviceError: there is no GPU.
    """
    platform = platform_of("auto")
    if timer is None and platform.name not in GPU:
        raise DeviceError("tune", platform.name, f"one of {', '.join(GPU)}: launches are measured on the device itself")
    device = torch.device(platform.device_type)
    with open_model_folder(model, verify=False) as folder:
        heads = folder.config_int("num_attention_heads", high=1 << 14)
        kv_heads = folder.config_int("num_key_value_heads", high=heads, default=heads)
        hidden = folder.config_int("hidden_size", high=1 << 20)
        head_dim = folder.config_int("head_dim", high=1 << 12, default=hidden // heads)
    found = []
    for space in spaces:
        one = tune(
            space,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=getattr(torch, dtype),
            device=device,
            timer=timer or device_seconds,
        )
        found.append(one)
        gain = one.default_s / one.best_s
        told = f"{one.config}, {gain:.2f} times as fast as the default" if one.config else "the default is best"
        yield f"{one.kernel} {one.shape}: {told} ({one.num_failed} did not launch)"
    yield str(write(out, device_name(), entries(found)))
