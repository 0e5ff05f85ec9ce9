"""How many floating-point operations a model needs, and how many a device could do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# Dense peaks in TFLOP/s by the vendors' data sheets: float32 (without TensorFloat), TensorFloat, 16 bits.
PEAKS: dict[str, tuple[float, float, float]] = {
    "B200": (75, 1125, 2250),
    "H200": (67, 494, 989),
    "H100 NVL": (60, 417, 835),
    "H100 PCIe": (51, 378, 756),
    "H100": (67, 494, 989),
    "A100": (19.5, 156, 312),
    "L40S": (91.6, 183, 362),
    "L40": (90.5, 90.5, 181),
    "L4": (30.3, 60, 121),
    "A10": (31.2, 62.5, 125),
    "RTX 4090": (82.6, 82.6, 165),
    "RTX 3090": (35.6, 35.6, 71),
    "V100": (15.7, 15.7, 125),
    "T4": (8.1, 8.1, 65),
    "MI300X": (163.4, 653.7, 1307),
    "MI250X": (95.7, 95.7, 383),
}


def measure_flops(
    model: nn.Module, forward_fn: Callable[[], Any], loss_fn: Callable[[Any], Tensor] | None = None
) -> int:
    """Floating-point operations of ``forward_fn``, and of the backward pass where ``loss_fn`` makes a loss of what it
    returns. Put ``model`` on torch's meta device, and no memory and no time is used.

    Source: torch.utils.flop_counter, which counts matrix products, convolutions and attention.
    """
    with FlopCounterMode(display=False) as counter:
        found = forward_fn()
        if loss_fn is not None:
            loss_fn(found).backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    return int(counter.get_total_flops())


def available_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second that ``device`` could do in ``dtype``: by its data sheet, on a CPU by a measured product of
    matrices (20 ms); None where it is not known."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peaks = next((values for chip, values in PEAKS.items() if chip.lower() in name.lower()), None)
        if peaks is None:
            return None
        full = peaks[1] if torch.backends.cuda.matmul.allow_tf32 else peaks[0]
        return 1e12 * {torch.float32: full, torch.bfloat16: peaks[2], torch.float16: peaks[2]}.get(dtype, peaks[0])
    return _measured(dtype) if device.type == "cpu" else None


def _measured(dtype: torch.dtype, size: int = 768, rounds: int = 5) -> float:
    one = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        torch.mm(one, one)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best
