"""Which implementation of an operation a platform gets: data, so that ``servekit info`` can show it."""

from __future__ import annotations

import importlib.util
import pkgutil
from typing import Any

import torch

from common_platform.kernels import runs_triton
from common_platform.platforms import Platform
from servekit.kernels.tuning import library_of

TRITON = "triton_backend"
GPU = ("cuda", "rocm", "xpu")  # platforms whose kernels are Triton's
BACKENDS: dict[str, tuple[str, ...]] = {  # operation -> its modules, the best first; the last one runs anywhere
    "cascade_attention": (TRITON, "reference"),
    "fused_moe": (TRITON, "sorted"),
    "logits": (TRITON, "reference"),
    "merge_attention": (TRITON, "reference"),
    "mla_decode": (TRITON, "reference"),
    "moe_align": (TRITON, "reference"),
    "moe_routing": (TRITON, "reference"),
    "paged_attention": (TRITON, "sdpa"),
    "quantize": (TRITON, "reference"),
    "quantized_linear": (TRITON, "reference"),
    "rms_norm": (TRITON, "fused"),
    "rope_kv_write": (TRITON, "reference"),
    "sample": (TRITON, "reference"),
    "silu_and_mul": (TRITON, "reference"),
}


def backend_of(operation: str, platform: str) -> str:
    """The module of ``operation`` that runs on ``platform`` (``Platform.name``)."""
    return next(name for name in BACKENDS[operation] if name != TRITON or platform in GPU)


def libraries_of(operation: str, platform: str) -> dict[str, str]:
    """Kernels of ``operation`` for which a library is installed that was measured to be the faster on this device."""
    if platform != "cuda" or operation != "paged_attention":
        return {}
    measured = {kind: library_of(f"{operation}_{kind}") for kind in ("decode", "prefill")}
    return {kind: name for kind, name in measured.items() if name and importlib.util.find_spec(name)}


def function_of(operation: str, function: str, platform: str) -> Any:
    """``function`` of the module that ``backend_of`` names, which is imported now and not before."""
    return pkgutil.resolve_name(f"servekit.kernels.{operation}.{backend_of(operation, platform)}:{function}")


def chosen(platform: Platform) -> dict[str, tuple[str, str]]:
    """For each operation the backend of ``platform``, and why it is not the best one (empty where it is)."""
    missing = runs_triton(torch.device(platform.device_type)) if platform.name in GPU else None
    found = {}
    for operation, backends in sorted(BACKENDS.items()):
        backend = backend_of(operation, platform.name)
        reason = f"{backends[0]} is for {', '.join(GPU)}" if backend != backends[0] else ""
        reason = missing or reason if backend == TRITON else reason
        faster = [f"{kind} by {name}, as measured" for kind, name in libraries_of(operation, platform.name).items()]
        found[operation] = (backend, reason or "; ".join(faster))
    return found
