"""How attention is best launched here: what `servekit tune` would write for a Llama of 8 B parameters."""

from __future__ import annotations

from typing import Any

import torch
from tests.gpu.machine import Stopwatch
from tests.gpu.progress import Progress
from tests.gpu.work import device_of

SIZES = {"heads": 32, "kv_heads": 8, "head_dim": 128, "linears": ()}


def measure(progress: Progress, is_dry: bool) -> int:
    """One entry a kernel, with its gain; a kernel that time does not suffice for is left out."""
    from servekit.kernels.spaces import ModelSizes, attention_space
    from servekit.kernels.tune import device_seconds, entries, tune

    device = device_of(is_dry=is_dry)
    sizes = ModelSizes(**(SIZES | ({"heads": 4, "kv_heads": 2, "head_dim": 16} if is_dry else {})))
    dtype = torch.float32 if is_dry else torch.bfloat16
    watch = Stopwatch(device, is_dry=is_dry)
    loads: dict[str, dict[str, Any]] = {
        "decode": {"rows": 64, "context": 4095, "count": 1},
        "prefill": {"rows": 1, "context": 0, "count": 4096},
    }
    for name, load in loads.items():
        if progress.begins(name):
            small = {"rows": 1, "context": load["context"] and 7, "count": min(load["count"], 8)}
            space = attention_space(name, sizes, dtype, device, **(small if is_dry else load))
            found = tune(space, watch.seconds if is_dry else device_seconds)
            told = {"entries": entries([found]), "default_s": found.default_s, "best_s": found.best_s}
            progress.put(told | {"num_failed": found.num_failed}, "configs", space.kernel)
    return 0
