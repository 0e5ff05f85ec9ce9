"""The device that all is measured on, and its two bounds as they are measured here."""

from __future__ import annotations

import gc
import importlib.util
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from tests.gpu.stages import BROKEN

PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "vllm", "flashinfer-python", "flash-attn")


def facts() -> dict[str, Any]:
    """Name, driver and versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {"python": platform.python_version(), "versions": versions, "device": None}
    found["c_compiler"] = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        found |= {
            "device": about.name,
            "memory_bytes": about.total_memory,
            "multiprocessors": about.multi_processor_count,
            "capability": getattr(about, "gcnArchName", "") or "{}.{}".format(*torch.cuda.get_device_capability(0)),
            "runtime": torch.version.hip or torch.version.cuda,
            "driver": _driver(),
        }
    return found


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told.splitlines()[0].strip() if told else "unknown"


def has_package(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forget() -> None:
    """Give the memory of what nobody holds any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_broken() -> bool:
    """Whether an error of a kernel has ended the device's work for this process."""
    try:
        synchronize()
    except RuntimeError:
        return True
    return False


def stop_if_broken() -> None:
    """Leave the rest to a new process where nothing that this one asks of the device means anything any more."""
    if is_broken():
        os._exit(BROKEN)


class Stopwatch:
    """Times calls on the device; between two calls a buffer is written, so that no input is in a cache by chance."""

    def __init__(self, device: torch.device, *, is_dry: bool) -> None:
        self._is_dry = is_dry
        self._device = device
        size = 1024 if is_dry or device.type != "cuda" else 256 << 20
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def seconds(self, call: Callable[[], Any], *, repeats: int = 20) -> float:
        """The median of ``repeats`` calls after three to warm up."""
        if self._is_dry:
            start = time.perf_counter()
            call()
            return max(time.perf_counter() - start, 1e-9)
        for _ in range(3):
            call()
        times = []
        for _ in range(repeats):
            self._flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)


def bounds(watch: Stopwatch, device: torch.device, *, is_dry: bool) -> dict[str, float]:
    """Bytes a second of a copy (read and write counted), FLOPs a second of a large bf16 matrix product."""
    size = 1 << 10 if is_dry else 1 << 30
    source, target = (torch.empty(size, dtype=torch.int8, device=device) for _ in range(2))
    copy_s = watch.seconds(lambda: target.copy_(source))
    n = 32 if is_dry else 8192
    dtype = torch.float32 if is_dry else torch.bfloat16
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    product_s = watch.seconds(lambda: a @ b)
    return {"bandwidth_bytes_per_s": 2 * size / copy_s, "tensor_flops_per_s": 2 * n**3 / product_s}
